"""PyramidKV: SnapKV's scores under budgets that fall with depth (Cai et al., 2406.02069).

Budgets fall linearly from the first layer to the last, which gets 1/``beta`` of the mean (both
without the window).  Their mean is the requested budget.

Deviations: query heads that share a KV head are averaged, as in our SnapKV; where the budgets of
the first layers exceed the text, the surplus goes to the other layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyramidinfer.config import is_number, named_options
from pyramidinfer.policies.budgets import linear_budget
from pyramidinfer.policies.snapkv import WindowRetaining
from pyramidinfer.types import Layers

__all__ = ["PyramidKV"]


@named_options
@dataclass(frozen=True)
class PyramidKV(WindowRetaining):
    """Pooled window attention per KV head, more in early layers.

    capacity : entries per layer, as a mean over layers (not used with ``keep``).
    beta : the mean budget divided by the last layer's, without the window; 1 is flat.
    keep : replaces ``capacity``: see ``Retaining``; generated entries are kept in addition.
    """

    name: ClassVar[str] = "pyramidkv"

    window: int = 8
    capacity: int = 2048
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.beta) and self.beta >= 1):
            raise ValueError(f"beta={self.beta!r} must be at least 1")

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        mean = max(1, self.mean_budget(text_len) - self.window)
        last = mean / self.beta
        ends = (2 * mean - last, last)
        most = max(1, text_len - self.window)
        return self.window + max(1, linear_budget(layer, layers.count, *ends, most=most))
