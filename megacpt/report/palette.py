"""Palettes of heat maps: even in lightness, so that they can be read without colours and by colour-blind readers."""

from collections.abc import Sequence

SEQUENTIAL = (
    "#440154",
    "#482878",
    "#3e4a89",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6dcd59",
    "#b4de2c",
    "#fde725",
)
"""Ten points of viridis."""
DIVERGING = ("#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac", "#542788")
"""ColorBrewer's PuOr."""


def shade(palette: Sequence[str], share: float) -> str:
    """The colour at a share 0..1 of a palette, linear between its points."""
    at = min(1.0, max(0.0, float(share))) * (len(palette) - 1)
    below = min(int(at), len(palette) - 2)
    rest = at - below

    def channel(start: int) -> int:
        low, high = (int(palette[number][start : start + 2], 16) for number in (below, below + 1))
        return round(low + (high - low) * rest)

    return "#" + "".join(f"{channel(start):02x}" for start in (1, 3, 5))
