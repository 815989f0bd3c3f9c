"""How far weights have moved from those of iteration 0, w0, by layer: mean |dw| / |w0| and ||dw|| / ||w0||.

Guo et al. 2024 (arXiv 2406.14833) average (w - w0) / w0 over the top and bottom 5 layers and take the ratio bottom/top.
Compared are the model's weights as a checkpoint or an export holds them: in bf16 training the rounded ones, so that
updates below half a unit in the last place (2^-9 of the weight) do not show. An element with w0 = 0 takes no part in
the mean, and does in the norms. The mean is dominated by elements whose w0 is near 0; the norm ratio is not.

w0 is kept in host memory, one copy over all data-parallel ranks together, and read again from `init` on resume.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megacpt.errors import UserError
from megacpt.files import write_json
from megacpt.model.gpt import LanguageModel
from megacpt.train.rows import Row
from megacpt.train.shares import BLOCK, Share, sum_over_ranks, weight_shares

RECORD = "base_weights.json"
TOLERANCE = 1e-9
"""Of a layer's norm; it differs in rounding between layouts."""


@dataclass(frozen=True)
class BaseWeights:
    """This rank's share of the transformer layers' weights at iteration 0.

    Attributes:
        values: for each share its elements, flat, the model's dtype, on the CPU.
        layers: layers of the whole model.
    """

    shares: list[Share]
    values: list[torch.Tensor]
    layers: int

    @classmethod
    def copy(cls, chunks: Sequence[LanguageModel]) -> "BaseWeights":
        """Of the weights as they are now."""
        shares = weight_shares(chunks)
        values = [share.of(share.parameter).to("cpu", copy=True) for share in shares]
        return cls(shares, values, chunks[0].config.num_layers)

    def norms(self) -> list[float]:
        """||w0|| of each layer, on every rank."""
        squares = torch.zeros(self.layers, dtype=torch.float64)
        for share, values in zip(self.shares, self.values, strict=True):
            squares[share.layer] += sum(float(block.double().square().sum()) for block in values.split(BLOCK))
        return sum_over_ranks(squares).sqrt().tolist()


@torch.no_grad()
def weight_update(base: BaseWeights, outermost: int) -> Row:
    """The row of the weights as they are now, without the common fields, on every rank.

    Args:
        outermost: layers in each of top (nearest the output) and bottom; at most half of the model's are taken.
            Their elements are pooled.
    """
    sums = torch.zeros(base.layers, 4, dtype=torch.float64)
    for share, values in zip(base.shares, base.values, strict=True):
        now = share.of(share.parameter)
        total = sum(map(_sums, now.split(BLOCK), values.split(BLOCK)), start=torch.zeros(4, dtype=torch.float64))
        sums[share.layer] += total
    sums = sum_over_ranks(sums)
    count = max(1, min(outermost, base.layers // 2))
    bottom, top = _ratios(sums[:count].sum(0)), _ratios(sums[-count:].sum(0))
    return {
        "weight_update": [{"layer": layer} | _ratios(sums[layer]) for layer in range(base.layers)],
        "top": {"layers": count} | top,
        "bottom": {"layers": count} | bottom,
        "ratio": {kind: _quotient(bottom[f"{kind}_ratio"], top[f"{kind}_ratio"]) for kind in ("mean", "norm")},
    }


def _sums(now: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """float64 [4]: sum of |dw|/|w0| where w0 is not 0, how many those are, sums of dw^2 and w0^2."""
    w0 = base.to(now.device).float()
    change = now.float() - w0
    nonzero = w0 != 0
    ratios = torch.where(nonzero, change / w0, 0).abs()
    parts = (ratios, nonzero, change.double().square(), w0.double().square())
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()


def _ratios(sums: torch.Tensor) -> dict[str, float]:
    ratio, nonzero, change, base = sums.tolist()
    return {
        "mean_ratio": ratio / nonzero if nonzero else 0.0,
        "norm_ratio": math.sqrt(change / base) if base else 0.0,
    }


def _quotient(above: float, below: float) -> float | None:
    """None where nothing has moved below, as with frozen layers."""
    return above / below if below else None


def record_base(folder: Path, origin: str, norms: list[float]) -> None:
    """Note in the run folder which weights a run began from."""
    write_json(folder / RECORD, {"from": origin, "layer_norms": norms})


def recorded_origin(folder: Path) -> str | None:
    """Where the weights came from, as noted; None before the first note."""
    record = _read(folder)
    return None if record is None else record["from"]


def check_base(folder: Path, base: BaseWeights) -> None:
    """Refuse weights that are not those with which the run began.

    Raises:
        UserError: on every rank.
    """
    record, norms = _read(folder), base.norms()
    if record is not None and any(
        not math.isclose(old, new, rel_tol=TOLERANCE) for old, new in zip(record["layer_norms"], norms, strict=True)
    ):
        raise UserError(
            f"{folder / RECORD}: the weights read again from {record['from']} are not those that this run began from; "
            "restore them, or unset diagnostics.weight_update"
        )


def _read(folder: Path) -> Row | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"from": str(record["from"]), "layer_norms": [float(norm) for norm in record["layer_norms"]]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove it") from error
