"""How a share falls with depth."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["CURVES", "curve_ratio", "linear_budget"]

#: ``curve(layer, layers, end)`` → the share of the context kept after ``layer``.
CURVES: dict[str, Callable[[int, int, float], float]] = {
    # PyramidInfer, released code: falls from 1 towards ``end`` along half a cosine.
    "cosine": lambda layer, layers, end: (
        (1 - end) * (math.cos(math.pi * layer / layers) + 1) / 2 + end
    ),
    # Falls evenly from 1 to ``end``.  (The released code's "linear" silently means "constant".)
    "linear": lambda layer, layers, end: 1 - (1 - end) * layer / layers,
    # The same share after every layer: geometric over depth, since each acts on what is left.
    "constant": lambda layer, layers, end: end,
}


def curve_ratio(curve: str, layer: int, layers: int, end: float) -> float:
    """Share kept after ``layer`` of ``layers`` by a named curve ending at ``end``."""
    return CURVES[curve](layer, layers, end)


def linear_budget(layer: int, layers: int, first: float, last: float, *, most: int) -> int:
    """A layer's share of budgets that run evenly from ``first`` to ``last`` entries.

    Where an end is above ``most`` (there are no more entries than that) it is cut to it and the
    other end takes what is left over, so that the mean stays.
    """
    total = min(first + last, 2.0 * most)
    first, last = max(total - most, min(first, most)), max(total - most, min(last, most))
    step = (last - first) / (layers - 1) if layers > 1 else 0.0
    return round(first + layer * step)
