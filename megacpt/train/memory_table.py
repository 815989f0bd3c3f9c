"""The memory of every rank as a table for a terminal."""

from collections.abc import Iterator, Sequence

from megacpt.data.mixture.table import aligned
from megacpt.train.memory import FP32, MOMENTS, Setting, State, base_weights_bytes, chunk_parameters, stage_state
from megacpt.train.peak import Peak, stage_peak

COLUMNS = (
    "stage",
    "layers",
    "parameters",
    "weights",
    "gradients",
    "optimizer",
    "in flight",
    "activations",
    "logits",
    "temporary",
    "total",
)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes for people: `1.50 GiB`."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 else f"{count:,.2f} {UNITS[unit]}"


def memory_table(setting: Setting) -> Iterator[str]:
    """A row per pipeline stage, what one of its ranks holds; neighbouring stages that are alike share a row."""
    stages = range(setting.layout.pipeline)
    held = [(stage_state(setting, stage), stage_peak(setting, stage)) for stage in stages]
    rows: list[tuple[list[int], list[str]]] = []
    for stage in stages:
        cells = _cells(setting, *held[stage])
        if rows and rows[-1][1] == cells:
            rows[-1][0].append(stage)
        else:
            rows.append(([stage], cells))
    device = "on a GPU" if setting.on_gpu else "on a CPU"
    yield f"memory of a rank by pipeline stage, {device}, at the largest moment of a step"
    yield from aligned(COLUMNS, [[_span(group), *cells] for group, cells in rows], [""] * len(COLUMNS))[:-2]
    unit = "micro-batches" if setting.layout.virtual is None else "micro-batches of one chunk"
    yield f"optimizer: {_optimizer(setting)}; in flight: {unit} that wait for their backward"
    totals = [state.total + moment.total for state, moment in held]
    yield f"largest: stage {totals.index(max(totals))} with {size(max(totals))} a rank"
    host = max(state.host for state, _ in held)
    if host:
        yield f"and in host memory up to {size(host)} a rank: main parameters, moments and their gradients (offloaded)"
    if setting.config.optimizer.use_distributed_optimizer:
        yield _gathered(setting)
    if setting.config.model.fp8_param_gather:
        yield "weights: of the FP8 layers a matrix and its transpose in FP8, and none in bf16"
        yield _originals(setting)
    elif setting.config.model.fp8 is not None:
        yield "weights: with FP8, also a matrix and its transpose of each layer in FP8"
    weight_update = setting.config.diagnostics.weight_update
    if weight_update.at or weight_update.every is not None:
        yield (
            f"and in host memory up to {size(base_weights_bytes(setting))} a rank, the weights of iteration 0 "
            "(diagnostics.weight_update)"
        )


def _originals(setting: Setting) -> str:
    most = max(stage_state(setting, stage).parameters for stage in range(setting.layout.pipeline))
    return (
        f"and in host memory, until there is an optimizer, up to {size(FP32 * most)} a rank: weights as they were "
        "read or drawn (half of it from a bf16 source)"
    )


def _gathered(setting: Setting) -> str:
    """As `DistributedOptimizer.get_parameter_state_dp_zero` of megatron-core makes it, on all ranks."""
    stages = range(setting.layout.pipeline)
    chunks = [[chunk_parameters(setting, stage, chunk) for chunk in range(setting.chunks)] for stage in stages]
    most = max(sum(p.numel for chunk in stage for p in chunk if p.trains) for stage in chunks)
    return (
        f"and in host memory, while a checkpoint is saved or loaded, {size((1 + MOMENTS) * FP32 * most)} a rank: main "
        "parameters and moments of all data-parallel ranks, in fp32"
    )


def _optimizer(setting: Setting) -> str:
    optimizer = setting.config.optimizer
    moments = sorted({optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype})
    words = f"{' and '.join(moments)} moments"
    return f"fp32 main parameters, {words}" if setting.dtype.itemsize == 2 else words


def _cells(setting: Setting, state: State, held: Peak) -> list[str]:
    return [
        f"{setting.chunk_layers * setting.chunks:,}",
        f"{state.parameters:,}",
        *map(size, (state.weights, state.gradients, state.optimizer)),
        f"{held.in_flight:,}",
        *map(size, (held.saved, held.logits, held.temporary, state.total + held.total)),
    ]


def _span(stages: Sequence[int]) -> str:
    return str(stages[0]) if len(stages) == 1 else f"{stages[0]}-{stages[-1]}"
