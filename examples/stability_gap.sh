#!/usr/bin/env bash
# The stability gap of the quickstart's base with and without the three strategies of arXiv 2406.14833: two arms of equally many
# tokens and equal learning rates, three seeds each, and a report that compares them. After `make quickstart`; what is already
# there is reused.
#   medical alone    examples/stability_gap.yaml: all of the medical text, no document twice
#   strategies 1-3   examples/quickstart_cpt.yaml: four passes over the best of it, in a mixture with general text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/stability_gap
export OMP_NUM_THREADS=1
for file in runs/quickstart/base/checkpoints/latest_checkpointed_iteration.txt runs/quickstart/data/medical.subset; do
    if [[ ! -f $file ]]; then
        echo "error: $file: not there; 'make quickstart' makes it" >&2
        exit 2
    fi
done

alone=() strategies=()
for seed in 1 2 3; do
    torchrun --nproc-per-node 2 -m megacpt.train --config examples/stability_gap.yaml \
        train.seed="$seed" save.dir="$out/alone_$seed"
    torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_cpt.yaml \
        model.tensor_model_parallel_size=1 train.seed="$seed" save.dir="$out/strategies_$seed"
    alone+=("$out/alone_$seed") strategies+=("$out/strategies_$seed")
done

runs() { # joined by commas
    local IFS=,
    echo "$*"
}
python tools/report.py --group "medical alone=$(runs "${alone[@]}")" \
    --group "strategies 1-3=$(runs "${strategies[@]}")" --output "$out/report.html" --png "$out/png" \
    --title "The stability gap of a tiny model, with and without three strategies"
