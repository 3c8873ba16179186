"""The colours of figures, and which of black and white can be read on one."""

from __future__ import annotations

import itertools

#: Stages have an order, so their colours have one, too; from dark to light at the same hue steps for colour-blind eyes.
RAMP = ((38, 24, 95), (106, 30, 148), (178, 42, 125), (226, 96, 84), (246, 165, 45))
#: Colours of a heat map's cells by the share of the way from the smallest value to the largest.
HEAT = ((0.0, "#f3f8fc"), (0.55, "#9cc7e4"), (0.8, "#3d84bd"), (1.0, "#134b78"))
#: Colours of things without order (loss terms, costs).
COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#718096", "#b7791f", "#0987a0")


def ramp(n: int) -> list[str]:
    """Returns ``n`` colours along the ramp of stages."""
    found = []
    for i in range(n):
        at = i / max(n - 1, 1) * (len(RAMP) - 1)
        low = min(int(at), len(RAMP) - 2)
        mixed = [round(a + (b - a) * (at - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)]
        found.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return found


def heat_colour(share: float) -> tuple[int, int, int]:
    """Returns the colour of a heat map's cell, red, green and blue from 0 to 255, as Plotly mixes it."""
    for (low, first), (high, second) in itertools.pairwise(HEAT):
        if share <= high:
            at = (share - low) / (high - low)
            mixed = (round(a + (b - a) * at) for a, b in zip(_rgb(first), _rgb(second), strict=True))
            red, green, blue = mixed
            return red, green, blue
    return _rgb(HEAT[-1][1])


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def luminance(colour: tuple[int, int, int]) -> float:
    """Returns the relative luminance of a colour as WCAG 2.2 defines it, from 0 to 1."""
    parts = [v / 255 for v in colour]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def legible_on(colour: tuple[int, int, int]) -> str:
    """Returns black or white, whichever stands out more: at least 4.5 to 1 on any colour."""
    light = luminance(colour) + 0.05
    return "#000000" if light / 0.05 > 1.05 / light else "#fefefe"
