"""How a share falls with depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

__all__ = ["CURVES", "SHAPES", "curve_ratio", "fill_budgets", "linear_budget"]

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


#: ``shape(layer, layers)`` → a layer's budget relative to the others'.
SHAPES: dict[str, Callable[[int, int], float]] = {
    "level": lambda layer, layers: 1.0,
    "linear": lambda layer, layers: float(layers - layer),
    "cosine": lambda layer, layers: 0.05 + (math.cos(math.pi * (layer + 0.5) / layers) + 1) / 2,
    "rising": lambda layer, layers: float(layer + 1),
}


@lru_cache(maxsize=256)
def fill_budgets(shape: str, keep: float, reach: tuple[float, ...]) -> tuple[float, ...]:
    """Shares per layer of a named shape, ``keep`` in the mean, none above its ``reach``.

    What a layer cannot hold goes to the others; where all are full the mean stays below ``keep``.
    """
    weights = [SHAPES[shape](layer, len(reach)) for layer in range(len(reach))]

    def held(level: float) -> list[float]:
        return [min(most, level * weight) for most, weight in zip(reach, weights, strict=True)]

    wanted, low, high = keep * len(reach), 0.0, 1.0 / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(held(middle)) < wanted else (low, middle)
    return tuple(held(high))
