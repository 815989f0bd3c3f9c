"""Measure megacpt beside its peers, in one run on one machine: rows to benchmarks/*.csv, and benchmarks/README.md.

    python tools/bench.py data --input TEXT.jsonl --tokenizer-type TYPE --tokenizer-model FILE [--megatron CHECKOUT]
    python tools/bench.py kernels
    python tools/bench.py train [--cases tiny smollm2-135m]
    python tools/bench.py checkpoint
    python tools/bench.py all --minutes 9

data: preprocessing, scoring (with --kenlm), the index, reading. kernels (on a GPU): time on the device, beside torch,
torch.compile, Liger, megatron-core and Transformer Engine, as far as installed. train: steps beside Hugging Face
Trainer and megatron-core's own specs, same weights, same batches. checkpoint: written and read, beside torch.save.
all: all of it, data if its input is given and the smallest checkpoint, as much as fits the time. Whoever computes or
writes something else than the reference has no speed. A row is in its file as soon as it is measured.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megacpt.bench.rows import DATA_PARTS, Recorder, describe_device, write_readme
from megacpt.errors import UserError, exit_code

Part = Callable[[argparse.Namespace, Path, Recorder], None]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(tune=False)
    commands = parser.add_subparsers(dest="command", required=True)
    _data_options(commands.add_parser("data", help="preprocessing, scoring, index and reading"), required=True)
    kernels = commands.add_parser("kernels", help="our kernels beside others'")
    kernels.add_argument(
        "--tune", action="store_true", help="first measure the launches that kernels/configs/DEVICE.json has not yet"
    )
    steps = commands.add_parser("train", help="training steps")
    _case_options(steps)
    _step_options(steps)
    checkpoints = commands.add_parser("checkpoint", help="checkpoints written and read")
    _case_options(checkpoints)
    everything = commands.add_parser("all", help="kernels (on a GPU), checkpoint, data (with --input) and train")
    _data_options(everything, required=False)
    _case_options(everything)
    _step_options(everything)
    for command in (kernels, steps, checkpoints, everything):
        usual = 9.0 if command is everything else float("inf")
        words = "begin nothing more after so long, and end training or a checkpoint that goes on"
        command.add_argument("--minutes", type=float, default=usual, metavar="M", help=words)
    for command in commands.choices.values():
        command.add_argument("--work", type=Path, metavar="DIR", help="folder for what is written meanwhile")
        command.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="DIR", help="of the rows")
    options = parser.parse_args(arguments)
    options.deadline = time.monotonic() + 60 * getattr(options, "minutes", float("inf"))
    return options


def _data_options(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    add("--input", type=Path, required=required, metavar="TEXT.jsonl", help="text with the key `text`, uncompressed")
    add("--tokenizer-type", required=required, choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"))
    add("--tokenizer-model", type=Path, required=required, metavar="FILE")
    add("--only", nargs="+", choices=DATA_PARTS, default=DATA_PARTS, help="parts to measure")
    add("--megatron", type=Path, metavar="CHECKOUT", help="Megatron-LM's sources, for tools/preprocess_data*.py")
    add("--kenlm", type=Path, metavar="MODEL", help="a model of tools/train_kenlm.py, for scoring")
    add("--documents", type=float, default=50e6, metavar="N", help="of the index (default 50 million)")
    add("--sources", type=int, default=100, metavar="N", help="of the index")
    add("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="most cores to use")


def _case_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", nargs="+", metavar="NAME", help="models by name (default: this device's; see bench/train_case.py)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")


def _step_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=10, metavar="N", help="of each contestant in a round, the first three not timed")
    add("--rounds", type=int, metavar="N", help="how often each contestant has its turn (default: 1 on a GPU, else 3)")


def data(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    """Measure what --only names.

    Raises:
        UserError: an input is missing, or a tool fails.
    """
    if not options.input.is_file():
        raise UserError(f"{options.input}: no such file; give --input a JSONL file")
    if "preprocess" in options.only:
        from megacpt.bench import preprocess

        case = preprocess.Case(
            options.input, options.tokenizer_type, options.tokenizer_model, work / "preprocess", options.megatron
        )
        preprocess.measure(recorder, case, options.cores)
    if "scoring" in options.only and options.kenlm is not None:
        from megacpt.bench import scoring

        scoring.measure(recorder, options.input, options.kenlm, 20)
    if "index" in options.only:
        from megacpt.bench import index

        index.measure(recorder, work / "index", int(options.documents), options.sources)
    if "read" in options.only:
        from megacpt.bench import preprocess, read

        case = preprocess.Case(options.input, options.tokenizer_type, options.tokenizer_model, work / "read")
        case.folder.mkdir(parents=True, exist_ok=True)
        command, prefix = preprocess.ours(case, options.input, 1)
        preprocess.timed(command, options.cores)
        read.measure(recorder, prefix, 2048)


def kernels(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    """Measure kernels.

    Raises:
        UserError: there is no GPU, the launches cannot be written, or a kernel of ours fails.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("kernels are timed on a GPU, and there is none here; `make test` checks what they compute")
    from megacpt.bench import kernels as device_times
    from megacpt.runtime.setup import Layout, setup, teardown

    # megatron-core's cross-entropy wants its groups.
    device = setup(Layout(1), seed=0).device
    try:
        if options.tune:
            from megacpt.bench.tuning import tune_all

            print(f"launches in {tune_all(device, options.deadline)}")
        from megacpt.bench.kernel_cases import gpu_cases

        device_times.measure(recorder, gpu_cases(), device, torch.bfloat16, deadline=options.deadline)
    finally:
        teardown()


