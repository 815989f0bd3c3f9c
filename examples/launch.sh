#!/usr/bin/env bash
# One machine, or one of several: the same command on each of them.
#   examples/launch.sh --config run.yaml [section.key=value ...]                      all GPUs of this machine
#   NODES=4 HEAD=node17 examples/launch.sh --config run.yaml                          on each of four machines
# NODES  how many machines (1)                 RANKS  ranks on each (its GPUs; without any, its cores)
# HEAD   one of them, the same name on all     PORT   where they meet on HEAD (29500)      JOB  a name for the meeting
# The same command again goes on from the newest checkpoint in save.dir, which all machines must see.
set -euo pipefail
nodes=${NODES:-1}
if ((nodes > 1)) && [[ -z ${HEAD:-} ]]; then
    echo "error: NODES=$nodes needs HEAD, the name of one of the machines, the same on all of them" >&2
    exit 2
fi
ranks=${RANKS:-auto} # torchrun's word for: GPUs, else cores
if ((nodes == 1)); then
    exec torchrun --standalone --nproc-per-node "$ranks" -m megacpt.train "$@"
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-megacpt}" -m megacpt.train "$@"
