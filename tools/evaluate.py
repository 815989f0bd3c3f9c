"""Tasks of lm-evaluation-harness on a checkpoint, without converting it.

    python tools/evaluate.py --checkpoint runs/medical --tasks medical-table1,lambada_openai --task-data DIR
    torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint CKPT --tasks general-10 --tensor-model-parallel-size 2

Items come from local files (--task-data, or MEGACPT_TASK_DATA); nothing is fetched. RESULTS.json gets the numbers,
RESULTS.jsonl beside it a record of each item, and --compare takes such a file to test differences on the same items.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.eval.suites import GROUPS, SUITES, select
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a run, its checkpoints, or iter_*")
    subject.add_argument("--hf", type=Path, metavar="DIR", help="or a Hugging Face folder, or that of a GGUF file")
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"tasks and suites ({', '.join(SUITES)})")
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="a suite; may be repeated")
    parser.add_argument(
        "--task-data",
        type=Path,
        default=os.environ.get("MEGACPT_TASK_DATA"),
        metavar="DIR",
        help="TASK.jsonl[.gz] files (default: MEGACPT_TASK_DATA)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N items of each task")
    parser.add_argument("--output", type=Path, metavar="RESULTS.json", help="write results there")
    parser.add_argument("--compare", type=Path, metavar="ITEMS.jsonl", help="pair with an earlier evaluation's items")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="instead of the checkpoint's own")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights; default: the checkpoint's")
    parser.add_argument("--max-length", type=positive, metavar="N", help="longest input; default: what the model takes")
    parser.add_argument(
        "--batch-tokens", type=positive, default=8192, metavar="N", help="of a micro-batch (default 8192)"
    )
    for name, what in (("tensor", "ranks that share each matrix"), ("pipeline", "ranks that share the layers")):
        parser.add_argument(f"--{name}-model-parallel-size", type=positive, default=1, metavar="N", help=what)
    parser.add_argument(
        "--context-parallel-size", type=positive, default=1, metavar="N", help="ranks that share each text"
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="shard norms over the sequence within TP")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number


def run(options: argparse.Namespace) -> None:
    """Check, load, evaluate, write, tell."""
    names = [name for name in (*options.tasks.split(","), *options.suite) if name]
    if not names:
        raise UserError(f"no task to run; give --tasks a,b or --suite NAME ({', '.join(SUITES)})")
    if options.task_data is None:
        raise UserError("no folder of task data; give --task-data DIR, or set MEGACPT_TASK_DATA")
    load_megatron_core()
    from megacpt.eval.results import error_row, line_of, read_items, rows_of, write_items
    from megacpt.eval.task_data import TaskData
    from megacpt.eval.tasks import check_tasks, evaluate_tasks

    selection, data = select(names), TaskData(options.task_data)
    absent = check_tasks(selection.tasks, data, [name for name in names if name not in (*SUITES, *GROUPS)])
    base = read_items(options.compare) if options.compare is not None else None
    if options.output is not None and options.output.suffix != ".json":
        raise UserError(f"--output {options.output}: name a .json file; the items go to a .jsonl beside it")

    from megacpt.eval.live import LiveModel
    from megacpt.train.live import checkpoint_subject, codec_of, hf_subject

    model = Model(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        context_parallel_size=options.context_parallel_size,
        sequence_parallel=options.sequence_parallel,
    )
    layout = Layout(
        world_size(),
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        context=model.context_parallel_size,
    )
    layout.check()
    if options.checkpoint is not None:
        subject = checkpoint_subject(options.checkpoint, options.dtype)
    else:
        subject = hf_subject(options.hf, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        codec = codec_of(subject, options.tokenizer, Path(scratch))
    setup(layout, seed=0)
    longest = min(options.max_length or sys.maxsize, subject.architecture.max_position_embeddings)
    live = LiveModel(subject.build(model), longest, options.batch_tokens)
    began = time.perf_counter()
    evaluation = evaluate_tasks(live, codec, [t for t in selection.tasks if t not in absent], data, options.limit)
    if evaluation is None:
        return
    rows = rows_of(evaluation, selection, base, None)
    rows += [error_row(task, f"{data.folder} holds no items of it") for task in absent]
    for row in rows:
        print(line_of(row))
    print(f"{sum(len(r.items) for r in evaluation.results.values()):,} items in {time.perf_counter() - began:.1f} s")
    if options.output is not None:
        write_results(options, rows)
        write_items(options.output.with_suffix(".jsonl"), evaluation)
        print(f"wrote {options.output} and {options.output.with_suffix('.jsonl')}")


def write_results(options: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """The rows, with what was evaluated and how."""
    from megacpt.files import write_json
    from megacpt.runtime.environment import version_of, versions

    write_json(
        options.output,
        {
            "subject": str(options.checkpoint or options.hf),
            "limit": options.limit,
            "versions": versions() | {"lm_eval": version_of("lm_eval")},
            "rows": rows,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    die_with_launcher()
    quiet_third_parties()
    try:
        return exit_code_of_rank(lambda: run(options))
    finally:
        teardown()


if __name__ == "__main__":
    sys.exit(main())
