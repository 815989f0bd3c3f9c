"""Foreign checkpoints: what is not safe to read, not torch_dist, or another model's is refused in one sentence."""

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.train.foreign import COMMON, Foreign, check_foreign, read_foreign

SHAPE = Architecture(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    rotary_base=10_000.0,
    rope_scaling_factor=None,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    max_position_embeddings=512,
    vocab_size=500,
)
ARGS = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 12,
    "rotary_base": 10_000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "layernorm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "num_experts": None,
}
ROWS = {"embedding.word_embeddings.weight": (512, 48)}


class Command:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _check(shapes: Mapping[str, tuple[int, ...]] = ROWS, **changes: Any) -> None:
    check_foreign(Foreign(Path("base/iter_0000005"), shapes, Namespace(**ARGS | changes)), SHAPE)


def test_the_same_model() -> None:
    _check()
    _check(group_query_attention=True, kv_channels=None, rotary_base=None)
    check_foreign(Foreign(Path("base"), {}, Namespace()), SHAPE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 2}, "its num_layers is 2, this run's model.num_layers is 4"),
        ({"hidden_size": 64}, "its hidden_size is 64"),
        ({"ffn_hidden_size": 128}, "its ffn_hidden_size is 128"),
        ({"num_attention_heads": 8}, "its num_attention_heads is 8"),
        ({"num_query_groups": 4}, "its num_query_groups is 4"),
        ({"group_query_attention": False}, "its num_query_groups is 4, this run's model.num_query_groups is 2"),
        ({"kv_channels": 16}, "its kv_channels is 16"),
        ({"untie_embeddings_and_output_weights": False}, "its untie_embeddings_and_output_weights is False"),
        ({"rotary_base": 500_000}, "its rotary_base is 500000"),
        ({"use_rope_scaling": True}, "its rope_scaling_factor is 8.0, this run's model.rope_scaling_factor is None"),
        ({"layernorm_epsilon": 1e-6}, "its norm_epsilon is 1e-06"),
        ({"normalization": "LayerNorm"}, "its normalization is LayerNorm, this run's model.normalization is RMSNorm"),
        ({"swiglu": False}, "its swiglu is False"),
        ({"swiglu": False, "bias_gelu_fusion": True}, "bias_gelu_fusion=True, whose GELU is approximate"),
        ({"swiglu": False, "squared_relu": True}, "trained with squared_relu=True, megacpt's model needs False"),
        ({"add_bias_linear": True}, "its add_bias_linear is True"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned_absolute"),
        ({"rotary_percent": 0.25}, "its rotary_percent is 0.25, this run's model.rotary_percent is 1.0"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"shapes": {"embedding.word_embeddings.weight": (384, 48)}}, "384 rows of vocabulary, this run needs 500"),
    ],
)
def test_another_model(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        _check(**changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_gate_and_with_biases() -> None:
    variant = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "rotary_percent": 0.5}
    shape = Architecture(**vars(SHAPE) | variant)
    stated = Foreign(Path("base"), ROWS, Namespace(**ARGS | variant | {"bias_gelu_fusion": False}))
    check_foreign(stated, shape)
    parallel = Architecture(**vars(shape) | {"use_parallel_residual": True})
    with pytest.raises(UserError, match=r"its use_parallel_residual is False, this run's .* is True"):
        check_foreign(stated, parallel)
    check_foreign(Foreign(Path("base"), ROWS, Namespace()), parallel)


def test_scaled_rotary_phases_against_none() -> None:
    scaled = replace(SHAPE, rope_scaling_factor=8.0)
    with pytest.raises(UserError, match=r"its rope_scaling_factor is None, this run's .* is 8\.0"):
        check_foreign(Foreign(Path("base"), ROWS, Namespace(**ARGS)), scaled)


def _describe(folder: Path, state: Any = None) -> None:
    """A checkpoint without tensors whose common state is what torch.save makes of `state`."""
    content = io.BytesIO()
    torch.save([state], content)
    (folder / "__0_0.distcp").write_bytes(content.getvalue())
    place = {MetadataIndex(COMMON): _StorageInfo("__0_0.distcp", 0, len(content.getvalue()))}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=place)))


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_foreign(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_arguments_are_read(tmp_path: Path) -> None:
    _describe(tmp_path, {"args": Namespace(**ARGS, params_dtype=torch.bfloat16)})
    assert read_foreign(tmp_path).args.params_dtype is torch.bfloat16
    torch.save({"args": Namespace(hidden_size=64)}, tmp_path / "common.pt")
    assert read_foreign(tmp_path).args == Namespace(hidden_size=64)


def test_commands_in_pickles_do_not_run(tmp_path: Path) -> None:
    command = Command(f"touch {tmp_path / 'ran'}")
    _describe(tmp_path, {"args": Namespace(evil=command)})
    assert "holds a posix.system, which is not safe to read" in _refusal(tmp_path)
    torch.save({"args": command}, tmp_path / "common.pt")
    assert "holds a posix.system, which is not safe to read" in _refusal(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=command)))
    assert "asks for posix.system, which no description of tensors needs" in _refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch", "load"),
    ],
)
def test_ways_around_the_list(tmp_path: Path, module: str, name: str) -> None:
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + words + b"\x93.")
    assert f"asks for {module}.{name}" in _refusal(tmp_path)


def test_other_formats_and_damage(tmp_path: Path) -> None:
    assert "no torch_dist checkpoint" in _refusal(tmp_path)
    (tmp_path / "mp_rank_00").mkdir()
    assert "Megatron-LM's older format" in _refusal(tmp_path)
    _describe(tmp_path, {"args": Namespace(**ARGS)})
    (tmp_path / "__0_0.distcp").write_bytes(b"PK")
    assert "__0_0.distcp: damaged" in _refusal(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04")
    assert ".metadata: damaged" in _refusal(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    assert "describes no checkpoint" in _refusal(tmp_path)
