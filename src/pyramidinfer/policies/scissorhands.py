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

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.base import keep_best
from pyramidinfer.policies.budgets import linear_budget
from pyramidinfer.policies.retaining import Retaining, newest
from pyramidinfer.types import Keep, Layers, Needs, Observation, Reduce, State, View

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
        reduce = Reduce("kv_mean", "below")
        over = self.over(view)
        if view.phase == "decode":
            return Needs(window=self.window, reduce=reduce, evict=True) if over else Needs()
        return Needs(window=self.window, reduce=reduce, remember=True, retain=over)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        return self._fewest_low(seen, self.limit(seen.view)), state

    def evict(self, seen: Observation, state: State) -> tuple[Keep, State]:
        gone = max(1, int(self.drop * self.limit(seen.view)))
        return self._fewest_low(seen, seen.view.kept_len - gone), state

    def ring(self, prompt_len: int, max_new: int) -> int:
        return min(self.window, prompt_len + max_new)

    def _fewest_low(self, seen: Observation, count: int) -> Keep:
        assert seen.scores is not None
        forced = newest(seen.positions, self.recent) | seen.protected
        return keep_best(seen, -seen.scores, max(count, self.floor()), forced)
