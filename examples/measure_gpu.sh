#!/usr/bin/env bash
# The day there is a GPU: what it is, the tests that need it, launches tuned for it, rows measured beside everybody else's.
#   examples/measure_gpu.sh [FOLDER]
# FOLDER  what each part prints (runs/gpu)             MINUTES  for the rows of training steps (9)
# Rows go to benchmarks/, launches to kernels/configs/: commit both. A red test does not stop the measurements, which have
# gates of their own; the exit code tells of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-runs/gpu}
mkdir -p "$folder"
python -m megacpt.env --json >"$folder/environment.json"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: there is no GPU here that torch can use; $folder/environment.json says what there is" >&2
    exit 2
fi
status=0
python -m pytest -m gpu -rs --junitxml "$folder/tests.xml" 2>&1 | tee "$folder/tests.txt" || status=1
python tools/bench.py kernels --tune 2>&1 | tee "$folder/kernels.txt" || status=1
python tools/bench.py checkpoint 2>&1 | tee "$folder/checkpoint.txt" || status=1
python tools/bench.py train --minutes "${MINUTES:-9}" 2>&1 | tee "$folder/train.txt" || status=1
exit "$status"
