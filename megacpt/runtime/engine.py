"""Transformer Engine and apex as this machine has them: whether they import, and what the card can do."""

import importlib
import importlib.util
from dataclasses import dataclass

import torch

from megacpt.config.tree import Config
from megacpt.errors import UserError

ENGINE = "transformer_engine"
CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""By FP8 recipe, the compute capability from which Transformer Engine's kernels exist."""
ARCHITECTURES = {(8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell"}


@dataclass(frozen=True)
class Choice:
    """Which layers a run has, and why: printed when it starts."""

    transformer_impl: str
    reason: str

    @property
    def engine(self) -> bool:
        """Whether they are Transformer Engine's."""
        return self.transformer_impl == ENGINE

    def __str__(self) -> str:
        return f"{self.transformer_impl} ({self.reason})"


def choose_transformer_impl(asked: str | None, *, on_gpu: bool) -> Choice:
    """What `model.transformer_impl` means here. Never changes what was asked for."""
    if asked is not None:
        return Choice(asked, "model.transformer_impl")
    if not on_gpu:
        return Choice("local", "on a CPU")
    problem = import_problem(ENGINE)
    if problem is None:
        return Choice(ENGINE, "a GPU and the package are there")
    return Choice("local", f"{ENGINE} does not import: {problem}")


def plans_for_gpu(config: Config) -> bool:
    """Whether a plan that is only looked at is one for GPUs: they are here, or the layers asked for need them."""
    return torch.cuda.is_available() or config.model.transformer_impl == ENGINE


def import_problem(package: str) -> str | None:
    """Why a package does not import, in one line; None if it does."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        # `import transformer_engine` alone succeeds where its torch extension does not load.
        importlib.import_module(f"{package}.pytorch" if package == ENGINE else package)
    except Exception as error:  # A broken installation fails in many ways: a missing library, another torch, ...
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def check_available(config: Config, choice: Choice) -> None:
    """Refuse what this machine cannot do. Not asked by a dry run, which plans for another machine.

    Raises:
        UserError: Transformer Engine or apex does not import, or the card is older than the FP8 recipe.
    """
    model, optimizer = config.model, config.optimizer
    if choice.engine or optimizer.use_precision_aware_optimizer:
        key = f"model.transformer_impl {ENGINE}" if choice.engine else "optimizer.use_precision_aware_optimizer"
        if (problem := import_problem(ENGINE)) is not None:
            raise UserError(f"{key}: the package {ENGINE} does not import ({problem}); install it or leave the key out")
    if model.gradient_accumulation_fusion and not choice.engine and not apex_adds_gradients():
        raise UserError(
            "model.gradient_accumulation_fusion with local layers needs apex's fused_weight_gradient_mlp_cuda, which "
            "does not import; install apex with --cpp_ext --cuda_ext, or leave the key out"
        )
    if model.fp8 is not None and torch.cuda.is_available():
        check_card(model.fp8_recipe, torch.cuda.get_device_capability(), torch.cuda.get_device_name())


def check_card(recipe: str, capability: tuple[int, int], card: str) -> None:
    """Refuse an FP8 recipe on a card that has no kernels for it.

    Raises:
        UserError: names the key and what would do.
    """
    needed = CAPABILITY[recipe]
    if capability < needed:
        instead = [name for name, least in CAPABILITY.items() if least <= capability]
        hint = f"choose model.fp8_recipe {' or '.join(instead)}" if instead else "set model.fp8 to null"
        raise UserError(
            f"model.fp8_recipe {recipe} needs a card of compute capability {needed[0]}.{needed[1]} "
            f"({ARCHITECTURES[needed]}) or newer, and {card} has {capability[0]}.{capability[1]}; {hint}"
        )


def apex_adds_gradients() -> bool:
    """Whether apex's matmul that adds a weight's gradient to a buffer is here, which megatron-core's layers call."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