def train(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    """Measure training steps."""
    from megacpt.bench import train as steps

    rounds, dtype = options.rounds or steps.usual_rounds(), options.dtype or steps.usual_dtype()
    run = steps.Run(options.steps, rounds, dtype, options.deadline)
    steps.measure(recorder, steps.chosen(options.cases), run, work)


def checkpoint(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    """Measure checkpoints."""
    from megacpt.bench import checkpoint as checkpoints
    from megacpt.bench import train as steps

    names = steps.chosen(options.cases) if options.cases else checkpoints.usual_cases()
    checkpoints.measure(recorder, names, options.dtype or steps.usual_dtype(), work, options.deadline)


def everything(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    """What is short first, then training steps until the time is up. A part that fails does not stop the others.

    Raises:
        UserError: at the end, what the first of them said.
    """
    failed = []
    for part in (kernels, _smallest_checkpoint, data, train):
        if reason := _left_out(part, options):
            print(f"{part.__name__.removeprefix('_')}: not measured, {reason}")
            continue
        try:
            part(options, work, recorder)
        except UserError as error:
            print(f"{part.__name__.removeprefix('_')}: {error}", file=sys.stderr)
            failed.append(error)
    if failed:
        raise failed[0]


def _smallest_checkpoint(options: argparse.Namespace, work: Path, recorder: Recorder) -> None:
    from megacpt.bench import checkpoint as checkpoints
    from megacpt.bench import train as steps

    dtype = options.dtype or steps.usual_dtype()
    checkpoints.measure(recorder, [checkpoints.SMALLEST], dtype, work, options.deadline)


def _left_out(part: Part, options: argparse.Namespace) -> str | None:
    """Why `all` leaves a part out, if it does."""
    import torch

    if part is kernels and not torch.cuda.is_available():
        return "for there is no GPU here"
    if part is not data:
        return None
    if options.input is None or not options.tokenizer_type or not options.tokenizer_model:
        return "without --input, --tokenizer-type and --tokenizer-model"
    return "for the time was up" if time.monotonic() >= options.deadline else None


COMMANDS: dict[str, Part] = {
    "data": data,
    "kernels": kernels,
    "train": train,
    "checkpoint": checkpoint,
    "all": everything,
}


def record(options: argparse.Namespace) -> None:
    """Measure. Each row is written as it comes; what is measured by an error or Ctrl-C is told in the README too."""
    if options.command != "data":
        from megacpt.runtime.setup import quiet_third_parties

        quiet_third_parties()
    recorder = Recorder.begin(describe_device(with_gpu=options.command != "data"), options.output)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            COMMANDS[options.command](options, options.work or Path(temporary), recorder)
    finally:
        if recorder.rows:
            write_readme(options.output)
            print(f"{options.output}/README.md: {len(recorder.rows)} rows more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    return exit_code(lambda: record(options))


if __name__ == "__main__":
    # `timeout` and Slurm ask with SIGTERM: what was started is to end as well, and the README to be written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
