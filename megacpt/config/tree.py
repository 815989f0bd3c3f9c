"""The configuration tree: every key, its type, its default, and its meaning with unit. Names are Megatron's."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from megacpt.config.quantity import parse_count, parse_share


def _written[T](parse: Callable[[str], T]) -> BeforeValidator:
    """Lets a value also be written as text, such as `5B` or `10%`."""

    def read(value: Any) -> Any:
        return parse(value) if isinstance(value, str) else value

    return BeforeValidator(read)


Count = Annotated[PositiveInt, _written(parse_count)]
"""A number of things: 5000000000, 5e9 or 5B."""
Share = Annotated[float, Field(ge=0, le=1), _written(parse_share)]
"""A part of a whole: 0.1 or 10%."""


class Section(BaseModel):
    """A strict, immutable group of keys: an unknown key or a wrong type is an error."""

    # Strict, for else `true` would be 1 and a quoted number a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)


class Tokenizer(Section):
    """The tokenizer, where the datasets' manifests do not already say which one it was."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = Field(description="Megatron's tokenizer type")
    model: str = Field(description="path of tokenizer.model, or of tokenizer.json or its folder")


class Precision(Section):
    """Arithmetic of the step; main parameters and optimizer moments are fp32 whatever it is."""

    dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="parameters and activations; null: bf16 on a GPU, fp32 on a CPU"
    )
    grad_reduce_in_fp32: bool = Field(True, description="accumulate and reduce gradients in fp32")


