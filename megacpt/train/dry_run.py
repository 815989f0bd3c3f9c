"""The report of `--dry-run`: what a run of any layout would read, compute, hold in memory and write."""

from collections.abc import Iterator
from dataclasses import dataclass

from megacpt.config.architecture import DEFAULTS
from megacpt.data.mixture.ledger import table
from megacpt.train.memory import Setting, checkpoint_bytes, gathered_bytes
from megacpt.train.memory_table import memory_table, size
from megacpt.train.plan import Plan, fingerprint

LABEL = 13


def describe(plan: Plan) -> str:
    """The plan as text for a terminal. Reads nothing and builds nothing."""
    setting = plan.setting
    sections = [
        [*_model(setting), *_ranks(setting), *_line("layers", *_layers(plan))],
        table(plan.mixture).splitlines() + [f"note: {note}" for note in plan.notes],
        [*_steps(plan), *_schedule(plan), *_compute(plan), *_evaluation(plan)],
        list(memory_table(setting)),
        [
            *_checkpoints(plan, setting),
            *_start(plan),
            *_line("data", f"fingerprint {fingerprint(plan.mixture.fingerprint())}"),
        ],
        ["Computed, not measured. Not in the memory table: what the allocator and the communication library add."],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def flops(count: float) -> str:
    """Floating-point operations for people: `1.5 PFLOP`."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    index = 0
    while count >= 1000 and index < len(prefixes) - 1:
        count, index = count / 1000, index + 1
    return f"{count:.1f} {prefixes[index]}FLOP"


def _line(label: str, *texts: str) -> list[str]:
    """A labelled paragraph: the label once, the lines beside it."""
    return [f"{label if number == 0 else '':<{LABEL}}{text}" for number, text in enumerate(texts)]


def _model(setting: Setting) -> list[str]:
    shape, freeze = setting.architecture, setting.config.train.freeze
    preset = f"{setting.config.model.preset}, " if setting.config.model.preset else ""
    padded = setting.vocabulary_rows * setting.layout.tensor
    tables = "separate output layer" if shape.untie_embeddings_and_output_weights else "tied output layer"
    lines = [
        f"{preset}{shape.parameters:,} parameters, {str(setting.dtype).removeprefix('torch.')}",
        f"{shape.num_layers} layers of {shape.hidden_size:,}, {shape.num_attention_heads} heads on "
        f"{shape.num_query_groups} query groups of {shape.kv_channels} channels, FFN {shape.ffn_hidden_size:,}",
        f"vocabulary {shape.vocab_size:,}, padded to {padded:,}; {tables}",
    ]
    variant = {name: value for name in DEFAULTS if (value := getattr(shape, name)) != DEFAULTS[name]}
    if variant:
        lines.append("unlike Llama: " + ", ".join(f"{name} {value}" for name, value in variant.items()))
    frozen = freeze.top + freeze.bottom
    if frozen:
        lines.append(
            f"frozen: the lowest {freeze.bottom} and the highest {freeze.top} layers; "
            f"{shape.parameters - frozen * shape.layer_parameters:,} parameters are trained"
        )
    return _line("model", *lines)


def _ranks(setting: Setting) -> list[str]:
    layout, model = setting.layout, setting.config.model
    virtual = f" (x {layout.virtual} virtual)" if layout.virtual else ""
    on = [
        name
        for name, active in (
            ("sequence parallel", model.sequence_parallel),
            ("distributed optimizer", setting.config.optimizer.use_distributed_optimizer),
            (f"{model.recompute_granularity} recomputation", model.recompute_granularity is not None),
        )
        if active
    ]
    return _line(
        "ranks",
        f"{layout.world_size} = TP {layout.tensor} x PP {layout.pipeline}{virtual}"
        + (f" x CP {layout.context}" if layout.context > 1 else "")
        + f" x DP {layout.data}"
        + (f", {', '.join(on)}" if on else ""),
    )


def _layers(plan: Plan) -> Iterator[str]:
    model, optimizer = plan.config.model, plan.config.optimizer
    yield str(plan.layers)
    if model.fp8 is not None:
        outer = f"; {model.num_layers_at_start_in_bf16} + {model.num_layers_at_end_in_bf16} outermost layers in bf16"
        yield f"fp8 {model.fp8}, recipe {model.fp8_recipe}{outer if model.first_last_layers_bf16 else ''}"
    if model.fp8_param_gather:
        stages = range(plan.layout.pipeline)
        ours, bf16 = (max(gathered_bytes(plan.setting, s, fp8=fp8) for s in stages) for fp8 in (True, False))
        yield f"parameters of the FP8 layers in FP8; a rank gathers up to {size(ours)} a step (in bf16: {size(bf16)})"
    overlap = {
        "TP communication (tp_comm_overlap)": model.tp_comm_overlap,
        "gradient reduction": optimizer.overlap_grad_reduce,
        "parameter gather": optimizer.overlap_param_gather,
        "optimizer's copies": optimizer.overlap_cpu_optimizer_d2h_h2d,
    }
    if any(overlap.values()):
        yield f"overlapped with compute: {', '.join(name for name, active in overlap.items() if active)}"


def _steps(plan: Plan) -> list[str]:
    mixture, train = plan.mixture, plan.config.train
    micro_batches = mixture.global_batch_size // (train.micro_batch_size * plan.layout.data)
    samples = mixture.steps * mixture.global_batch_size
    epochs = ", ".join(f"{name} {float(passes):.2f}" for name, passes in mixture.epochs(mixture.stop).items())
    return _line(
        "steps",
        f"{mixture.steps:,} of {mixture.global_batch_size:,} samples x {mixture.seq_length:,} tokens: "
        f"{samples:,} samples, {samples * mixture.seq_length:,} token positions",
        f"a rank: {micro_batches:,} micro-batches of {train.micro_batch_size:,} a step",
        f"passes at the end: {epochs}",
    )


def _schedule(plan: Plan) -> list[str]:
    return _line("rate", *_phases(plan))


def _phases(plan: Plan) -> Iterator[str]:
    """The learning rate in words; iterations count from 1, as in the log."""
    rate, total = plan.schedule, plan.mixture.steps_available
    warm = rate.warmup_steps(total, plan.mixture.global_batch_size)
    end = rate.decay_iters(total)
    if warm:
        yield f"warm-up over {warm:,.6g} iterations, from {rate.lr_warmup_init:g} to the peak {rate.lr:g}"
    else:
        yield f"from the peak {rate.lr:g}, without warm-up"
    anneal = rate.lr_wsd_decay_iters or 0
    last = f"{rate.lr_wsd_decay_style} to {rate.min_lr:g} over the last {anneal:,} iterations before {end:,}"
    match rate.lr_decay_style:
        case "constant":
            yield "then constant"
        case "WSD":
            yield f"then constant, then {last}"
        case "infinite":
            yield f"then cosine to {rate.lr_constant:g} over {rate.lr_cooldown_iters:,} iterations, then constant"
            yield f"then {last}" if anneal else f"no anneal; the floor {rate.min_lr:g} only after iteration {end:,}"
        case style:
            yield f"then {style} to the floor {rate.min_lr:g} at iteration {end:,}"
    if plan.last_iteration > end and rate.lr_decay_style != "constant":
        yield f"then {rate.min_lr:g} to the end"
    first = plan.first_iteration + 1
    if first <= plan.last_iteration:
        yield (
            f"iteration {first:,} trains with {plan.learning_rate(first):.4g}, "
            f"the last ({plan.last_iteration:,}) with {plan.learning_rate(plan.last_iteration):.4g}"
        )


def _compute(plan: Plan) -> list[str]:
    mixture = plan.mixture
    token = plan.architecture.flops_per_token(mixture.seq_length)
    step = token * mixture.seq_length * mixture.global_batch_size
    run = step * (plan.last_iteration - plan.first_iteration)
    return _line(
        "compute",
        f"{flops(token)} a token (forward and backward, causal half), {flops(step)} a step",
        f"{flops(step / plan.layout.world_size)} a step and rank, {flops(run)} for the steps to come",
    )


@dataclass(frozen=True)
class EvaluationCost:
    """Validation in the steps to come: how often, samples forwarded each time (whole batches), share of the FLOPs."""

    times: int
    samples: int
    share: float


def evaluation_cost(plan: Plan) -> EvaluationCost:
    """A forward pass is a third of a training step's FLOPs; the last batch of a set is filled with padding."""
    batch = plan.mixture.global_batch_size
    first = plan.first_iteration + (1 if plan.resume else 0)
    times = sum(plan.evaluates_after(iteration) for iteration in range(first, plan.last_iteration + 1))
    samples = sum(-(-len(held_out) // batch) * batch for held_out in plan.eval_sets.values())
    forward = times * samples / 3
    trained = (plan.last_iteration - plan.first_iteration) * batch
    return EvaluationCost(times, samples, forward / (forward + trained) if forward else 0.0)


def _evaluation(plan: Plan) -> list[str]:
    settings = plan.config.eval
    if not plan.eval_sets:
        return _line("evaluation", "none (eval.sets is empty)")
    sets = []
    for name, held_out in plan.eval_sets.items():
        whole = len(held_out) == held_out.stream.samples_per_pass
        tokens = held_out.stream.dataset.tokens - 1 if whole else len(held_out) * held_out.stream.seq_length
        part = "" if whole else f" of {held_out.stream.samples_per_pass:,}"
        sets.append(f"{name}: {len(held_out):,}{part} samples, {tokens:,} target tokens")
    when = [f"after iterations {', '.join(map(str, settings.at))}"] if settings.at else []
    when += [f"every {settings.every:,} and at the end"] if settings.every else []
    cost = evaluation_cost(plan)
    return _line(
        "evaluation",
        *sets,
        f"{', '.join(when) or 'never'}: {cost.times:,} times {cost.samples:,} samples, "
        f"{cost.share:.1%} of the compute to come",
    )


def _checkpoints(plan: Plan, setting: Setting) -> list[str]:
    save = plan.config.save
    each = checkpoint_bytes(setting)
    times = sum(plan.saves_after(i) for i in range(plan.first_iteration + 1, plan.last_iteration + 1))
    kept = min(times, save.keep_last or times)
    when = f"every {save.interval:,} iterations and at the end" if save.interval else "at the end"
    parts = "weights, moments, fp32 main parameters" if setting.dtype.itemsize == 2 else "weights, moments"
    return _line(
        "checkpoints",
        f"{size(each)} each ({parts}), {when}: {times:,} written, {kept:,} kept = {size(each * kept)}",
        f"in {save.dir}/checkpoints",
    )


def _start(plan: Plan) -> list[str]:
    if plan.resume is None:
        weights = plan.config.init.checkpoint or plan.config.init.hf
        return _line("start", f"at iteration 0, from {'the weights of ' + weights if weights else 'fresh weights'}")
    if plan.ended is not None:
        return _line("start", f"nothing to do: {plan.ended}")
    if plan.first_iteration >= plan.last_iteration:
        return _line("start", f"nothing to do: {plan.resume.folder} is the end of this plan")
    left = plan.last_iteration - plan.first_iteration
    return _line("start", f"resumes from {plan.resume.folder}; {left:,} iterations to come")
