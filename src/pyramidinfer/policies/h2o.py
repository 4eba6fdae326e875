"""H2O: heavy hitters and recent tokens (Zhang et al., 2306.14048).

Every entry has a running sum of the attention that it received, per KV head.  Half of the budget
holds the newest entries, the other half the entries with the largest sums (heavy hitters).  At each
step the entry with the smallest sum is evicted.

Deviation: the attention of query heads that share a KV head is summed, since they share entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyramidinfer.config import check_share, named_options
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Needs, View

__all__ = ["H2O"]


@named_options
@dataclass(frozen=True)
class H2O(Retaining):
    """The newest entries and the heavy hitters, per KV head.

    heavy_ratio, recent_ratio : heavy hitters and newest entries, as shares of the text
        (published: 0.1 and 0.1; not used with ``keep``).
    keep : replaces both ratios, half for each: see ``Retaining``.  The budget also holds during
        generation.
    """

    name: ClassVar[str] = "h2o"
    uses_scores: ClassVar[bool] = True
    evicts: ClassVar[bool] = True

    heavy_ratio: float = 0.1
    recent_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("heavy_ratio", self.heavy_ratio)
        check_share("recent_ratio", self.recent_ratio)

    def entries(self, text_len: int) -> int:
        return int(text_len * self.heavy_ratio) + int(text_len * self.recent_ratio)

    def floor(self) -> int:
        return 2

    def needs(self, view: View) -> Needs:
        budget = self.limit(view)
        recent = budget - budget // 2
        if self.keep is None:
            recent = int(self.text_len(view) * self.recent_ratio)
        rule = Best(budget, "running", recent=recent) if self.over(view) else None
        return Needs(column_sums=view.phase != "decode", retain=rule)
