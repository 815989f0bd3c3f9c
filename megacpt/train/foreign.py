"""Checkpoints that megacpt did not write: whether they are safe to read, and of this run's model.

A torch_dist checkpoint holds two kinds of pickles: `.metadata`, which describes the tensors, and the common state, in
which Megatron-LM keeps its arguments. torch reads both with a plain unpickler, which runs whatever a file asks for.
Here both are first read by restricted ones; what those accept is harmless to read again. Neither needs a process group.
"""

import dataclasses
import enum
import io
import pickle
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint.metadata import Metadata

from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.model.spec import CHECKPOINT_NAMES

COMMON = "common_state/shard_0_1"
"""megatron-core's name of the common state within a checkpoint; older ones have it in LEGACY_COMMON."""
LEGACY_COMMON = "common.pt"
DESCRIPTIONS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Modules whose dataclasses and enumerations `.metadata` is made of."""
PLAIN = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if "." not in name and ((module, name) in PLAIN or module.startswith(DESCRIPTIONS)):
            found = super().find_class(module, name)
            if (module, name) in PLAIN or dataclasses.is_dataclass(found) or isinstance(found, enum.EnumType):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a checkpoint says of itself: shapes of whole tensors by name, and Megatron-LM's arguments, if any."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    args: Namespace


def read_foreign(folder: Path) -> Foreign:
    """Read a torch_dist checkpoint's description and arguments; runs no code that it holds.

    Raises:
        UserError: another format, damaged, or a pickle that asks for more than data.
    """
    if not (folder / ".metadata").is_file():
        kind = "Megatron-LM's older format" if list(folder.glob("mp_rank_*")) else "no torch_dist checkpoint"
        raise UserError(
            f"init.checkpoint {folder}: {kind}; save it with Megatron-LM's --ckpt-format torch_dist "
            "(--ckpt-convert-format converts)"
        )
    description = _description(folder)
    tensors = {key: entry for key, entry in description.state_dict_metadata.items() if hasattr(entry, "size")}
    args = _common_state(folder, description).get("args")
    return Foreign(
        folder,
        {key: tuple(entry.size) for key, entry in tensors.items()},
        args if isinstance(args, Namespace) else Namespace(),
    )


def _description(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with open(path, "rb") as handle:
            description = _DescriptionUnpickler(handle).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: asks for {error}, which no description of tensors needs; do not use this checkpoint"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}); choose another checkpoint") from error
    if not isinstance(description, Metadata):
        raise UserError(f"{path}: describes no checkpoint; choose another one")
    return description


def _common_state(folder: Path, description: Metadata) -> dict[str, Any]:
    legacy = folder / LEGACY_COMMON
    if legacy.is_file():
        return _as_dict(_load_safely(legacy, 0, None))
    places = [place for index, place in description.storage_data.items() if index.fqn == COMMON]
    states = [_load_safely(folder / place.relative_path, place.offset, place.length) for place in places]
    return _as_dict(states[0]) if states else {}


def _as_dict(state: Any) -> dict[str, Any]:
    state = state[0] if isinstance(state, list) and state else state
    return state if isinstance(state, dict) else {}


def _load_safely(path: Path, offset: int, length: int | None) -> Any:
    """What torch and megatron-core have on their lists of harmless classes, and nothing else."""
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            content = io.BytesIO(handle.read(-1 if length is None else length))
        state = torch.load(content, map_location="cpu", weights_only=True)
        return torch.load(state, map_location="cpu", weights_only=True) if isinstance(state, io.BytesIO) else state
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))
        if unsafe:
            raise UserError(
                f"{path}: its common state holds a {unsafe[1]}, which is not safe to read; save the checkpoint again "
                "without it"
            ) from error
        raise UserError(f"{path}: damaged ({type(error).__name__}); choose another checkpoint") from error


REQUIRED: dict[str, tuple[Any, ...]] = {
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "add_qkv_bias": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "multi_latent_attention": (False,),
    "num_experts": (None,),
    "mtp_num_layers": (None,),
    "hybrid_layer_pattern": (None,),
    "use_mup": (False,),
}
"""Megatron-LM's arguments that make a model which megacpt lacks, and what they must be where a checkpoint has them."""
SHARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "untie_embeddings_and_output_weights",
    "rotary_base",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "rotary_percent",
)
"""Arguments that are also keys of `model`."""


def check_foreign(foreign: Foreign, architecture: Architecture) -> None:
    """Refuse a checkpoint whose arguments or vocabulary are another model's; what it does not say, shapes tell later.

    Raises:
        UserError: the first difference.
    """
    args = vars(foreign.args)
    for name, allowed in REQUIRED.items():
        if name in args and args[name] not in allowed:
            raise UserError(
                f"init.checkpoint {foreign.folder}: was trained with {name}={args[name]}, megacpt's model needs "
                f"{allowed[-1]}; choose another checkpoint"
            )
    if not args.get("swiglu", True) and args.get("bias_gelu_fusion", False):
        raise UserError(
            f"init.checkpoint {foreign.folder}: was trained with bias_gelu_fusion=True, whose GELU is approximate, and "
            "megacpt's is exact; choose another checkpoint"
        )
    for name, value in _stated(args).items():
        if value != getattr(architecture, name):
            raise UserError(
                f"init.checkpoint {foreign.folder}: its {name} is {value}, this run's model.{name} is "
                f"{getattr(architecture, name)}; make them equal or choose another checkpoint"
            )
    rows = foreign.shapes.get("embedding.word_embeddings.weight", (architecture.vocab_size,))[0]
    if rows < architecture.vocab_size:
        raise UserError(
            f"init.checkpoint {foreign.folder}: has {rows:,} rows of vocabulary, this run needs "
            f"{architecture.vocab_size:,}; use its own tokenizer, or correct model.vocab_size"
        )


def _stated(args: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model` that Megatron-LM's arguments tell, with their values."""
    told = {name: args.get(name) for name in SHARED}
    told["norm_epsilon"] = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    if "group_query_attention" in args:
        told["num_query_groups"] = args.get(
            "num_query_groups" if args["group_query_attention"] else "num_attention_heads"
        )
    told = {name: value for name, value in told.items() if value is not None}
    if args:
        # Megatron-LM has none.
        told["use_parallel_residual"] = False
    if "use_rope_scaling" in args:
        told["rope_scaling_factor"] = args.get("rope_scaling_factor", 8.0) if args["use_rope_scaling"] else None
    return told


def holds_layers_one_by_one(names: Collection[str]) -> bool:
    """Whether a checkpoint has `decoder.layers.0.x` and so on, instead of one `decoder.layers.x` for all layers."""
    return any(re.match(r"decoder\.layers\.\d+\.", name) for name in names)


def take_stored_names(model_state: dict[str, Any], names: Collection[str]) -> None:
    """Rename the norms in a sharded state dict where a checkpoint has them under their own modules' names."""
    for shard in nested_values(model_state):
        if isinstance(shard, ShardedBase) and shard.key not in names:
            for local, fused in CHECKPOINT_NAMES.items():
                if shard.key.replace(fused, local) in names:
                    shard.key = shard.key.replace(fused, local)
