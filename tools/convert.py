"""Hugging Face models in and out.

    python tools/convert.py import --hf DIR --output CKPT
    python tools/convert.py export --checkpoint CKPT[/iter_N] --output DIR

Either runs on one process or under torchrun. An import is compared with transformers before it is written (the gate).
The same command after an interruption goes on: an export keeps finished files, an import the verdict of the gate.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megacpt.config.tree import Model
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.compiler import load_megatron_core
from megacpt.runtime.setup import (
    Layout,
    die_with_launcher,
    exit_code_of_rank,
    quiet_third_parties,
    setup,
    teardown,
)
from megacpt.runtime.setup import world_size_from_environment as world_size

DTYPES = ("bf16", "fp32")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="a Hugging Face folder to a checkpoint for init.checkpoint")
    into.add_argument("--hf", type=Path, required=True, metavar="DIR", help="config.json and weights, or a GGUF file")
    into.add_argument("--output", type=Path, required=True, metavar="CKPT", help="folder for the checkpoint")
    into.add_argument("--dtype", choices=DTYPES, help="of the weights; default: bf16 where all of them are, else fp32")
    into.add_argument("--no-gate", action="store_true", help="do not compare with transformers; at your own risk")
    for name, what in (
        ("tensor", "ranks that share each matrix"),
        ("pipeline", "ranks that share the stack of layers"),
    ):
        into.add_argument(f"--{name}-model-parallel-size", type=int, default=1, metavar="N", help=what)
    out = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    out.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="a run, its checkpoints, or iter_*")
    out.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    out.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the checkpoint's")
    out.add_argument("--tokenizer", type=Path, metavar="DIR", help="take tokenizer files from here")
    out.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    return parser.parse_args(arguments)


@contextmanager
def progress(total: int, what: str) -> Iterator[Report]:
    """A bar over parameters, on the first rank's terminal; what an earlier start had done counts for no speed."""
    import tqdm

    hidden = not is_first_rank() or not sys.stderr.isatty()
    with tqdm.tqdm(total=total, desc=what, unit=" parameters", unit_scale=True, disable=hidden) as bar:

        def resumed(count: int, sentence: str) -> None:
            bar.clear()
            say(sentence)
            if not hidden:
                bar.initial += count
                bar.n += count
                bar.last_print_n += count
                bar.refresh()

        yield Report(bar.update, resumed)


def is_first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that --dtype names; None where it names none."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[name]


def say(text: str, stream: str = "stdout") -> None:
    """Print once, whatever the number of ranks."""
    if is_first_rank():
        print(text, file=getattr(sys, stream), flush=True)


def import_(options: argparse.Namespace) -> None:
    """Import, gate, save."""
    load_megatron_core()
    from megacpt.model.hf.reference import require_transformers
    from megacpt.train.exchange import Conversion, check_import_layout, import_model
    from megacpt.train.origin import open_hf

    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    model = Model(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    layout = Layout(world_size(), tp, pp)
    layout.check()
    if not options.no_gate:
        require_transformers()
    origin = open_hf(options.hf)
    check_import_layout(origin, model, options.output)
    setup(layout, seed=0)
    dtype = dtype_of(options.dtype)
    with progress(origin.architecture.parameters // (tp * pp), "import") as report:
        job = Conversion(options.output, dtype, gate=not options.no_gate)
        folder, verdict = import_model(origin, model, job, report)
    if verdict is None:
        say(f"warning: NO GATE: whether {folder} computes what {options.hf} does has not been checked", "stderr")
    else:
        say(str(verdict))
    say(f"{folder}: {origin.architecture.parameters:,} parameters; train from it with init.checkpoint={options.output}")


def export(options: argparse.Namespace) -> None:
    """Export."""
    load_megatron_core()
    from megacpt.train.exchange import HFOutput, architecture_in, checkpoint_at, export_checkpoint

    checkpoint = checkpoint_at(options.checkpoint)
    if world_size() > 1:
        setup(Layout(world_size()), seed=0)
    dtype = dtype_of(options.dtype)
    output = HFOutput(options.output, dtype, options.tokenizer, int(options.shard_gb * 1e9))
    with progress(architecture_in(checkpoint).parameters // world_size(), "export") as report:
        export_checkpoint(checkpoint, output, report)
    say(f"{options.output}: {architecture_in(checkpoint).parameters:,} parameters from {checkpoint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    die_with_launcher()
    quiet_third_parties()
    try:
        return exit_code_of_rank(lambda: (import_ if options.command == "import" else export)(options))
    finally:
        teardown()


if __name__ == "__main__":
    sys.exit(main())
