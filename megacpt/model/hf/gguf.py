"""A GGUF file of the Llama architecture, dequantised by transformers (packages transformers, gguf and accelerate)."""

from pathlib import Path
from typing import Any

import torch

from megacpt.errors import UserError
from megacpt.model.hf.weight_files import TensorInfo


class GGUF:
    """The whole model in fp32: a quantised block cannot be cut where a shard ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        transformers = _transformers(path)
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            # gguf and transformers raise whatever their parsers meet.
            raise UserError(f"{path}: truncated, or not a GGUF file of a known architecture ({error})") from error
        self.config: dict[str, Any] = config.to_dict()
        self.config.pop("quantization_config", None)
        self.config["architectures"] = [_architecture(config)]
        self._state: dict[str, torch.Tensor] | None = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._state is None:
            transformers = _transformers(self.path)
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    self.path.parent, gguf_file=self.path.name, dtype=torch.float32
                )
            except Exception as error:
                raise UserError(f"{self.path}: truncated or damaged ({error}); download it again") from error
            self._state = dict(model.state_dict())
        return self._state

    def describe(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(tuple(t.shape), t.dtype, self.path, str(t.dtype)) for n, t in self._tensors().items()}

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        return self._tensors()[name][where]

    def close(self) -> None:
        self._state = None


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer that a GGUF file holds as Hugging Face's files."""
    folder.mkdir(parents=True, exist_ok=True)
    _transformers(path).AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _architecture(config: Any) -> str:
    named = getattr(config, "architectures", None)
    return (
        named[0]
        if named
        else {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}.get(config.model_type, config.model_type)
    )


def _transformers(path: Path) -> Any:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path}: GGUF files are read through transformers, and {error.name} is not installed; "
            "pip install 'megacpt[hf]'"
        ) from error
    return transformers
