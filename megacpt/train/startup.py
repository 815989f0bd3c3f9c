"""What a run says when it starts."""

from megacpt.data.mixture.ledger import table
from megacpt.model.build import slot_classes
from megacpt.runtime.environment import describe_device, versions
from megacpt.train.job import Job
from megacpt.train.plan import Plan


def announce(job: Job) -> None:
    """Say what is active, how ranks are divided, which class fills each slot, what is read and where it goes on."""
    plan, log = job.plan, job.log
    assert log is not None
    layout, architecture = plan.layout, plan.architecture
    log.say(" | ".join(f"{name} {version}" for name, version in versions().items()))
    log.say(f"device: {describe_device(job.rank.device, job.rank.threads)}")
    log.say(f"transformer_impl: {plan.layers}{_precision(plan)}")
    virtual = f" (x{layout.virtual} virtual)" if layout.virtual else ""
    log.say(
        f"ranks: {layout.world_size} = TP {layout.tensor} x PP {layout.pipeline}{virtual} x CP {layout.context} x DP "
        f"{layout.data} | {str(plan.dtype).removeprefix('torch.')} | sequence parallel "
        f"{'on' if plan.config.model.sequence_parallel else 'off'} | distributed optimizer "
        f"{'on' if plan.config.optimizer.use_distributed_optimizer else 'off'}"
    )
    log.say(
        f"model: {architecture.parameters:,} parameters, {architecture.num_layers} layers of "
        f"{architecture.hidden_size}, vocabulary {architecture.vocab_size:,}"
    )
    for slot, name in slot_classes(job.chunks[0]).items():
        log.say(f"  {slot:<18} {name}")
    for line in (*table(plan.mixture).splitlines(), *plan.notes):
        log.say(line)
    if plan.resume is None:
        start = plan.config.init.checkpoint or plan.config.init.hf
        log.say(f"starting {'from the weights of ' + start if start else 'from fresh weights'}")
    elif plan.ended is not None:
        log.say(f"nothing to do: {plan.ended}; to go on from {plan.resume.folder}, change guard")
    elif plan.first_iteration >= plan.last_iteration:
        log.say(f"nothing to do: {plan.resume.folder} is the end of this plan ({plan.last_iteration} iterations)")
    else:
        log.say(f"resuming from {plan.resume.folder}")
        wrote = plan.resume.state.layout.get("transformer_impl", "local")
        if wrote != plan.layers.transformer_impl:
            ours = plan.layers.transformer_impl
            log.say(f"note: {wrote} layers wrote the checkpoint, {ours} ones go on: they round differently")
        if plan.resume.state.layout["threads"] != job.rank.threads:
            then, now = plan.resume.state.layout["threads"], job.rank.threads
            log.say(f"note: {then} threads per rank wrote the checkpoint, {now} go on: sums may round differently")


def _precision(plan: Plan) -> str:
    model = plan.config.model
    if model.fp8 is None:
        return ""
    outer = f", {model.num_layers_at_start_in_bf16} + {model.num_layers_at_end_in_bf16} layers in bf16"
    kept = ", parameters in FP8" if model.fp8_param_gather else ""
    return f" | fp8 {model.fp8}, {model.fp8_recipe}{kept}{outer if model.first_last_layers_bf16 else ''}"
