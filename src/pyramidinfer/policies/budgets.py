"""Curves of shares and budgets over depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

__all__ = ["CURVES", "SHAPES", "curve_ratio", "fill_budgets", "linear_budget"]

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


#: ``shape(layer, layers)``: a layer's budget relative to the others.
SHAPES: dict[str, Callable[[int, int], float]] = {
    "level": lambda layer, layers: 1.0,
    "linear": lambda layer, layers: float(layers - layer),
    "cosine": lambda layer, layers: 0.05 + (math.cos(math.pi * (layer + 0.5) / layers) + 1) / 2,
    "rising": lambda layer, layers: float(layer + 1),
}


@lru_cache(maxsize=256)
def fill_budgets(shape: str, keep: float, reach: tuple[float, ...]) -> tuple[float, ...]:
    """Shares per layer by a named shape, with the mean ``keep`` and none above its ``reach``.

    The surplus of a full layer goes to the others; if all are full, the mean stays below ``keep``.
    """
    weights = [SHAPES[shape](layer, len(reach)) for layer in range(len(reach))]

    def held(level: float) -> list[float]:
        return [min(most, level * weight) for most, weight in zip(reach, weights, strict=True)]

    wanted, low, high = keep * len(reach), 0.0, 1.0 / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(held(middle)) < wanted else (low, middle)
    return tuple(held(high))
