"""Each combination that cannot run is one sentence with the keys in it; those that can are accepted."""

from typing import Any

import pytest

from megacpt.config.architecture import resolve_architecture
from megacpt.config.check import check_config
from megacpt.config.check_engine import check_engine
from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.errors import UserError

SHAPE = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "rotary_base": 10000.0,
    "norm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PRECISE = {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MLP_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
ODD_HEADS = {"kv_channels": 20}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}


def config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "precision": {"dtype": "bf16"},
        "model": SHAPE,
        "data": {"seq_length": 64, "sources": {"a": {"path": "a", "epochs": 1}}},
        "train": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "save": {"dir": "unused"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return config_from(tree, "test")


def check(*, engine: bool = True, on_gpu: bool = True, bf16: bool = True, **sections: dict[str, Any]) -> None:
    made = config(**sections)
    architecture = resolve_architecture(made.model, None)
    check_config(made, architecture)
    check_engine(made, architecture, engine=engine, on_gpu=on_gpu, bf16=bf16)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"fp8": "hybrid"}}, ["model.fp8 hybrid", "transformer_impl"]),
        ({"model": SP | {"tp_comm_overlap": True}}, ["tp_comm_overlap", "transformer_impl"]),
        ({"model": {"attention_backend": "flash"}}, ["attention_backend flash", "transformer_impl"]),
        (
            {"model": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}},
            ["cross_entropy_fusion_impl te", "transformer_impl"],
        ),
    ],
)
def test_keys_of_the_engine_need_it(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(engine=False, **sections)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("way", ["p2p", "a2a"])
def test_torch_s_attention_gathers_keys_and_values(way: str) -> None:
    shared = {"context_parallel_size": 2}
    with pytest.raises(UserError, match=f"cp_comm_type {way} is Transformer Engine's .*; choose all_gather"):
        check(engine=False, on_gpu=False, model=shared | {"cp_comm_type": way})
    check(engine=False, on_gpu=False, model=shared | {"cp_comm_type": "all_gather"})
    check(engine=False, on_gpu=False, model=shared, data=DOCUMENTS)


def test_our_swiglu_needs_a_gate() -> None:
    with pytest.raises(UserError, match="swiglu_fusion_impl megacpt fuses the gate"):
        check(model={"swiglu": False, "swiglu_fusion_impl": "megacpt"})
    check(model={"swiglu_fusion_impl": "megacpt", "rope_fusion_impl": "megacpt"})


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"model": {"cuda_graph_impl": "local"}}, "cuda_graph_impl local"),
        ({"model": {"gradient_accumulation_fusion": True}}, "gradient_accumulation_fusion"),
        ({"optimizer": PRECISE}, "use_precision_aware_optimizer"),
    ],
)
def test_keys_of_a_gpu_need_one(sections: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=f"{word} needs a GPU"):
        check(engine=False, on_gpu=False, **sections)
    with pytest.raises(UserError, match="transformer_engine needs a GPU"):
        check(engine=True, on_gpu=False)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"use_parallel_residual": True}}, ["parallel residual", "local"]),
        ({"model": {"first_last_layers_bf16": True}}, ["first_last_layers_bf16", "fp8 is null"]),
        ({"model": {"fp8_recipe": "blockwise"}}, ["fp8_recipe", "fp8 is null"]),
        ({"model": {"fp8_amax_history_len": 16}}, ["fp8_amax_history_len", "fp8 is null"]),
        ({"model": {"fp8_param_gather": True}}, ["fp8_param_gather", "fp8 is null"]),
        (
            {"model": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_margin": 1}},
            ["fp8_margin", "delayed", "tensorwise"],
        ),
        (
            {"model": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "num_layers_at_start_in_bf16": 2}},
            ["num_layers_at_start_in_bf16", "first_last_layers_bf16"],
        ),
        ({"model": {"fp8": "hybrid", "first_last_layers_bf16": True}}, ["fp8_recipe delayed", "tensorwise"]),
        (
            {
                "model": {
                    "fp8": "hybrid",
                    "fp8_recipe": "tensorwise",
                    "first_last_layers_bf16": True,
                    "num_layers_at_end_in_bf16": 5,
                }
            },
            ["num_layers_at_end_in_bf16 5", "4 layers"],
        ),
        (
            {"model": {"fp8": "hybrid", "hidden_size": 120, "kv_channels": 16}},
            ["multiples of 16", "hidden_size", "120"],
        ),
        (
            {"model": {"fp8": "e4m3", "fp8_recipe": "mxfp8", "ffn_hidden_size": 272}},
            ["multiples of 32", "ffn_hidden_size", "272"],
        ),
        ({"model": {"fp8": "hybrid"}, "data": {"seq_length": 40}}, ["multiples of 16", "tokens", "40"]),
        ({"model": {"tp_comm_overlap": True}}, ["tp_comm_overlap", "sequence_parallel"]),
        ({"model": {"cp_comm_type": "a2a"}}, ["cp_comm_type", "context_parallel_size 1"]),
        ({"model": {"context_parallel_size": 3}}, ["context_parallel_size 3", "seq_length 64"]),
        ({"model": {"context_parallel_size": 2}, "data": DOCUMENTS}, ["reset_attention_mask", "context_parallel_size"]),
        ({"model": {"context_parallel_size": 8, "cp_comm_type": "a2a"}}, ["a2a", "num_query_groups"]),
        (
            {"model": {"context_parallel_size": 2, "attention_backend": "unfused"}},
            ["attention_backend unfused", "fused"],
        ),
        (
            {
                "model": {
                    "cuda_graph_impl": "local",
                    "recompute_granularity": "full",
                    "recompute_method": "uniform",
                    "recompute_num_layers": 1,
                }
            },
            ["cuda_graph_impl local", "selective"],
        ),
        ({"model": {"cuda_graph_impl": "local"}, "data": DOCUMENTS}, ["cuda_graph_impl", "reset_attention_mask"]),
        (
            {"model": {"cross_entropy_loss_fusion": False, "cross_entropy_fusion_impl": "te"}},
            ["cross_entropy_loss_fusion"],
        ),
        ({"model": {"recompute_modules": ["mlp"]}}, ["recompute_modules", "selective"]),
        ({"optimizer": {"exp_avg_dtype": "bf16"}}, ["exp_avg_dtype bf16", "use_precision_aware_optimizer"]),
        ({"optimizer": {"use_precision_aware_optimizer": True}}, ["use_distributed_optimizer"]),
        ({"optimizer": {"optimizer_cpu_offload": True}}, ["optimizer_cpu_offload", "use_precision_aware_optimizer"]),
        (
            {"optimizer": PRECISE | {"optimizer_cpu_offload": True, "exp_avg_sq_dtype": "bf16"}},
            ["exp_avg_sq_dtype bf16", "optimizer_cpu_offload"],
        ),
        ({"optimizer": {"optimizer_offload_fraction": 0.5}}, ["optimizer_offload_fraction", "optimizer_cpu_offload"]),
        ({"optimizer": {"overlap_cpu_optimizer_d2h_h2d": True}}, ["overlap_cpu_optimizer_d2h_h2d"]),
        (
            {"model": SP | {"tp_comm_overlap": True}, "data": DOCUMENTS, "train": {"micro_batch_size": 2}},
            ["tp_comm_overlap", "micro_batch_size"],
        ),
        (
            {"model": SP | {"tp_comm_overlap": True, "fp8": "hybrid", "fp8_recipe": "blockwise"}},
            ["tp_comm_overlap", "blockwise", "tensorwise"],
        ),
        ({"model": {"cuda_graph_impl": "local"}, "eval": {"tasks": ["arc_easy"]}}, ["cuda_graph_impl", "eval.tasks"]),
        (
            {"model": {"cuda_graph_impl": "local", "fp8": "hybrid"} | MLP_AGAIN},
            ["cuda_graph_impl", "recompute_modules", "FP8"],
        ),
        (
            {"model": {"fp8": "hybrid"}, "diagnostics": {"gradient_probe": {"every": 5, "domain": ["a"]}}},
            ["gradient_probe", "fp8_recipe delayed"],
        ),
        ({"model": ODD_HEADS | {"attention_backend": "flash"}}, ["attention_backend flash", "multiples of 8", "20"]),
        ({"model": ODD_HEADS, "data": DOCUMENTS}, ["reset_attention_mask", "multiples of 8", "20"]),
        (
            {"model": ODD_HEADS | {"context_parallel_size": 2, "cp_comm_type": "p2p"}},
            ["cp_comm_type p2p", "torch's", "all_gather"],
        ),
    ],
)
def test_what_cannot_run_is_one_sentence(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(**sections)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_precision() -> None:
    with pytest.raises(UserError, match=r"needs precision\.dtype bf16"):
        check(bf16=False, model={"fp8": "hybrid"})
    with pytest.raises(UserError, match=r"needs precision\.dtype bf16"):
        check(bf16=False, optimizer=PRECISE)
    with pytest.raises(UserError, match="cross_entropy_fusion_impl native rounds"):
        check(bf16=False, model={"cross_entropy_fusion_impl": "native"})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"fp8": "hybrid"}},
        {"model": {"fp8": "e4m3", "fp8_recipe": "mxfp8"}},
        {"model": {"fp8": "hybrid", "fp8_recipe": "blockwise", "first_last_layers_bf16": True}},
        {"model": SP | {"tp_comm_overlap": True, "gradient_accumulation_fusion": True}},
        {"model": {"context_parallel_size": 2, "cp_comm_type": "a2a"}},
        {"model": {"cuda_graph_impl": "local"} | MLP_AGAIN},
        {"model": {"context_parallel_size": 2}, "diagnostics": {"gradient_probe": {"every": 5, "domain": ["a"]}}},
        {"model": {"context_parallel_size": 2}, "init": {"hf": "folder"}, "eval": {"tasks": ["arc_easy"]}},
        {"model": ODD_HEADS},
        {"model": ODD_HEADS | {"context_parallel_size": 2}},
        {"model": ODD_HEADS | {"attention_backend": "unfused"}},
        {"data": DOCUMENTS, "train": {"micro_batch_size": 2}},
        {"optimizer": PRECISE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8"}},
        {"optimizer": PRECISE | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}},
    ],
)
def test_what_can_run_is_accepted(sections: dict[str, Any]) -> None:
    check(**sections)


