"""The model class: megatron-core's GPTModel, with vocabulary padding masked and rotary phases that can restart.

This is the only file that names GPTModel (megatron-core announces HybridModel as its successor).
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpt.config.architecture import Architecture
from megacpt.model.layers import RotatingSelfAttention
from megacpt_kernels.cross_entropy import vocab_parallel_cross_entropy
from megacpt_kernels.linear_cross_entropy import HeadOptions, linear_cross_entropy_sum
from megacpt_kernels.rope import packed_positions
from megacpt_kernels.token_losses import SourceSums


class LanguageModel(GPTModel):
    """A GPTModel whose padding rows can be neither predicted nor sampled.

    Rotary phases may follow `position_ids`, which GPTModel alone ignores under RoPE. With Transformer Engine's layers
    they do not need to: documents are packed, and phases restart where `packed_seq_params` says.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        restart_positions: bool,
        engine: bool = False,
        own_loss: str | None = None,
        **kwargs: Any,
    ) -> None:
        scaling = architecture.rope_scaling_factor
        super().__init__(
            config=config,
            max_sequence_length=architecture.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            rotary_percent=architecture.rotary_percent,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling or 1.0,
            share_embeddings_and_output_weights=not architecture.untie_embeddings_and_output_weights,
            **kwargs,
        )
        self.engine = engine
        """Whether Transformer Engine's classes fill the slots: documents by `packed_seq_params`, no other masks."""
        self.own_loss = own_loss
        """Our cross-entropy in the place of megatron-core's: "megacpt", or "linear" without whole logits; or None."""
        self.rotates = any(isinstance(layer.self_attention, RotatingSelfAttention) for layer in self.decoder.layers)
        """Whether our RoPE is in the layers, which is given a phase for each token of packed documents."""
        self.restart_positions = restart_positions and not engine
        self.some_layers_frozen = False
        """Whether any layer, here or on another stage, has no optimizer state."""
        rows = self.vocab_size // self.pg_collection.tp.size()
        first = rows * self.pg_collection.tp.rank()
        self.real_rows = min(max(architecture.vocab_size - first, 0), rows)
        """Rows of this rank's vocabulary shard that are tokens; the rest is padding."""

    def _preprocess(self, input_ids: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        output = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        hidden, phases_S11D, *rest = output
        packed = kwargs.get("packed_seq_params")
        if packed is not None and self.rotates:
            # [t, 1, 1, d]: the phase of each token in its document, once for all layers.
            states = self.decoder.input_tensor if hidden is None else hidden
            tokens = states.shape[0] * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)
            return (hidden, phases_S11D[packed_positions(packed.cu_seqlens_q, tokens)], *rest)
        if not self.restart_positions:
            return output
        if self.config.context_parallel_size > 1:
            # Those of this rank's places, and its documents begin anywhere.
            phases_S11D = self.rotary_pos_emb(len(phases_S11D) * self.config.context_parallel_size, packed_seq=True)
        # [s, b, 1, d]: each sample its own phases, broadcast over heads.
        return (hidden, phases_S11D[position_ids.t(), 0], *rest)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per token, [b, s] fp32, from vocabulary-parallel logits [s, b, v/TP], padding excluded.

        Ours writes the logits' gradient over them in backward, megatron-core's its own copy's in forward.
        """
        if self.own_loss is None:
            return super().compute_language_model_loss(labels, self.mask_padding(logits))
        return vocab_parallel_cross_entropy(
            logits, labels.t(), real_rows=self.real_rows, group=self._vocabulary_group()
        ).t()

    def _vocabulary_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the vocabulary; None where this one has it all."""
        group = self.pg_collection.tp
        return group if group.size() > 1 else None

    def _training_loss(
        self,
        *,
        hidden_states: torch.Tensor,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        context: SourceSums,
        **head: Any,
    ) -> torch.Tensor:
        """In the place of megatron-core's output head: the sum of the unmasked losses of hidden states [s, b, h]."""
        if self.own_loss == "linear":
            return self._loss_of_hidden(hidden_states, output_weight, labels, loss_mask, context)
        logits, _ = self.output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=head["runtime_gather_output"]
        )
        if self.own_loss is None:
            losses = self.compute_language_model_loss(labels, logits)
            context.add(losses, loss_mask)
            return losses.where(loss_mask != 0, 0.0).sum()
        return vocab_parallel_cross_entropy(
            logits,
            labels.t(),
            loss_mask.t(),
            real_rows=self.real_rows,
            group=self._vocabulary_group(),
            sources=SourceSums(context.ids.t(), context.sums),
        ).sum()

    def _loss_of_hidden(
        self,
        hidden: torch.Tensor,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        sources: SourceSums,
    ) -> torch.Tensor:
        """The same without whole logits, a chunk of tokens at a time."""
        parallel = self.config.sequence_parallel
        if parallel:
            # Its backward scatters the sum over ranks, which the loss then leaves to it.
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        total, _ = linear_cross_entropy_sum(
            hidden,
            self.output_layer.weight if output_weight is None else output_weight,
            labels.t(),
            loss_mask.t(),
            real_rows=self.real_rows,
            group=self._vocabulary_group(),
            options=HeadOptions(
                reduce_hidden_grad=not parallel, fuse_main_grad=self.config.gradient_accumulation_fusion
            ),
            sources=SourceSums(sources.ids.t(), sources.sums),
        )
        return total

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        sources: SourceSums | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Losses [b, s] with labels; without, logits [b, s, v/TP] with padding at minus infinity.

        With `sources` of ids [b, s], and `loss_mask` [b, s], the sum of the unmasked losses, which are added to it.

        megatron-core's `output_processor` takes the place of the head; masking the padding is then its own affair.
        """
        # Its attention is told "causal" and would ignore a mask.
        assert attention_mask is None or not self.engine, "Transformer Engine's attention takes no mask here"
        if sources is not None:
            kwargs |= {"output_processor": self._training_loss, "output_processor_context": sources}
        output = super().forward(input_ids, position_ids, attention_mask, labels=labels, **kwargs)
        is_logits = self.post_process and labels is None and kwargs.get("output_processor") is None
        return self.mask_padding(output) if is_logits else output

    def mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel logits [..., v/TP] with padding at minus infinity, in place."""
        if self.real_rows < logits.shape[-1]:
            logits[..., self.real_rows :] = float("-inf")
        return logits


def unwrap(module: torch.nn.Module) -> LanguageModel:
    """The model inside a DistributedDataParallel, or the module itself."""
    while not isinstance(module, LanguageModel):
        inner = module.module
        assert isinstance(inner, torch.nn.Module)
        module = inner
    return module
