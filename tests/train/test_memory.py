"""Memory by arithmetic against what a real model on real ranks allocates."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.config.architecture import resolve_architecture
from megacpt.config.check import check_config
from megacpt.config.load import config_from
from megacpt.runtime.setup import Layout
from megacpt.train.memory import Setting, checkpoint_bytes, chunk_parameters, gathered_bytes, stage_state
from megacpt.train.memory_table import memory_table, size
from megacpt.train.peak import peak, stage_peak, warm_up
from tests.ranks import run_ranks
from tests.train.memory_meter import Meter, allocated, settle_collectives

ACTIVATIONS = 0.02
"""Relative tolerance of what waits for its backward: token ids, masks of the embedding, random states are left out."""
TOTAL = 0.03
"""Relative tolerance of the most that is allocated, random states and what is widened at a time included."""

SHAPE = {
    "num_layers": 4,
    "hidden_size": 96,
    "ffn_hidden_size": 200,
    "num_attention_heads": 12,
    "num_query_groups": 2,
    "rotary_base": 10000.0,
    "norm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
    "make_vocab_size_divisible_by": 16,
}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = DISTRIBUTED | {"overlap_grad_reduce": True}


def setting(world: int, dtype: str = "fp32", **sections: dict[str, Any]) -> Setting:
    """A small run on `world` ranks."""
    model = SHAPE | sections.get("model", {})
    tree = {
        "precision": {"dtype": dtype} | sections.get("precision", {}),
        "model": model,
        "data": {"seq_length": 64, "sources": {"a": {"path": "a", "epochs": 1}}} | sections.get("data", {}),
        "train": {"global_batch_size": 8, "micro_batch_size": 2} | sections.get("train", {}),
        "optimizer": {"lr": 1e-3} | sections.get("optimizer", {}),
        "save": {"dir": "unused"},
    }
    config = config_from(tree, "test")
    layout = Layout(
        world,
        config.model.tensor_model_parallel_size,
        config.model.pipeline_model_parallel_size,
        config.model.virtual_pipeline_model_parallel_size,
        config.model.context_parallel_size,
    )
    architecture = resolve_architecture(config.model, None)
    check_config(config, architecture)
    return Setting(config, architecture, layout, torch.bfloat16 if dtype == "bf16" else torch.float32)


class Ledger:
    """Bytes of the storages that autograd and the schedule hold, each counted once while anything holds it."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters = parameters
        self.holders: dict[int, int] = {}
        self.live = self.most = 0

    def enter(self, tensor: torch.Tensor) -> "Entry":
        return Entry(self, tensor)


class Entry:
    """One reason to hold a tensor; leaves the ledger when it is collected."""

    def __init__(self, ledger: Ledger, tensor: torch.Tensor, keep: bool = True) -> None:
        storage = tensor.untyped_storage()
        self.ledger, self.key, self.size = ledger, storage.data_ptr(), storage.nbytes()
        self.tensor = tensor if keep else None
        if self.key in ledger.parameters:
            return
        if not ledger.holders.get(self.key):
            ledger.live += self.size
            ledger.most = max(ledger.most, ledger.live)
        ledger.holders[self.key] = ledger.holders.get(self.key, 0) + 1

    def __del__(self) -> None:
        if self.key not in self.ledger.parameters:
            self.ledger.holders[self.key] -= 1
            self.ledger.live -= 0 if self.ledger.holders[self.key] else self.size