SHARDED = {"use_distributed_optimizer": True}
BF16_MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def gathering(recipe: str, **more: Any) -> dict[str, Any]:
    return {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": True} | more


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {}}, ["fp8_param_gather needs optimizer.use_distributed_optimizer"]),
        (
            {"model": gathering("mxfp8"), "optimizer": SHARDED | OVERLAP},
            ["mxfp8", "gradient buffer", "optimizer.overlap_param_gather"],
        ),
        ({"optimizer": PRECISE | {"optimizer_cpu_offload": True}}, ["optimizer_cpu_offload", "fp8_param_gather"]),
        (
            {"model": gathering("delayed"), "optimizer": PRECISE},
            ["use_precision_aware_optimizer", "delayed", "fp8_param_gather"],
        ),
        ({"optimizer": PRECISE | {"exp_avg_dtype": "fp16"}}, ["exp_avg_dtype fp16", "scale", "fp8_param_gather"]),
        ({"optimizer": PRECISE | {"exp_avg_sq_dtype": "fp8"}}, ["exp_avg_sq_dtype fp8", "scale", "fp8_param_gather"]),
        ({"train": {"freeze": {"bottom": 1}}}, ["fp8_param_gather", "train.freeze"]),
        ({"diagnostics": {"weight_update": {"at": [1]}}}, ["diagnostics.weight_update", "fp8_param_gather"]),
        ({"diagnostics": {"weight_update": {"every": 5}}}, ["diagnostics.weight_update", "fp8_param_gather"]),
    ],
)
def test_fp8_parameters_need(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(**{"model": gathering("tensorwise"), "optimizer": SHARDED} | sections)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (gathering("delayed"), SHARDED | OVERLAP),
        (gathering("tensorwise", first_last_layers_bf16=True), SHARDED | OVERLAP),
        (gathering("blockwise"), PRECISE | BF16_MOMENTS | OVERLAP),
        (gathering("mxfp8"), PRECISE | BF16_MOMENTS | {"overlap_grad_reduce": True}),
    ],
)
def test_fp8_parameters_go_with(model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    check(model=model, optimizer=optimizer)


def test_fp8_parameters_need_the_engine() -> None:
    with pytest.raises(UserError, match=r"model\.fp8 hybrid needs Transformer Engine's layers"):
        check(engine=False, model=gathering("tensorwise"), optimizer=SHARDED)
