"""The layer specs: which class fills each slot of megatron-core's transformer layer, written out by hand.

Two of them: `local`, which needs only torch, and `transformer_engine`. docs/parallelism.md says why each class is
there. Loss has no slot in a spec: it is `LanguageModel.compute_language_model_loss`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpt.config.architecture import Architecture
from megacpt.config.check_engine import attends_with_torch
from megacpt.config.tree import Model
from megacpt.model.layers import (
    LayerNorm,
    ParallelResidualLayer,
    RMSNorm,
    RotatingSelfAttention,
    SDPAttention,
    SwiGLU,
)

NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
# With Transformer Engine the two norms live inside the linear layers that follow them. Checkpoints use those names, so
# that one written here loads there and the other way round.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Slots:
    """One class for each slot; a norm that is inside the linear layer after it is an IdentityOp.

    Attributes:
        self_attention: holds the attention slots, and rotates queries and keys.
        norm: before attention and before the MLP.
        final_norm: after the last layer.
        column: qkv and fc1, cut by rows.
        row: proj and fc2, cut by columns.
        activation: None: megatron-core's functions, which have no class.
    """

    self_attention: type
    norm: type
    final_norm: type
    column: type
    row: type
    attention: type
    activation: type | None


def slots(architecture: Architecture, model: Model, *, engine: bool) -> Slots:
    """The only place that chooses classes; a kernel that fills a slot better is named here."""
    # Transformer Engine has no layers on a CPU, where tests build but do not run them.
    on_gpu = engine or torch.cuda.is_available()
    filled = partial(
        Slots,
        self_attention=RotatingSelfAttention if model.own_rope(on_gpu=on_gpu) else SelfAttention,
        activation=SwiGLU if architecture.swiglu and model.own_swiglu(on_gpu=on_gpu) else None,
    )
    attention = SDPAttention if attends_with_torch(architecture, model, engine=engine) else TEDotProductAttention
    if engine:
        return filled(
            norm=IdentityOp,
            final_norm=TENorm,
            column=TELayerNormColumnParallelLinear,
            row=TERowParallelLinear,
            attention=attention,
        )
    norm = NORMS[architecture.normalization]
    return filled(norm=norm, final_norm=norm, column=ColumnParallelLinear, row=RowParallelLinear, attention=attention)


def layer_spec(architecture: Architecture, model: Model, *, engine: bool) -> ModuleSpec:
    """One transformer layer: attention and MLP, each behind its norm, each added to the residual."""
    fill = slots(architecture, model, engine=engine)
    attention = SelfAttentionSubmodules(
        linear_qkv=fill.column,
        core_attention=fill.attention,
        linear_proj=fill.row,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    return ModuleSpec(
        module=ParallelResidualLayer if architecture.use_parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=fill.norm,
            self_attention=ModuleSpec(
                module=fill.self_attention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=fill.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=fill.column, linear_fc2=fill.row, activation_func=fill.activation),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if engine else CHECKPOINT_NAMES,
        ),
    )


def block_spec(
    architecture: Architecture, model: Model, layers_on_this_stage: int, *, engine: bool
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or chunk of one) and the final norm, which the last stage builds."""
    layers = [layer_spec(architecture, model, engine=engine)] * layers_on_this_stage
    final_norm = slots(architecture, model, engine=engine).final_norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