def hold_output(ledger: Ledger, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """The schedule keeps a chunk's output as long as this tensor object lives."""
    output.entry = Entry(ledger, output, keep=False)  # type: ignore[attr-defined]


def measure(where: Setting) -> dict[str, int]:
    """Build, wrap and train two steps on this rank; what was allocated, in elements and bytes."""
    from megatron.core import parallel_state

    from megacpt.model.build import BuildOptions, build_chunks, freeze_layers, transformer_config
    from megacpt.model.init import draw_weights
    from megacpt.runtime.setup import setup
    from megacpt.train.optimizer import build_optimizer, wrap_chunks

    config, shape = where.config, where.architecture
    settle_collectives()
    setup(where.layout, 1, threads=1)
    options = BuildOptions(where.dtype, config.data.reset_position_ids)
    step = batches_of(where)
    # gloo's threads free what it gathers into, which `allocated` would miss.
    gathers = config.model.sequence_parallel or where.layout.context > 1 or where.layout.tensor > shape.num_query_groups

    def train(wrapped: Any) -> None:
        step(wrapped)
        optimizer.step()

    with Meter() as meter:
        chunks = build_chunks(shape, config.model, transformer_config(shape, config.model, options), options)
        draw_weights(chunks, shape, 1, 0.02)
        freeze_layers(chunks, config.train.freeze)
        wrapped = wrap_chunks(chunks, config.optimizer, config.precision)
        optimizer = build_optimizer(wrapped, config.optimizer, where.dtype)
        train(wrapped)
        gc.collect()
        optimizer.zero_grad()
        meter.begin()
        if gathers:
            train(wrapped)
    beside = 0 if gathers else allocated(lambda: train(wrapped), before=lambda: train(wrapped))
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    ledger = Ledger({p.untyped_storage().data_ptr() for p in parameters})
    for chunk in wrapped:
        chunk.register_forward_hook(partial(hold_output, ledger))
    optimizer.zero_grad()
    for module in (module for chunk in chunks for module in chunk.modules()):
        # A saved parameter comes back from these hooks as another tensor, without its gradient buffer.
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = False
    with torch.autograd.graph.saved_tensors_hooks(ledger.enter, lambda entry: entry.tensor):
        step(wrapped)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(storages.values()),
        "gradients": sum(b.grad_data.nbytes for chunk in wrapped for b in chunk.buffers),
        "optimizer": optimizer_bytes(optimizer, set(storages)),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "activations": ledger.most,
        "most": meter.most + beside,
    }


def batches_of(where: Setting) -> Callable[[Any], Any]:
    """Forward and backward over a step's micro-batches, all of them the same tokens."""
    from megacpt.model.forward import run_batches

    config = where.config
    size = (config.train.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(0, where.architecture.vocab_size, size)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(size), "source": torch.zeros(size[0]).long()}
    if config.data.reset_attention_mask:
        batch["document_ids"] = torch.zeros(size, dtype=torch.int)
        batch["position_ids"] = torch.arange(size[1]).expand(size)

    def step(wrapped: Any) -> None:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_batches(wrapped, [batch] * where.micro_batches, 1, size, train=True)

    return step


def optimizer_bytes(optimizer: Any, weights: set[int]) -> int:
    """Moments, and main parameters that are not the model's own."""
    from megacpt.train.optimizer import main_and_model_parameters, optimizer_parts

    parts = optimizer_parts(optimizer)
    states = [v for part in parts for s in part.optimizer.state.values() for k, v in s.items() if k != "step"]
    mains = [m for part in parts for m, _ in main_and_model_parameters(part)]
    return sum(t.nbytes for t in (*states, *(m for m in mains if m.untyped_storage().data_ptr() not in weights)))


