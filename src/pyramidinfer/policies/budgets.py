"""Curves of shares and budgets over depth."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["CURVES", "curve_ratio", "linear_budget"]

#: ``curve(layer, layers, end)``: the share of the context that is kept after ``layer``.
CURVES: dict[str, Callable[[int, int, float], float]] = {
    # The released PyramidInfer code: half a cosine from 1 down to ``end``.
    "cosine": lambda layer, layers, end: (
        (1 - end) * (math.cos(math.pi * layer / layers) + 1) / 2 + end
    ),
    # A line from 1 to ``end``.  (In the released code "linear" silently means "constant".)
    "linear": lambda layer, layers, end: 1 - (1 - end) * layer / layers,
    # The same share after every layer, so what is left falls geometrically with depth.
    "constant": lambda layer, layers, end: end,
}


def curve_ratio(curve: str, layer: int, layers: int, end: float) -> float:
    """Share kept after ``layer`` of ``layers`` by a named curve that ends at ``end``."""
    return CURVES[curve](layer, layers, end)


def linear_budget(layer: int, layers: int, first: float, last: float, *, most: int) -> int:
    """A layer's budget on a line from ``first`` to ``last`` entries.

    If an end is above ``most`` (the number of entries there are), it is cut to that and the other
    end gets the surplus, so that the mean does not change.
    """
    total = min(first + last, 2.0 * most)
    first, last = max(total - most, min(first, most)), max(total - most, min(last, most))
    step = (last - first) / (layers - 1) if layers > 1 else 0.0
    return round(first + layer * step)
