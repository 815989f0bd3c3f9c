"""The layer spec: which class fills each slot of megatron-core's transformer layer, written out by hand."""

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
from megacpt.model.layers import LayerNorm, ParallelResidualLayer, RMSNorm, SDPAttention

NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
# With Transformer Engine the two norms live inside the linear layers that follow them. Checkpoints use those names, so
# that one written here loads there and the other way round.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def local_layer_spec(architecture: Architecture) -> ModuleSpec:
    """A layer of megatron-core's parallel linears with our norms and attention; needs only torch."""
    norm = NORMS[architecture.normalization]
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SDPAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    return ModuleSpec(
        module=ParallelResidualLayer if architecture.use_parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )


def block_spec(architecture: Architecture, layers_on_this_stage: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or chunk of one) and the final norm, which the last stage builds."""
    layers = [local_layer_spec(architecture)] * layers_on_this_stage
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=NORMS[architecture.normalization])
