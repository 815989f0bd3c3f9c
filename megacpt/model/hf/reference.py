"""What transformers computes from a folder's weights, with one layer of them in memory at a time."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megacpt.errors import UserError
from megacpt.model.hf.source import Source


@dataclass(frozen=True)
class Activations:
    """fp32: the embeddings and every layer's output [n, s, h], in order, and the logits [n, s, vocabulary]."""

    states: list[torch.Tensor]
    logits: torch.Tensor


def require_transformers() -> None:
    """Refuse to go on where the gate cannot run.

    Raises:
        UserError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "the gate compares logits with transformers, which is not installed; pip install 'megacpt[hf]', or "
            "do without it at your own risk (--no-gate, init.gate=false)"
        )


@torch.no_grad()
def reference_activations(
    source: Source, config: Mapping[str, object], tokens: torch.Tensor, weight_dtype: torch.dtype
) -> Activations:
    """transformers' own model and forward pass on `tokens` int64 [n, s], in fp32 on weights rounded to `weight_dtype`.

    The model is built without storage; a layer gets its weights when the forward pass reaches it and loses them after.

    Args:
        config: the contents of config.json.
    """
    import transformers

    settings = transformers.CONFIG_MAPPING[source.family.model_type].from_dict(dict(config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    for path, module in list(model.named_modules()):
        # Rotary frequencies are computed, not loaded: build that module again, with storage.
        if module._buffers and not module._parameters and not list(module.children()):
            model.set_submodule(path, type(module)(config=settings).to(tokens.device))
    states: list[torch.Tensor] = []
    for path, module in _units(model, source.family.decoder).items():
        _lend_weights(module, path, source, tokens.device, weight_dtype)
        if path.startswith(f"{source.family.decoder}."):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: states.append(args[0]) if not states else None, with_kwargs=True
            )
            module.register_forward_hook(
                lambda _, args, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
    logits = model(input_ids=tokens, use_cache=False).logits
    return Activations(states, logits)


def _units(model: torch.nn.Module, decoder: str) -> dict[str, torch.nn.Module]:
    """The modules that come and go whole: every decoder layer, and every other module with parameters of its own."""
    depth = decoder.count(".") + 2
    found = {}
    for path, module in model.named_modules():
        if path.startswith(f"{decoder}."):
            if path.count(".") + 1 == depth:
                found[path] = module
        elif module._parameters:
            found[path] = module
    return found


def _lend_weights(
    unit: torch.nn.Module, path: str, source: Source, device: torch.device, weight_dtype: torch.dtype
) -> None:
    places = [
        (module, name, f"{path}.{inner}.{name}" if inner else f"{path}.{name}")
        for inner, module in unit.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    empty = [module._parameters[name] for module, name, _full in places]

    def fill(*_arguments: object) -> None:
        for module, name, full in places:
            # A tied output layer has no tensor of its own.
            stored = source.family.renamed.get(full, full)
            if stored not in source.tensors:
                stored = source.family.weights[0].parts[0].name
            tensor = source.read(stored).to(weight_dtype).to(device, torch.float32)
            module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)

    def empty_again(*_arguments: object) -> None:
        for (module, name, _full), parameter in zip(places, empty, strict=True):
            module._parameters[name] = parameter

    unit.register_forward_pre_hook(fill, prepend=True)
    unit.register_forward_hook(empty_again)
