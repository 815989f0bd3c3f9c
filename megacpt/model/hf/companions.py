"""The small files of a Hugging Face model: which there are, and the card of an exported one."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Small files that belong to a model besides its weights."""


def copy_companions(source: Path | None, folder: Path, skip: Sequence[str] = ()) -> None:
    """Copy the small files of a Hugging Face folder."""
    for name in COMPANIONS if source is not None else ():
        assert source is not None
        if name not in skip and (source / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def model_card(base: str | None, state: Mapping[str, Any] | None, checkpoint: Path, version: str) -> str:
    """README.md of an exported model: where its weights come from.

    Args:
        state: what megacpt.json in the checkpoint holds, or None where nothing was trained.
    """
    front = {"library_name": "transformers", "tags": ["megacpt", "continual-pretraining"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", "# Model card", ""]
    lines += [f"Written by megacpt {version} from checkpoint `{checkpoint.name}`.", "", "| what | value |", "|---|---|"]
    lines += [f"| base model | {base or 'none: trained from fresh weights'} |"]
    if state is None or not state["iteration"]:
        return "\n".join([*lines, "| training | none: the base model's weights |", ""])
    lines += [
        f"| steps | {state['iteration']:,} |",
        f"| samples | {state['consumed_samples']:,} |",
        f"| data fingerprint | `{state['data']}` |",
    ]
    lines += [f"| tokens of {name} | {count:,} |" for name, count in state["tokens_by_source"].items()]
    return "\n".join([*lines, ""])
