"""Scissorhands: the persistence of importance (Liu et al., 2305.17118).

Once a layer is over its budget B, the last ``window`` queries are looked back on: for each entry
the steps are counted in which it got less than an even share of the attention (below 1/t), and
the ``drop`` x B entries with the most such steps go; the newest ``recent`` never do.  Later layers
get more, the opposite of a pyramid.

Deviations: steps before an entry existed are not counted against it, nor, once a further text was
taken in (``extend``), steps before that text; query heads that share a KV
head count by their mean; after prefill exactly the budget stays, so that methods compare at equal
bytes; the paper gives no formula for the rise with depth, here it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.budgets import linear_budget
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Layers, Needs, Observation, Reduce, View

__all__ = ["Scissorhands"]


@named_options
@dataclass(frozen=True)
class Scissorhands(Retaining):
    """Entries with the fewest low-attention steps, per KV head.

    budget_ratio : B as a share of the text, mean over layers (not used with ``keep``; the paper
        reports a fifth of the cache as its strongest compression, 5x, and that is the default).
    window : history of queries that is counted over (w).
    recent : newest entries that always stay (r).
    drop : share of the budget that goes at a time while generating (m / B).
    rise : the last layer's budget over the mean, less one; the first layer has as much less.
    keep : instead of ``budget_ratio``: see ``Retaining``; never exceeded while generating.
    """

    name: ClassVar[str] = "scissorhands"
    evicts: ClassVar[bool] = True

    budget_ratio: float = 0.2
    window: int = 400
    recent: int = 10
    drop: float = 0.5
    rise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget_ratio", "drop", "rise"):
            check_share(name, getattr(self, name))
        check_whole("window", self.window, 1)
        check_whole("recent", self.recent, 1)

    def entries(self, text_len: int) -> int:
        return round(self.budget_ratio * text_len)

    def floor(self) -> int:
        return self.recent + 1

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        mean = self.mean_budget(text_len)
        ends = (mean * (1 - self.rise), mean * (1 + self.rise))
        return max(self.floor(), linear_budget(layer, layers.count, *ends, most=text_len))

    def needs(self, view: View) -> Needs:
        count, is_decode = self.limit(view), view.phase == "decode"
        if is_decode:
            count = view.kept_len - max(1, int(self.drop * count))
        rule = Best(max(count, self.floor()), "own", recent=self.recent)
        stays = rule if self.over(view) else None
        return Needs(self.window, Reduce("kv_mean", "below"), remember=not is_decode, retain=stays)

    def score(self, seen: Observation) -> Tensor:
        assert seen.scores is not None
        return -seen.scores

    def ring(self, prompt_len: int, max_new: int) -> int:
        return min(self.window, prompt_len + max_new)
