"""A run in which an evaluation raises inside the forward pass of one rank alone.

Arguments: that rank, then the command line of a run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.commands import forked_ranks


def assert_lost(rank: int, tree: dict[str, Any], folder: Path, *, torchrun: bool = False) -> None:
    """Start such a run on two ranks: it ends, not after the ten minutes of the group's timeout, with one sentence."""
    configuration = folder / "config.yaml"
    configuration.write_text(yaml.safe_dump(tree, sort_keys=False))
    if torchrun:
        said = _under_torchrun(rank, configuration)
    else:
        ranks = [one.wait(60) for one in forked_ranks(2, __file__, rank, "--config", configuration)]
        assert [one.returncode for one in ranks] == [2, 2], ranks
        said = "".join(one.stderr for one in ranks)
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        f"error: evaluation failed on rank {rank} alone, inside a forward pass in which others wait for it for good "
        "(RuntimeError: planted); start the same command again"
    ]


def _under_torchrun(rank: int, configuration: Path) -> str:
    """What is written to stderr, where a rank that ends alone has the other ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    result = subprocess.run(
        [*launcher, str(rank), "--config", str(configuration)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert "exitcode: 2" in result.stderr
    return result.stderr


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
