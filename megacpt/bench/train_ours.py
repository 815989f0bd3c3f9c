"""Our trainer's steps, timed: `python -m megacpt.bench.train_ours CONFIG RESULT [--stock] [section.key=value ...]`.

--stock: the same trainer on megatron-core's own layer specs, as Megatron-LM builds them.
"""

import sys
from pathlib import Path

import torch

from megacpt.bench.contestant import Result, Stopwatch
from megacpt.config.architecture import Architecture
from megacpt.config.load import load_config
from megacpt.config.tree import Model
from megacpt.runtime.compiler import load_megatron_core
from megacpt.runtime.setup import quiet_third_parties, setup, teardown


def use_stock_specs() -> None:
    """Put megatron-core's own layer specs in the place of ours: of Transformer Engine, if it is here, or local."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules

    from megacpt.model import build

    def stock(architecture: Architecture, model: Model, layers: int, *, engine: bool) -> TransformerBlockSubmodules:
        assert architecture.normalization == "RMSNorm"
        if engine:
            layer, norm = get_gpt_layer_with_transformer_engine_spec(), LayerNormImpl
        else:
            # LayerNormImpl is Transformer Engine's wherever that imports, which a CPU cannot run.
            layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), WrappedTorchNorm
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)

    setattr(build, "block_spec", stock)  # noqa: B010


def main() -> None:
    """Train the plan's steps."""
    config_path, result_path, *flags = sys.argv[1:]
    quiet_third_parties()
    if "--stock" in flags:
        use_stock_specs()  # and its functions compiled, as it has them
    else:
        load_megatron_core()
    from megacpt.train.build import build_job
    from megacpt.train.planning import make_plan

    config = load_config(config_path, [flag for flag in flags if flag != "--stock"])
    plan = make_plan(config, 1, on_gpu=torch.cuda.is_available())
    job = build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))
    result, watch = Result(), Stopwatch()
    for iteration in range(1, plan.last_iteration + 1):
        batches = job.next_batch()
        watch.lap()
        job.step(batches, plan.learning_rate(iteration))
        result.step_took(watch.lap())
        loss, tokens = job.progress.interval.tolist()
        result.losses.append(sum(loss) / sum(tokens))
        job.progress.interval.zero_()
    result.write(Path(result_path))
    teardown()


if __name__ == "__main__":
    main()
