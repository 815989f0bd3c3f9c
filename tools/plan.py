"""What a configuration will read, before anything runs: per pass and source, in documents and tokens.

    python tools/plan.py --config FILE [section.key=value ...]

Everything is worked out by the functions that training samples with; nothing is drawn from a distribution or estimated.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacpt.config.load import load_config
from megacpt.data.mixture.ledger import Entry, ledger, ledger_table, table
from megacpt.errors import UserError, exit_code
from megacpt.files import keep_apart, write_json


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration of a training run")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (default: the fewest that do)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    return parser.parse_intermixed_args(arguments)


def plan(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The tables as text and as plain values.

    Raises:
        UserError: whatever in the configuration or the data cannot work.
    """
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size {options.world_size}: give the number of ranks to plan for, at least 1")
    if options.json is not None:
        keep_apart([options.json], [Path(options.config)])
    # Late: a wrong key should be told before torch is loaded.
    config = load_config(options.config, options.overrides)
    from megacpt.data.samples.blended import BlendedDataset
    from megacpt.runtime.compiler import load_megatron_core
    from megacpt.runtime.engine import plans_for_gpu
    from megacpt.runtime.setup import quiet_third_parties

    quiet_third_parties()
    load_megatron_core()
    from megacpt.train.planning import make_plan

    model = config.model
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    made = make_plan(config, options.world_size or ranks, on_gpu=plans_for_gpu(config))
    mixture = made.mixture
    entries = ledger(mixture, BlendedDataset(mixture, made.corpora, made.vocabulary.size).streams)
    unread = unread_of(entries, {source.name: source.tokens for source in mixture.sources})
    lines = [table(mixture), *(f"note: {note}" for note in made.notes), "", ledger_table(entries), "", *told(unread)]
    values = {
        "steps": mixture.steps,
        "samples": mixture.stop,
        "tokens": sum(entry.tokens for entry in entries),
        "passes": [asdict(entry) | {"epochs": float(entry.epochs)} for entry in entries],
        "unread": {name: count for name, (count, _) in unread.items()},
    }
    return "\n".join(lines), values


def unread_of(entries: Sequence[Entry], sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Tokens of every source that the run never reads, and all it has."""
    read = {entry.source: entry.unique for entry in entries}
    return {name: (size - read.get(name, 0), size) for name, size in sizes.items()}


def told(unread: dict[str, tuple[int, int]]) -> list[str]:
    """A line for each source of which something is left out."""
    return [
        f"not read: {count:,} of the {size:,} tokens of {name} ({count / size:.2%})"
        for name, (count, size) in unread.items()
        if count
    ] or ["not read: nothing; every token of every source is read"]


def tell(options: argparse.Namespace) -> None:
    """Print the tables, and write them where that is asked for."""
    text, values = plan(options)
    print(text)
    if options.json is not None:
        write_json(options.json, values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    return exit_code(lambda: tell(options))


if __name__ == "__main__":
    sys.exit(main())
