# syntax=docker/dockerfile:1
# On NVIDIA's PyTorch image, whose torch, Transformer Engine, apex, flash-attn and NCCL belong together and stay as is.
# Not built by the tests. IMAGE has no default, since where it lies is a site's choice: NGC's pytorch:26.06-py3 or newer.
# KenLM's lmplz and build_binary are built into it, so that no node needs a compiler.
#
#   docker build --build-arg IMAGE=... -t megacpt .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/megacpt/runs" -it megacpt

ARG IMAGE
FROM ${IMAGE:?give --build-arg IMAGE=, the NVIDIA PyTorch image to build on}

WORKDIR /megacpt
COPY . .

# The dependencies of pyproject.toml, and those for evaluation, fast encoding, scoring and Ray, without torch. What the image already has it keeps (its own PIP_CONSTRAINT stays in
# force); the rest comes at the versions of constraints.txt. megatron-core goes in alone, since it would ask for torch.
RUN <<'SCRIPT' bash -euo pipefail
python - <<'PYTHON'
import importlib.metadata
import re
import tomllib
from pathlib import Path


def name(line):
    return re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-")


held = {name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
pins = [line for line in Path("constraints.txt").read_text().splitlines() if "==" in line]
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [line for extra in ("eval", "fast", "hf", "kenlm", "plot", "ray") for line in project["optional-dependencies"][extra]]
wanted = [line for line in project["dependencies"] + extras if name(line) not in ("torch", "megatron-core", "megacpt")]
Path("/tmp/wanted.txt").write_text("\n".join(wanted))
Path("/tmp/pins.txt").write_text("\n".join(line for line in pins if name(line) not in held))
Path("/tmp/core.txt").write_text("\n".join(line for line in pins if name(line) == "megatron-core"))
PYTHON
before=$(python -c 'import torch; print(torch.__version__)')
pip install --no-cache-dir -c /tmp/pins.txt -r /tmp/wanted.txt
pip install --no-cache-dir --no-deps -r /tmp/core.txt
pip install --no-cache-dir --no-deps --no-build-isolation -e .
# The image may forbid Python to write bytecode, and whoever runs the container to write here.
python -m compileall -q megacpt kernels tools
[[ $(python -c 'import torch; print(torch.__version__)') == "$before" ]]
SCRIPT

RUN <<'SCRIPT' bash -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update
# This script is bash's standard input, which apt's children must not read.
apt-get install -y --no-install-recommends cmake g++ make zlib1g-dev \
    libboost-program-options-dev libboost-system-dev libboost-thread-dev </dev/null
rm -rf /var/lib/apt/lists/*
# Out of root's cache, for containers often run as another user.
install "$(python -c 'from megacpt.data.scores.kenlm_build import build_programs; print(build_programs().lmplz.parent)')"/* /usr/local/bin
rm -rf ~/.cache/megacpt
python -m megacpt.env
SCRIPT

CMD ["bash"]
