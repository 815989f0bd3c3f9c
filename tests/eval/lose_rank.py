"""A run in which an evaluation raises inside the forward pass of one rank alone; torchrun starts it.

Arguments: that rank, then the command line of a run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def assert_lost(rank: int, tree: dict[str, Any], folder: Path) -> None:
    """Start such a run on two ranks: it ends, not after the ten minutes of the group's timeout, with one sentence."""
    configuration = folder / "config.yaml"
    configuration.write_text(yaml.safe_dump(tree, sort_keys=False))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    result = subprocess.run(
        [*launcher, str(rank), "--config", str(configuration)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert told == [
        f"error: evaluation failed on rank {rank} alone, inside a forward pass in which others wait for it for good "
        "(RuntimeError: planted); start the same command again"
    ]
    assert "exitcode: 2" in result.stderr


def main() -> int:
    """The exit code of this rank."""
    from megacpt.eval import agreement, scoring, validation
    from megacpt.train.__main__ import main as train

    def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    agreement.PATIENCE_S = 2.0
    if os.environ["RANK"] == sys.argv[1]:
        validation.score_micro_batches = scoring._run = crash
    return train(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
