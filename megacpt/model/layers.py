"""Our modules in megatron-core's slots on the local spec: norms, attention, and the layer with a parallel residual."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megacpt.model.context import GatherKeysAndValues, causal_bias, chunks_of
from megacpt_kernels.rmsnorm import rms_norm
from megacpt_kernels.rope import rope
from megacpt_kernels.swiglu import swiglu


class RMSNorm(torch.nn.Module):
    """RMSNorm for the norm slots.

    megatron-core's own local norm refuses sequence parallelism. What sequence parallelism needs of a norm is a mark on
    its weight: each rank sees part of the sequence, so the weight's gradient is summed over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [s, b, h] over h; fp32 inside, the input's dtype outside."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """LayerNorm for the norm slots, with what sequence parallelism needs on weight and bias (see RMSNorm)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **where))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **where))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [s, b, h] over h; torch's kernel is fp32 inside, the input's dtype outside."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class SwiGLU(torch.nn.Module):
    """Our SwiGLU kernel for the activation slot; `config.use_te_activation_func` is what opens that slot."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate and up side by side, [s, b, 2f / TP], to [s, b, f / TP]."""
        return swiglu(x)


class RotatingSelfAttention(SelfAttention):
    """SelfAttention whose queries and keys our RoPE kernel rotates where they lie in the fused projection.

    megatron-core is told of no phases, and so rotates nothing. Phases are [s, 1, 1, R], or [s, b, 1, R] if samples have
    phases of their own; of packed documents, those of each token.
    """

    _phases: torch.Tensor | None = None

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As SelfAttention's."""
        self._phases = rotary_pos_emb
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(*args, rotary_pos_emb=None, **kwargs)
        return output

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Query [s, b, n, d] and key [s, b, g, d], rotated, and value."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        phases, self._phases = self._phases, None
        assert phases is not None
        return rope(query, phases), rope(key, phases), value


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)), after GPT-J and GPT-NeoX (Black et al. 2022, arXiv 2204.06745, 2.1).

    megatron-core's two halves each add to the residual that they read. Here the second half reads the layer's input and
    adds to what attention left. Biases, dropout, recomputation of norms and sequence parallelism stay in those halves.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, h] (s over TP under sequence parallelism) to the same; the second value, a context, is None."""
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        normalised = self._forward_pre_mlp_layernorm(hidden_states)
        return self._forward_post_mlp(self.mlp(normalised), attended), context


class SDPAttention(MegatronModule):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`, for the core_attention slot.

    On a CPU this is torch's blocked attention, on a GPU flash attention; megatron-core's own local attention
    materialises the scores in full on both. Context-parallel ranks gather keys and values (`megacpt.model.context`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal, f"only causal attention, not {attn_mask_type}"
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_group = None
        if config.context_parallel_size > 1:
            assert cp_comm_type == "all_gather", f"keys and values are gathered, not exchanged by {cp_comm_type}"
            assert pg_collection is not None
            self.context_group = pg_collection.cp

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend within the causal past, or within `attention_mask` (Megatron's sense: True is hidden; [b, 1, s, t]).

        H query heads share G key/value heads; t is s, or all of the sequence where this rank has s positions of it.
        Returns [s, b, H * D].
        """
        assert attention_bias is None
        assert packed_seq_params is None, "packed sequences need Transformer Engine"
        group = self.context_group
        if group is None:
            return self._attend(query_SBHD, key_SBGD, value_SBGD, attention_mask)
        keys, values = GatherKeysAndValues.apply(key_SBGD, value_SBGD, group)
        length = query_SBHD.shape[0] // 2
        parts = []
        for place, number in enumerate(chunks_of(group.size(), group.rank())):
            own, past = slice(place * length, (place + 1) * length), slice(0, (number + 1) * length)
            mask = None if attention_mask is None else attention_mask[:, :, own, past]
            parts.append(self._attend(query_SBHD[own], keys[past], values[past], mask))
        return torch.cat(parts)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """The last s of t positions, queries [s, b, h, d], to keys and values [t, b, g, d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if hidden is None else ~hidden
        if hidden is None and query.shape[2] < key.shape[2]:
            mask = causal_bias(query, key.shape[2])
        context_BHSD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)
