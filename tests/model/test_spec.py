"""Which class fills each slot of the layer specs."""

from dataclasses import fields
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.architecture import Architecture, resolve_architecture
from megacpt.config.check_engine import check_engine
from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.errors import UserError
from megacpt.model.build import BuildOptions, build_chunks, slot_classes, transformer_config, without_userbuffers
from megacpt.model.gpt import LanguageModel
from megacpt.model.layers import RotatingSelfAttention, SDPAttention, SwiGLU
from megacpt.model.spec import Slots, layer_spec, slots
from megacpt.model.userbuffers import make_userbuffers
from megacpt.runtime.engine import ENGINE, import_problem
from megacpt.runtime.setup import Layout, setup
from tests.jobs import NEOX, NOTHING, SHAPE, Section, small_config, start
from tests.ranks import run_ranks

LINEARS = "megatron.core.tensor_parallel.layers"
OURS = "megacpt.model.layers"
SELF_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
MEGATRON_LAYER = "megatron.core.transformer.transformer_layer.TransformerLayer"


def classes(config: Config) -> tuple[list[dict[str, str]], list[str | None]]:
    """Slots of every layer on this rank, and the class of each chunk's final norm."""
    chunks = start(config).chunks
    norms = [chunk.decoder.final_layernorm for chunk in chunks]
    names = [None if norm is None else f"{type(norm).__module__}.{type(norm).__qualname__}" for norm in norms]
    return [slot_classes(chunk) for chunk in chunks], names


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
@pytest.mark.parametrize(
    ("model", "layer", "norm"),
    [
        pytest.param(NOTHING, MEGATRON_LAYER, "RMSNorm", id="llama"),
        pytest.param(NEOX, f"{OURS}.ParallelResidualLayer", "LayerNorm", id="neox"),
        pytest.param({**NEOX, "use_parallel_residual": False}, MEGATRON_LAYER, "LayerNorm", id="neox-sequential"),
    ],
)
def test_class_in_every_slot(tmp_path: Path, pipeline_parallel: int, model: Section, layer: str, norm: str):
    activation = {"activation_func": f"{OURS}.SwiGLU"} if norm == "RMSNorm" else {}
    config = small_config(tmp_path, {**model, "pipeline_model_parallel_size": pipeline_parallel})
    results = run_ranks(classes, pipeline_parallel, config)
    for found, _ in results:
        assert found == [
            {
                "layer": layer,
                "input_layernorm": f"{OURS}.{norm}",
                "self_attention": f"{OURS}.RotatingSelfAttention",
                "linear_qkv": f"{LINEARS}.ColumnParallelLinear",
                "core_attention": f"{OURS}.SDPAttention",
                "linear_proj": f"{LINEARS}.RowParallelLinear",
                "pre_mlp_layernorm": f"{OURS}.{norm}",
                "linear_fc1": f"{LINEARS}.ColumnParallelLinear",
                "linear_fc2": f"{LINEARS}.RowParallelLinear",
            }
            | activation
        ]
    assert [norms for _, norms in results] == [[None]] * (pipeline_parallel - 1) + [[f"{OURS}.{norm}"]]


def test_our_kernels_fill_slots_by_themselves_on_a_cpu_alone(tmp_path: Path) -> None:
    """Nobody has measured that they win on a GPU."""
    default = small_config(tmp_path).model
    for ours in (default.own_swiglu, default.own_rope):
        assert ours(on_gpu=False)
        assert not ours(on_gpu=True)
    none = small_config(tmp_path, {"swiglu_fusion_impl": "native", "rope_fusion_impl": "native"})
    (((found,), _),) = run_ranks(classes, 1, none)
    assert "activation_func" not in found
    assert found["self_attention"] == SELF_ATTENTION


def test_our_kernels_fill_slots_when_they_are_asked_for(tmp_path: Path) -> None:
    asked = small_config(tmp_path, {"swiglu_fusion_impl": "megacpt", "rope_fusion_impl": "megacpt"})
    for engine in (False, True):
        filled = slots(small()[1], asked.model, engine=engine)
        assert (filled.activation, filled.self_attention) == (SwiGLU, RotatingSelfAttention)
        options = BuildOptions(torch.bfloat16, restart_positions=False, engine=engine)
        made = transformer_config(small()[1], asked.model, options)
        assert (made.use_te_activation_func, made.bias_activation_fusion, made.apply_rope_fusion) == (
            True,
            False,
            False,
        )


