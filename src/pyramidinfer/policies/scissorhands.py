"""Scissorhands: the persistence of importance (Liu et al., 2305.17118).

When a layer is over its budget B, the attention of the last ``window`` queries is examined.  For
each entry, the steps are counted in which it received less than an equal share (below 1/t).  The
``drop`` x B entries with the most such steps are evicted, but never the newest ``recent``.  Deeper
layers get larger budgets, the opposite of a pyramid.

Deviations: steps before an entry existed do not count against it; after a further text (``extend``)
neither do the steps before that text.  Query heads that share a KV head are averaged.  After
prefill exactly the budget stays, so that methods compare at equal bytes.  The paper gives no
formula for the rise with depth; here it is linear.
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
    """The entries with the fewest low-attention steps, per KV head.

    budget_ratio : B as a share of the text, as a mean over layers (not used with ``keep``; the
        paper's strongest compression, a fifth of the cache, is the default).
    window : number of past queries that are examined (w).
    recent : number of newest entries that always stay (r).
    drop : share of the budget that one eviction frees during generation (m / B).
    rise : the last layer's budget is this share above the mean, the first layer's below it.
    keep : replaces ``budget_ratio``: see ``Retaining``; never exceeded during generation.
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
