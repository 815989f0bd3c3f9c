#!/usr/bin/env bash
# Real text to continual pre-training on two CPU cores; called by `make quickstart`. What is already there is reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=${1:-tiny}
if [[ $model != tiny ]]; then
    echo "error: MODEL=$model is unknown; the quickstart has MODEL=tiny" >&2
    exit 2
fi

run=runs/quickstart
data=$run/data
tokenizer=$run/tokenizer.model
export OMP_NUM_THREADS=1

if [[ ! -f $data/general.valid.jsonl ]]; then # the last of the four files
    python tools/quickstart_data.py --output-dir "$data"
fi

if [[ ! -f $tokenizer ]]; then
    python tools/train_tokenizer.py --input "$data"/{medical,general}.train.jsonl --vocab-size 4096 --output "$tokenizer"
fi

for name in {medical,general}.{train,valid}; do
    prefix=$data/${name/./_}
    if [[ ! -f ${prefix}_text_document.idx ]]; then
        python tools/preprocess.py --input "$data/$name.jsonl" --json-keys text --output-prefix "$prefix" \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer" --append-eod --workers 2
    fi
done

torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_base.yaml
torchrun --nproc-per-node 2 -m megacpt.train --config examples/quickstart_cpt.yaml

python - "$run" <<'SUMMARY'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
rows = [json.loads(line) for line in (run / "cpt/metrics.jsonl").read_text().splitlines()]
print("\ncontinual pre-training, held-out loss (first, highest, last):")
for name in dict.fromkeys(row["validation"] for row in rows if "validation" in row):
    curve = [row for row in rows if row.get("validation") == name]
    top = max(curve, key=lambda row: row["loss"])
    print(f"  {name:8} {curve[0]['loss']:.3f}  {top['loss']:.3f} (step {top['iteration']})  {curve[-1]['loss']:.3f}")
for what in ("data", "tokenizer.model", "base/checkpoints", "cpt/checkpoints", "cpt/metrics.jsonl"):
    print(f"{run / what}")
SUMMARY