TE = "megatron.core.extensions.transformer_engine"
PROBLEM = import_problem(ENGINE)
needs_engine = pytest.mark.skipif(PROBLEM is not None, reason=f"{ENGINE} does not import here: {PROBLEM}")


def small(model: Section = NOTHING) -> tuple[Config, Architecture]:
    shape = dict(SHAPE) | {"hidden_size": 64, "ffn_hidden_size": 96, "num_query_groups": 4} | dict(model)
    tree = {
        "precision": {"dtype": "bf16"},
        "model": shape,
        "data": {"seq_length": 32, "sources": {"a": {"path": "a", "epochs": 1}}},
        "train": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "save": {"dir": "unused"},
    }
    config = config_from(tree, "test")
    return config, resolve_architecture(config.model, None)


def test_the_engine_fills_its_slots_by_name() -> None:
    """By name, for without the package megatron-core puts stand-ins there that are no classes."""
    import megatron.core.extensions.transformer_engine as te

    expected = {
        "self_attention": "SelfAttention",
        "activation": None,
        "norm": "IdentityOp",
        "final_norm": "TENorm",
        "column": "TELayerNormColumnParallelLinear",
        "row": "TERowParallelLinear",
        "attention": "TEDotProductAttention",
    }
    config, architecture = small()
    found = slots(architecture, config.model, engine=True)
    assert {field.name for field in fields(Slots)} == expected.keys()
    for slot, name in expected.items():
        if name is not None and name.startswith("TE"):
            assert getattr(found, slot) is getattr(te, name)
        else:
            assert getattr(getattr(found, slot), "__name__", None) == name
    assert not layer_spec(architecture, config.model, engine=True).submodules.sharded_state_dict_keys_map


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "SDPAttention"),
        ({"attention_backend": "unfused"}, "TEDotProductAttention"),
        ({"kv_channels": 24}, "TEDotProductAttention"),
    ],
)
def test_torch_attends_in_the_engine_where_no_fused_attention_takes_the_heads(keys: Section, name: str) -> None:
    import megatron.core.extensions.transformer_engine as te

    config, architecture = small({"kv_channels": 100} | keys)
    found = slots(architecture, config.model, engine=True).attention
    assert found is (SDPAttention if name == "SDPAttention" else te.TEDotProductAttention)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_core_accepts_what_the_check_accepts(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of the FP8 keys that are read: both refuse the same ones."""
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for fp8, outer, first, last in product(("hybrid", "e4m3"), (False, True), (0, 1, 4, 5), (0, 1, 5)):
        if not outer and (first, last) != (1, 1):
            continue
        config, architecture = small(
            {
                "fp8": fp8,
                "fp8_recipe": recipe,
                "first_last_layers_bf16": outer,
                "num_layers_at_start_in_bf16": first,
                "num_layers_at_end_in_bf16": last,
            }
        )
        options = BuildOptions(torch.bfloat16, restart_positions=False, engine=True)
        try:
            check_engine(config, architecture, engine=True, on_gpu=True, bf16=True)
        except UserError:
            with pytest.raises(ValueError, match=r"BF16|bf16"):
                transformer_config(architecture, config.model, options)
            continue
        made = transformer_config(architecture, config.model, options)
        assert (made.fp8, made.fp8_recipe, made.first_last_layers_bf16) == (fp8, recipe, outer)


@pytest.mark.parametrize("gathers", [False, True])
def test_fp8_parameters_are_built_of_zeros(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised as soon as they are there, whatever lies in fresh memory would be in the history of maxima."""
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    config, architecture = small({"fp8": "hybrid", "fp8_param_gather": gathers})
    made = transformer_config(architecture, config.model, BuildOptions(torch.bfloat16, False, engine=True))
    assert made.fp8_param is gathers
    assert made.perform_initialization is gathers
    if gathers:
        for draw in (made.init_method, made.output_layer_init_method, made.embedding_init_method):
            assert draw is not None
            assert not draw(torch.ones(2, 2)).any()


def built(model: Section, *, engine: bool) -> LanguageModel:
    """Built on a CPU that passes for a GPU host if `engine`; set up before."""
    config, architecture = small(model)
    torch.cuda.is_available = lambda: engine
    options = BuildOptions(torch.bfloat16, restart_positions=False, engine=engine)
    made = transformer_config(architecture, config.model, options)
    made.use_cpu_initialization = True
    (chunk,) = build_chunks(architecture, config.model, made, options)
    return chunk


def engine_model(model: Section) -> dict[str, Any]:
    """Slots, checkpoint keys and shapes of both implementations."""
    torch.manual_seed(0)
    setup(Layout(1), 1, threads=1)
    found: dict[str, Any] = {}
    for engine in (False, True):
        chunk = built(model, engine=engine)
        state = {
            entry.key: tuple(entry.global_shape)
            for entry in chunk.sharded_state_dict().values()
            if "_extra_state" not in entry.key and hasattr(entry, "global_shape")
        }
        norm = type(chunk.decoder.final_layernorm)
        found[str(engine)] = slot_classes(chunk), f"{norm.__module__}.{norm.__qualname__}", state
        found[f"{engine} parameters"] = [tuple(p.shape) for p in chunk.parameters()]
    return found


@needs_engine
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_class_in_every_slot_of_the_engine(normalization: str) -> None:
    (found,) = run_ranks(engine_model, 1, {"normalization": normalization})
    classes_, norm, state = found["True"]
    assert classes_ == {
        "layer": MEGATRON_LAYER,
        "input_layernorm": "megatron.core.transformer.identity_op.IdentityOp",
        "self_attention": SELF_ATTENTION,
        "linear_qkv": f"{TE}.TELayerNormColumnParallelLinear",
        "core_attention": f"{TE}.TEDotProductAttention",
        "linear_proj": f"{TE}.TERowParallelLinear",
        "pre_mlp_layernorm": "megatron.core.transformer.identity_op.IdentityOp",
        "linear_fc1": f"{TE}.TELayerNormColumnParallelLinear",
        "linear_fc2": f"{TE}.TERowParallelLinear",
    }
    assert norm.startswith("transformer_engine.pytorch")
    assert norm.endswith(normalization)
    assert state == found["False"][2], "a checkpoint of one is a checkpoint of the other"


def userbuffers() -> list[list[bool]]:
    """Whether each layer's output goes through buffers: before, during and after a look at other batches."""
    setup(Layout(1), 1, threads=1)
    chunk = built(NOTHING, engine=True)
    projections = [layer.self_attention.linear_proj for layer in chunk.decoder.layers]
    # As its constructor leaves it on a GPU where tp_comm_overlap is set.
    for projection in projections:
        assert projection.ub_overlap_rs_fprop is False
        projection.ub_overlap_rs_fprop = True
    found = [[p.ub_overlap_rs_fprop for p in projections]]
    with without_userbuffers([chunk]):
        found.append([p.ub_overlap_rs_fprop for p in projections])
    return [*found, [p.ub_overlap_rs_fprop for p in projections]]


@needs_engine
def test_other_batches_than_a_step_s_do_without_userbuffers() -> None:
    ((before, during, after),) = run_ranks(userbuffers, 1)
    assert all(before)
    assert before == after
    assert not any(during)


@needs_engine
def test_parameters_are_counted_in_the_order_of_the_engine() -> None:
    from megacpt.train.memory import Setting, chunk_parameters

    (found,) = run_ranks(engine_model, 1, {})
    config, architecture = small()
    setting = Setting(config, architecture, Layout(1), torch.bfloat16, on_gpu=True, engine=True)
    expected = [p.numel for p in chunk_parameters(setting, 0, 0)]
    assert [torch.Size(shape).numel() for shape in found["True parameters"]] == expected


@needs_engine
def test_fp8_recipes_are_the_package_s() -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    names = {
        "delayed": "TEDelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    for recipe, name in names.items():
        config, architecture = small({"fp8": "hybrid", "fp8_recipe": recipe})
        made = transformer_config(architecture, config.model, BuildOptions(torch.bfloat16, False, engine=True))
        assert type(get_fp8_recipe(made)).__name__ == name


@needs_engine
def test_userbuffers_are_those_that_the_package_can_make(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch.module import base

    takes, asked = signature(base.initialize_ub), []
    monkeypatch.setattr(base, "initialize_ub", lambda **keys: asked.append(takes.bind(**keys).arguments))
    modes = base.UserBufferQuantizationMode
    for keys, expected in (
        ({}, [modes.NONE]),
        ({"fp8": "hybrid"}, [modes.FP8]),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, [modes.FP8, modes.NONE]),
    ):
        make_userbuffers(*small(keys))
        assert asked[-1]["shape"] == [32, 64]
        assert asked[-1]["quantization_modes"] == expected
