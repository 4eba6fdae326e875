"""H2O: heavy hitters and recent tokens (Zhang et al., 2306.14048).

Every entry carries the running sum of the attention it was given, per KV head; half the budget is
the newest entries, half the heaviest of the rest, and the lightest goes at each step.

Deviation: query heads that share a KV head are added up, since they share its entries.
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
    """Recent half, heaviest half, per KV head.

    heavy_ratio, recent_ratio : shares of the text kept as the heaviest and as the newest entries
        (published: 0.1 and 0.1; not used with ``keep``).
    keep : instead of both: see ``Retaining``; half of it recent.  Held while generating.
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