class Model(Section):
    """Architecture (null takes the preset's value) and how it is laid out over ranks."""

    preset: str | None = Field(None, description="a name from megacpt/config/presets.py")
    num_layers: PositiveInt | None = Field(None, description="transformer layers")
    hidden_size: PositiveInt | None = Field(None, description="width of the residual stream")
    ffn_hidden_size: PositiveInt | None = Field(None, description="width of the MLP's hidden layer")
    num_attention_heads: PositiveInt | None = Field(None, description="query heads")
    num_query_groups: PositiveInt | None = Field(None, description="key/value heads (GQA)")
    kv_channels: PositiveInt | None = Field(None, description="channels per head")
    rotary_base: PositiveFloat | None = Field(None, description="RoPE base period")
    rope_scaling_factor: PositiveFloat | None = Field(
        None, description="Llama-3 RoPE scaling factor; null in preset and here: no scaling"
    )
    norm_epsilon: PositiveFloat | None = Field(None, description="epsilon inside the norm's square root")
    normalization: Literal["RMSNorm", "LayerNorm"] | None = Field(None, description="class of norm; null: RMSNorm")
    swiglu: bool | None = Field(None, description="SiLU-gated MLP (null); false: no gate, exact GELU")
    add_bias_linear: bool | None = Field(
        None, description="biases on attention's and the MLP's linear layers; null: none"
    )
    rotary_percent: PositiveFloat | None = Field(
        None, description="share of a head's channels that rotates; null: 1, all of them"
    )
    use_parallel_residual: bool | None = Field(
        None, description="attention and MLP read the same input, as in GPT-NeoX; null: one after the other"
    )
    untie_embeddings_and_output_weights: bool | None = Field(
        None, description="separate input embedding and output layer"
    )
    max_position_embeddings: PositiveInt | None = Field(None, description="longest seq_length allowed")
    vocab_size: PositiveInt | None = Field(
        None, description="real rows of the embedding; null: preset's, else the tokenizer's"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(128, description="rows are padded to a multiple of this x TP")
    init_method_std: PositiveFloat = Field(0.02, description="standard deviation of freshly drawn weights")
    tensor_model_parallel_size: PositiveInt = Field(1, description="ranks that share each weight matrix")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="ranks that share the stack of layers")
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(
        None, description="model chunks per pipeline rank (interleaved 1F1B)"
    )
    context_parallel_size: PositiveInt = Field(1, description="ranks that share each sequence")
    sequence_parallel: bool = Field(False, description="shard norms and residuals over the sequence within a TP group")
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = Field(
        None,
        description="how context-parallel ranks exchange keys and values; null: p2p, a ring; torch's: all_gather",
    )
    transformer_impl: Literal["transformer_engine", "local"] | None = Field(
        None,
        description="whose classes fill the layer's slots; null: transformer_engine where a GPU and the package are",
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = Field(
        "auto", description="Transformer Engine's attention: flash-attn, cuDNN (fused), or neither"
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None, description="matmuls of the layers in FP8; hybrid: gradients in e5m2; needs transformer_engine"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        "delayed", description="how scales are chosen; delayed: from the history of maxima; mxfp8: Blackwell"
    )
    fp8_margin: NonNegativeInt = Field(0, description="delayed: powers of two kept free above the largest value")
    fp8_amax_history_len: PositiveInt = Field(1024, description="delayed: steps of the history of maxima")
    fp8_amax_compute_algo: Literal["max", "most_recent"] = Field("max", description="delayed: which of them counts")
    fp8_param_gather: bool = Field(
        False, description="weights of the FP8 layers are kept and gathered in FP8 (distributed optimizer)"
    )
    first_last_layers_bf16: bool = Field(False, description="with fp8: the outermost layers stay in bf16")
    num_layers_at_start_in_bf16: NonNegativeInt = Field(1, description="so many at the input")
    num_layers_at_end_in_bf16: NonNegativeInt = Field(1, description="and at the output")
    tp_comm_overlap: bool = Field(
        False,
        description="TP's communication under the matmuls beside it (userbuffers); needs sequence_parallel",
    )
    gradient_accumulation_fusion: bool = Field(
        False, description="weight gradients are added to the gradient buffer by the matmul itself"
    )
    cross_entropy_loss_fusion: bool = Field(
        True, description="a fused cross-entropy; false: megatron-core's plain one, with an fp32 copy of the logits"
    )
    cross_entropy_fusion_impl: Literal["megacpt", "linear", "native", "te"] = Field(
        "megacpt",
        description="ours, with the gradient written over the logits; ours through the output layer, in chunks of "
        "tokens, so that full logits never exist; megatron-core's; or Transformer Engine's",
    )
    swiglu_fusion_impl: Literal["auto", "native", "megacpt"] = Field(
        "auto",
        description="megacpt: ours; native: megatron-core's fused one with Transformer Engine, else none; auto: ours "
        "on a CPU, where it keeps less memory, and native on a GPU",
    )
    rope_fusion_impl: Literal["auto", "native", "megacpt"] = Field(
        "auto",
        description="megacpt: ours; native: Transformer Engine's with its layers, else none; auto: as with swiglu",
    )
    cuda_graph_impl: Literal["none", "local"] = Field(
        "none", description="local: megatron-core captures each layer's forward and backward as CUDA graphs"
    )
    recompute_granularity: Literal["selective", "full"] | None = Field(
        None, description="activations computed again in backward"
    )
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = Field(
        None, description="with selective: which; null: core_attn"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(None, description="with full: which layers")
    recompute_num_layers: PositiveInt | None = Field(
        None, description="with full: layers per unit (uniform) or in all (block)"
    )

    @property
    def own_loss(self) -> Literal["megacpt", "linear"] | None:
        """Which of our two cross-entropies the model has; None for another's."""
        implementation = self.cross_entropy_fusion_impl
        if self.cross_entropy_loss_fusion and (implementation == "megacpt" or implementation == "linear"):
            return implementation
        return None

    def own_swiglu(self, *, on_gpu: bool) -> bool:
        """Whether our SwiGLU is in the layers of a model that has one."""
        return _ours(self.swiglu_fusion_impl, on_gpu)

    def own_rope(self, *, on_gpu: bool) -> bool:
        """Whether our RoPE is in the layers."""
        return _ours(self.rope_fusion_impl, on_gpu)


def _ours(implementation: str, on_gpu: bool) -> bool:
    # On a CPU a step with both needs less memory (benchmarks/train.csv); on a GPU nobody has measured.
    return implementation == "megacpt" or (implementation == "auto" and not on_gpu)


class Source(Section):
    """One named training source: exact passes (`epochs`) or a share of samples (`weight`, or data.mixture's preset)."""

    path: str = Field(description="dataset prefix: PATH.bin and PATH.idx")
    subset: str | None = Field(None, description="file of tools/select_subset.py: read these documents alone")
    tokens: Count | None = Field(None, description="with subset: its best documents, down to so many tokens")
    epochs: PositiveInt | None = Field(None, description="exact passes over every document")
    weight: NonNegativeFloat | None = Field(None, description="share of samples; relative where no source has epochs")
    redraw: Literal["each_pass", "once", "continue"] | None = Field(
        None,
        description="what each pass of data.mixture takes: a new draw (null), the first pass's again, or what follows",
    )
    repeat: bool = Field(False, description="a pass of the mixture may take more than the source has")


class Mixture(Section):
    """Shares by name, and passes of the mixture; see megacpt/data/mixture/recipe.py."""

    preset: Literal["llama1", "redpajama", "slimpajama", "olmo2"] | None = Field(
        None, description="rates of a published pre-training mixture, by its sources' names"
    )
    replace: list[str] = Field([], description="sources of the preset whose share goes to `with`")
    with_: str | None = Field(None, alias="with", description="the source of the new domain")
    replay: Share | None = Field(None, description="share of all other sources together, such as 10%")
    pass_tokens: Count | None = Field(None, description="tokens of a pass of the mixture, rounded to whole samples")
    passes: PositiveInt | None = Field(None, description="passes of the mixture")


class Phase(Section):
    """Other shares from some point of the run on: the first phase is data.sources and data.mixture."""

    after_tokens: Count | None = Field(None, description="begins when so many tokens are consumed")
    when_lr_below: Share | None = Field(
        None, description="begins when the learning rate has fallen below this part of its peak"
    )
    weights: dict[str, NonNegativeFloat] | None = Field(None, description="by source; a source left out gets none")
    replay: Share | None = Field(None, description="or a new value of data.mixture.replay")


class Data(Section):
    """What is read, and how documents are cut into samples."""

    seq_length: PositiveInt = Field(description="tokens per sample")
    sources: dict[str, Source] = Field({}, description="the sources, by name")
    data_path: str | list[str | float] | None = Field(
        None, description="instead of sources, Megatron's blend: WEIGHT PREFIX WEIGHT PREFIX ..."
    )
    mixture: Mixture = Mixture()
    phases: list[Phase] = Field([], description="shares that change within the run, in order")
    reset_attention_mask: bool = Field(False, description="keep attention inside documents")
    reset_position_ids: bool = Field(
        False, description="restart rotary phases at each document (with reset_attention_mask)"
    )
    num_workers: NonNegativeInt = Field(1, description="threads that read batches ahead; 0 reads in line")
    accept_change: bool = Field(
        False, description="on resume, accept a changed mixture: go on from what each source has consumed"
    )


class Freeze(Section):
    """Layers whose parameters stay as they are."""

    top: NonNegativeInt = Field(0, description="layers nearest the output")
    bottom: NonNegativeInt = Field(0, description="layers nearest the input")


class Train(Section):
    """Budget, batch and seed."""

    train_iters: PositiveInt | None = Field(None, description="steps; with epochs: an early stop")
    train_samples: Count | None = Field(None, description="budget in samples (mixtures without epochs)")
    train_tokens: Count | None = Field(None, description="budget in target tokens (mixtures without epochs)")
    micro_batch_size: PositiveInt = Field(1, description="samples per forward pass and data-parallel rank")
    global_batch_size: PositiveInt = Field(description="samples per step over all ranks")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of weights and of the order of data")
    log_interval: PositiveInt = Field(1, description="steps between log lines and training rows")
    freeze: Freeze = Freeze()


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = Field(description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of decay")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled decay; norms and biases have none")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    adam_eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm limit; 0: none")
    use_distributed_optimizer: bool = Field(False, description="shard optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients during backward")
    overlap_param_gather: bool = Field(False, description="gather parameters during forward (distributed optimizer)")
    use_precision_aware_optimizer: bool = Field(
        False, description="Transformer Engine's AdamW, whose state may be smaller (distributed optimizer, bf16)"
    )
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = Field("fp32", description="first moment as it is kept")
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = Field("fp32", description="second moment as it is kept")
    optimizer_cpu_offload: bool = Field(
        False, description="main parameters and moments in host memory, updated by the CPU (precision-aware)"
    )
    optimizer_offload_fraction: Share = Field(1.0, description="with it: which part of them")
    overlap_cpu_optimizer_d2h_h2d: bool = Field(False, description="with it: copy while the CPU computes")


class Schedule(Section):
    """Learning rate over steps; see megacpt/train/schedule.py."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD", "infinite"] = Field(
        "cosine", description="shape after warm-up"
    )
    lr_warmup_fraction: float | None = Field(None, ge=0, le=1, description="warm-up as a share of lr_decay_iters")
    lr_warmup_iters: NonNegativeInt | None = Field(None, description="warm-up in steps")
    lr_warmup_samples: NonNegativeInt | None = Field(None, description="warm-up in samples")
    lr_warmup_init: NonNegativeFloat = Field(0.0, description="learning rate at which warm-up (or re-warm) begins")
    lr_decay_iters: PositiveInt | None = Field(None, description="steps over which it decays; null: the whole plan")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        "exponential", description="shape of the last, decaying part of WSD and infinite"
    )
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="steps of that part")
    lr_cooldown_iters: NonNegativeInt | None = Field(None, description="infinite: steps from the peak to lr_constant")
    lr_constant: PositiveFloat | None = Field(None, description="infinite: learning rate of the constant part")


class Eval(Section):
    """Validation on named held-out sets, and tasks, at chosen steps and then regularly."""

    sets: dict[str, str] = Field({}, description="name: dataset prefix")
    at: list[NonNegativeInt] = Field([0], description="steps after which to validate; 0 is before the first")
    every: PositiveInt | None = Field(None, description="and every so many steps, and at the end")
    iters: PositiveInt | None = Field(None, description="global batches per set; null: the whole set")
    tasks: list[str] = Field([], description="tasks of lm_eval, and suites (megacpt/eval/suites.py), by name")
    task_data: str | None = Field(None, description="folder of TASK.jsonl[.gz]; null: MEGACPT_TASK_DATA")
    task_limit: PositiveInt | None = Field(None, description="the first so many items of each task; null: all")
    tasks_at: list[NonNegativeInt] | None = Field(None, description="steps after which to run tasks; null: eval.at")
    tasks_every: PositiveInt | None = Field(
        None, description="and every so many steps, and at the end; null: eval.every"
    )


class WeightUpdate(Section):
    """How far weights have moved from those of iteration 0; measured nowhere unless `at` or `every` is set."""

    at: list[PositiveInt] = Field([], description="steps after which to measure")
    every: PositiveInt | None = Field(None, description="and every so many steps, and at the end")
    layers: PositiveInt = Field(5, description="layers in each of top and bottom; at most half of the model's")


class GradientProbe(Section):
    """Gradients of a step's domain samples and of its other samples; off unless `at` or `every` is set."""

    at: list[PositiveInt] = Field([], description="steps whose batch is probed before it is trained on")
    every: PositiveInt | None = Field(None, description="and every so many steps; a probe costs about two steps")
    domain: list[str] = Field([], description="sources of the domain; []: data.mixture.with; the rest is general")


class Diagnostics(Section):
    """What is measured beside loss."""

    weight_update: WeightUpdate = WeightUpdate()
    gradient_probe: GradientProbe = GradientProbe()


class Guard(Section):
    """Against forgetting: each evaluation is compared with that of step 0."""

    metric: str = Field(
        description="validation/SET/loss, ppl, accuracy or bits_per_byte; task/NAME/METRIC; suite/NAME/mean"
    )
    max_drop: NonNegativeFloat = Field(
        description="how much worse than at step 0, in the metric's unit: lower accuracy, higher loss"
    )
    action: Literal["warn", "stop", "rollback"] = Field(
        "warn", description="a row and a line; also save and end; or end with the tracker on save.best's checkpoint"
    )


class Init(Section):
    """Weights to start from, at iteration 0 with a fresh optimizer."""

    checkpoint: str | None = Field(None, description="a checkpoints folder, or one iter_* folder in it")
    hf: str | None = Field(None, description="a Hugging Face model folder; it brings the model's shape")
    gate: bool = Field(True, description="with hf: compare logits with transformers before the first step")


class Best(Section):
    """Which checkpoint is the best: the one whose evaluation has the largest weighted sum of metrics."""

    weights: dict[str, float] = Field(description="by metric as in guard.metric; negative where lower is better")


class Save(Section):
    """Where a run lives and how often it is saved."""

    dir: str = Field(description="run folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/")
    interval: PositiveInt | None = Field(None, description="steps between checkpoints; the last step is always saved")
    keep_last: PositiveInt | None = Field(None, description="checkpoints kept; null: all")
    best: Best | None = Field(None, description="save each new best evaluation, and keep the best beside keep_last")
    hf_every: PositiveInt | None = Field(
        None,
        description="steps between exports to DIR/hf/iter_* (Hugging Face folders); and at the end",
    )


class Logging(Section):
    """Where numbers go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write SAVE.DIR/tensorboard with Megatron's tags")
    wandb_project: str | None = Field(None, description="Weights & Biases project; needs the wandb package")


class Runtime(Section):
    """Process-level settings."""

    threads: PositiveInt | None = Field(None, description="CPU threads per rank; null: cores / local ranks")
    distributed_timeout_minutes: PositiveFloat = Field(10.0, description="a collective that waits longer fails")


class Config(Section):
    """A whole run."""

    tokenizer: Tokenizer | None = None
    precision: Precision = Precision()
    model: Model
    data: Data
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    diagnostics: Diagnostics = Diagnostics()
    guard: Guard | None = None
    init: Init = Init()
    save: Save
    logging: Logging = Logging()
    runtime: Runtime = Runtime()