TP2 = {"tensor_model_parallel_size": 2}
SP2 = TP2 | {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
VP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
KERNELS = {"swiglu_fusion_impl": "megacpt", "rope_fusion_impl": "megacpt"}
TIED = {"untie_embeddings_and_output_weights": False}
FROZEN = {"freeze": {"bottom": 1, "top": 2}}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
NEOX_SEQUENTIAL = {
    "num_query_groups": 12,
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "rotary_percent": 0.5,
}
NEOX = NEOX_SEQUENTIAL | {"use_parallel_residual": True}
FEW: dict[str, Any] = {"data": {"seq_length": 16}, "train": {"micro_batch_size": 1}}
RUNS = {
    "one rank": (1, "fp32", {}),
    "one rank, bf16, tied": (1, "bf16", {"model": TIED}),
    "bf16 gradients": (1, "bf16", {"precision": {"grad_reduce_in_fp32": False}}),
    "frozen": (1, "fp32", {"train": FROZEN}),
    "frozen, bf16": (1, "bf16", {"train": FROZEN}),
    "documents": (1, "fp32", {"data": DOCUMENTS}),
    "selective": (1, "fp32", {"model": {"recompute_granularity": "selective"}}),
    "selective, mlp": (1, "fp32", {"model": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}}),
    "selective, both, PP2": (
        2,
        "fp32",
        {
            "model": PP2 | {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
            "data": DOCUMENTS,
        },
    ),
    "uniform": (
        1,
        "fp32",
        {"model": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}},
    ),
    "block": (
        1,
        "fp32",
        {"model": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}},
    ),
    "TP2": (2, "fp32", {"model": TP2}),
    "TP2, SP, bf16": (2, "bf16", {"model": SP2}),
    "TP4 over 2 query groups": (4, "fp32", {"model": {"tensor_model_parallel_size": 4}}),
    "TP2, bf16, native loss": (2, "bf16", {"model": TP2 | {"cross_entropy_fusion_impl": "native"}}),
    "megatron-core's loss": (1, "fp32", {"model": {"cross_entropy_loss_fusion": False}}),
    "loss of hidden states": (1, "fp32", {"model": {"cross_entropy_fusion_impl": "linear"}}),
    "loss of hidden states, TP2, SP, bf16": (2, "bf16", {"model": SP2 | {"cross_entropy_fusion_impl": "linear"}}),
    "our kernels": (1, "fp32", {"model": KERNELS}),
    "our kernels, TP2, bf16, mlp": (
        2,
        "bf16",
        {"model": TP2 | KERNELS | {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}},
    ),
    "few tokens": (1, "fp32", FEW),
    "few tokens, bf16": (1, "bf16", FEW),
    "few tokens, PP2, bf16": (2, "bf16", {"model": PP2} | FEW),
    "long, no padding": (1, "fp32", {"model": {"vocab_size": 1024}, "data": {"seq_length": 256}}),
    "long, PP2, MHA": (2, "bf16", {"model": PP2 | {"num_query_groups": 12}, "data": {"seq_length": 256}}),
    "PP2, tied": (2, "fp32", {"model": PP2 | TIED}),
    "PP2, virtual, frozen": (2, "fp32", {"model": VP2, "train": FROZEN}),
    "PP2, virtual, tied, bf16": (2, "bf16", {"model": VP2 | TIED}),
    "TP2 x PP2, SP": (4, "fp32", {"model": SP2 | PP2}),
    "DP2": (2, "bf16", {}),
    # Were gradients or parameters copied when they are exchanged, that moment would be the largest.
    "few tokens, DP2, distributed": (2, "fp32", {"optimizer": DISTRIBUTED} | FEW),
    "DP2, distributed, bf16, frozen": (2, "bf16", {"optimizer": DISTRIBUTED, "train": FROZEN}),
    "DP2 x PP2, distributed, tied": (4, "bf16", {"optimizer": OVERLAP, "model": PP2 | TIED}),
    "CP2": (2, "fp32", {"model": CP2}),
    "CP2, MHA, long, bf16": (2, "bf16", {"model": CP2 | {"num_query_groups": 12}, "data": {"seq_length": 256}}),
    "CP2 x TP2, SP, attention recomputed, distributed": (
        4,
        "bf16",
        {
            "optimizer": DISTRIBUTED,
            "model": CP2 | SP2 | {"recompute_granularity": "selective"},
            "data": {"seq_length": 256},
        },
    ),
    "CP4, MHA, attention recomputed": (
        4,
        "fp32",
        {
            "model": {
                "context_parallel_size": 4,
                "num_query_groups": 12,
                "vocab_size": 64,
                "recompute_granularity": "selective",
            },
            "data": {"seq_length": 512},
        },
    ),
    "CP2 x PP2, documents": (4, "fp32", {"model": CP2 | PP2, "data": DOCUMENTS}),
    "CP2, documents, frozen": (2, "fp32", {"model": CP2, "data": DOCUMENTS, "train": FROZEN}),
    "neox": (1, "fp32", {"model": NEOX}),
    "neox, frozen, documents": (1, "fp32", {"model": NEOX, "train": FROZEN, "data": DOCUMENTS}),
    "neox, sequential, uniform": (
        1,
        "fp32",
        {
            "model": NEOX_SEQUENTIAL
            | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
        },
    ),
    "neox, TP2 x PP2, SP, bf16": (4, "bf16", {"model": NEOX | SP2 | PP2}),
    "neox, DP2, distributed": (2, "bf16", {"optimizer": DISTRIBUTED, "model": NEOX}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_arithmetic_is_what_ranks_allocate(name: str) -> None:
    world, dtype, sections = RUNS[name]
    where = setting(world, dtype, **sections)
    measured = run_ranks(measure, world, where)
    for stage in range(where.layout.pipeline):
        ranks = [m for m in measured if m["stage"] == stage]
        state = stage_state(where, stage)
        for rank in ranks:
            assert (rank["parameters"], rank["weights"], rank["gradients"]) == (
                state.parameters,
                state.weights,
                state.gradients,
            )
        if where.config.optimizer.use_distributed_optimizer:
            item = 12 if dtype == "bf16" else 8
            assert sum(rank["optimizer"] for rank in ranks) == where.layout.tensor * ranks[0]["trained"] * item
            assert max(rank["optimizer"] for rank in ranks) <= state.optimizer
            assert state.optimizer * where.replicas <= ranks[0]["trained"] * item * 1.01
        else:
            assert {rank["optimizer"] for rank in ranks} == {state.optimizer}
        expected = stage_peak(where, stage)
        tokens = where.config.train.micro_batch_size * where.config.data.seq_length
        copied = dtype == "bf16" and expected.logits and where.config.model.own_loss is None
        transient = where.vocabulary_rows * tokens * 2 if copied else 0
        found = max(rank["activations"] for rank in ranks)
        assert expected.saved + expected.logits - transient == pytest.approx(found, rel=ACTIVATIONS)
        most = max(rank["most"] for rank in ranks)
        assert state.total + expected.total == pytest.approx(most, rel=TOTAL)


@given(st.integers(1, 6), st.none() | st.integers(2, 4), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_in_flight_micro_batches_follow_the_schedule(pp: int, vp: int | None, rounds: int) -> None:
    pp, vp = (pp, None) if vp is None else (max(pp, 2), vp)
    shape = {
        "num_layers": pp * (vp or 1),
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
    }
    micro_batches = rounds * pp if vp else rounds
    where = setting(pp, model=shape, train={"global_batch_size": micro_batches, "micro_batch_size": 1})
    for stage in range(pp):
        held = peak(where, stage, [1] * where.chunks)
        if vp is None:
            assert held == min(pp - stage, micro_batches)
        else:
            assert held == min(warm_up(where, stage) + 1, micro_batches * vp)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_together_hold_the_model(data: st.DataObject) -> None:
    tp, pp = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    vp = data.draw(st.sampled_from([None, 2])) if pp > 1 else None
    untied = data.draw(st.booleans())
    model = {
        "num_layers": 8,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "untie_embeddings_and_output_weights": untied,
        "vocab_size": data.draw(st.integers(10, 3000)),
        **data.draw(st.sampled_from([{}, NEOX, {"add_bias_linear": True}, {"normalization": "LayerNorm"}])),
    }
    where = setting(tp * pp, data.draw(st.sampled_from(["fp32", "bf16"])), model=model)
    shape = where.architecture
    chunks = [chunk_parameters(where, s, c) for s in range(pp) for c in range(where.chunks)]
    held = tp * sum(p.numel for chunk in chunks for p in chunk)
    vectors = (2 * shape.num_layers + 1) * shape.norm_parameters
    vectors += 2 * shape.num_layers * shape.hidden_size if shape.add_bias_linear else 0
    whole_on_each_rank = (tp - 1) * vectors
    table = where.vocabulary_rows * tp * shape.hidden_size
    padding = table - shape.vocab_size * shape.hidden_size
    second_copy = table if pp > 1 and not untied else 0
    assert held == shape.parameters + whole_on_each_rank + padding * (2 if untied else 1) + second_copy
    item = 14 if where.dtype is torch.bfloat16 else 12
    assert checkpoint_bytes(where) == (shape.parameters + padding * (2 if untied else 1)) * item


def test_frozen_layers_have_weights_only() -> None:
    free, frozen = (stage_state(setting(1, train=t), 0) for t in ({}, FROZEN))
    layers = 3 * (setting(1).architecture.layer_matmul_parameters + 2 * 96)
    assert free.weights == frozen.weights
    assert free.gradients - frozen.gradients == 4 * layers
    assert free.optimizer - frozen.optimizer == 8 * layers
    assert checkpoint_bytes(setting(1)) - checkpoint_bytes(setting(1, train=FROZEN)) == 8 * layers


def test_full_recomputation_needs_less_than_none_and_our_layer_less_than_a_composed_one() -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    none, uniform = (stage_peak(setting(1, "bf16", model=m), 0) for m in ({}, full))
    assert uniform.saved < none.saved / 2
    assert none.saved < stage_peak(replace(setting(1, "bf16"), on_gpu=True), 0).saved


def test_only_a_cpu_widens_the_gradient_of_the_embedding() -> None:
    where = setting(1, "bf16", **FEW)
    cpu, gpu = (stage_peak(replace(where, on_gpu=on_gpu), 0) for on_gpu in (False, True))
    table = where.vocabulary_rows * where.architecture.hidden_size
    assert gpu.total < 6 * table < cpu.total


ENGINE = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
LARGER = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4}


def engine_setting(**sections: dict[str, Any]) -> Setting:
    sections["model"] = LARGER | sections.get("model", {})
    return replace(setting(1, "bf16", **sections), on_gpu=True, engine=True)


def test_optimizer_state_follows_its_keys() -> None:
    parameters = stage_state(engine_setting(optimizer=DISTRIBUTED), 0).optimizer // 12
    precise = DISTRIBUTED | {"use_precision_aware_optimizer": True}
    for moments, item in (("fp32", 12), ("bf16", 8), ("fp16", 8), ("fp8", 6)):
        keys = precise | {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
        assert stage_state(engine_setting(optimizer=keys), 0).optimizer == item * parameters
    half = stage_state(
        engine_setting(optimizer=precise | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}), 0
    )
    assert (half.optimizer, half.host) == (6 * parameters, 8 * parameters)
    whole = stage_state(engine_setting(optimizer=precise | {"optimizer_cpu_offload": True}), 0)
    assert (whole.optimizer, whole.host) == (0, 16 * parameters)


def test_fp8_adds_copies_of_weights_and_takes_from_activations() -> None:
    plain, fp8 = engine_setting(), engine_setting(model=ENGINE)
    matrices = plain.architecture.layer_matmul_parameters
    assert stage_state(fp8, 0).weights - stage_state(plain, 0).weights == 2 * 4 * matrices
    outer = engine_setting(model=ENGINE | {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2})
    assert stage_state(outer, 0).weights - stage_state(plain, 0).weights == 2 * matrices
    saved = [stage_peak(where, 0).saved for where in (fp8, outer, plain)]
    assert saved == sorted(saved)
    # Inputs of qkv and fc1 (h each) and of fc2 (f) in one byte, the output of attention once more.
    tokens, shape = 128, plain.architecture
    assert saved[2] - saved[0] == 4 * tokens * (2 * shape.hidden_size + shape.ffn_hidden_size - shape.hidden_size)


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_fp8_parameters_take_the_place_of_bf16_ones(recipe: str) -> None:
    keys = ENGINE | {"fp8_recipe": recipe}
    cast, kept = (
        engine_setting(model=keys | {"fp8_param_gather": gathers}, optimizer=DISTRIBUTED) for gathers in (False, True)
    )
    matrices = 4 * cast.architecture.layer_matmul_parameters
    states = [stage_state(where, 0) for where in (cast, kept)]
    # Their buffers are padded by themselves.
    assert states[0].weights - states[1].weights == pytest.approx(2 * matrices, abs=1024)
    assert states[0].gradients == pytest.approx(states[1].gradients, abs=2048)
    outer = engine_setting(
        model=keys | {"fp8_param_gather": True, "first_last_layers_bf16": True}, optimizer=DISTRIBUTED
    )
    assert stage_state(outer, 0).weights - states[1].weights == pytest.approx(0, abs=1024)
    four = replace(kept, layout=Layout(4))
    bf16 = gathered_bytes(four, 0, fp8=False)
    saved = 0 if recipe == "mxfp8" else matrices * 3 // 4
    assert bf16 - gathered_bytes(four, 0, fp8=True) == saved
    assert bf16 == 2 * states[0].parameters * 3 // 4


def test_the_engine_keeps_less_than_local_layers() -> None:
    local = replace(setting(1, "bf16", model=LARGER), on_gpu=True)
    assert stage_peak(engine_setting(), 0).saved < stage_peak(local, 0).saved
    documents = {"data": DOCUMENTS}
    assert stage_peak(engine_setting(**documents), 0).saved == stage_peak(engine_setting(), 0).saved
    mlp = engine_setting(model={"recompute_granularity": "selective", "recompute_modules": ["mlp"]})
    assert stage_peak(mlp, 0).saved < stage_peak(engine_setting(), 0).saved


def test_gradients_that_matmuls_add_leave_one_stand_in_for_each_shape() -> None:
    """Their own memory is not in the moment of the loss, which a large vocabulary makes the largest."""
    loss = {"vocab_size": 50_000}
    plain, fused = (
        stage_peak(engine_setting(model=loss | {"gradient_accumulation_fusion": fusion}), 0) for fusion in (False, True)
    )
    hidden, feed_forward, queries, keys = 128, 256, 128, 64
    shapes = (queries + 2 * keys) * hidden + queries * hidden + 2 * feed_forward * hidden + feed_forward * hidden
    assert (fused.saved, fused.logits) == (plain.saved, plain.logits)
    assert fused.temporary - plain.temporary == 2 * shapes


FOUR = {"micro_batch_size": 4, "global_batch_size": 8}


def test_the_engine_s_loss_copies_the_logits_and_keeps_the_copy() -> None:
    large = {"vocab_size": 200_000}
    ours, engine = (
        stage_peak(engine_setting(model=large | {"cross_entropy_fusion_impl": name}, train=FOUR), 0)
        for name in ("megacpt", "te")
    )
    where = setting(1, model=large, train=FOUR)
    tokens, rows = 4 * where.config.data.seq_length, where.vocabulary_rows
    assert engine.logits == tokens * (2 * rows + 9)
    assert engine.temporary >= 2 * tokens * rows
    assert ours.temporary < 0.6 * engine.temporary


def test_a_save_gathers_the_state_of_all_data_parallel_ranks_on_each() -> None:
    where = setting(2, "bf16", optimizer=DISTRIBUTED, train=FROZEN)
    trained = [p.numel for p in chunk_parameters(where, 0, 0) if p.trains]
    lines = list(memory_table(where))
    (told,) = [line for line in lines if "saved or loaded" in line]
    assert f" {size(12 * sum(trained))} a rank" in told
    assert where.layout.data == 2
    assert not any("saved or loaded" in line for line in memory_table(setting(2)))
