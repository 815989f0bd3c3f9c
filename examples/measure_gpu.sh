#!/usr/bin/env bash
# The day there is a GPU: rows measured beside everybody else's, the tests that need it, launches tuned for it.
#   examples/measure_gpu.sh [PART ...]     these parts; without any, all in this order:
#     kernels, train, checkpoint           rows of bench.py, each in benchmarks/ as soon as it is measured
#     tests-kernels, tests-train           pytest -m gpu
#     tune                                 launches to kernels/configs/, going on where the last time ended; then kernels
# MINUTES  after which a part begins nothing more, and is ended 40 s later (8)   FOLDER  what each prints (runs/gpu)
# Where a command has ten minutes, give one part at a time. Commit benchmarks/ and kernels/configs/. A red test does not
# stop the measurements, which have gates of their own; the exit code tells of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=${MINUTES:-8} folder=${FOLDER:-runs/gpu}
(($#)) || set -- kernels train checkpoint tests-kernels tests-train tune

command_of() { # the words of a part
    case $1 in
    kernels | train | checkpoint) echo tools/bench.py "$1" --minutes "$minutes" ;;
    tune) echo tools/bench.py kernels --tune --minutes "$minutes" ;;
    tests-kernels) echo -m pytest -m gpu -rs tests/kernels tests/bench ;;
    tests-train) echo -m pytest -m gpu -rs tests --ignore tests/kernels --ignore tests/bench ;;
    *) echo "error: no part $1; see the head of ${BASH_SOURCE[0]}" >&2 && return 2 ;;
    esac
}

for part; do command_of "$part" >/dev/null || exit 2; done
mkdir -p "$folder"
python -m megacpt.env --json >"$folder/environment.json"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: there is no GPU here that torch can use; $folder/environment.json says what there is" >&2
    exit 2
fi
status=0
for part; do
    read -ra words <<<"$(command_of "$part")"
    timeout $((60 * minutes + 40)) python "${words[@]}" 2>&1 | tee "$folder/$part.txt" || status=1
done
exit "$status"
