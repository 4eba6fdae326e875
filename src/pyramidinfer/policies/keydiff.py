"""KeyDiff: the keys that are least like the others (Park et al., 2504.15364).

An entry's score is the cosine similarity between its key and the mean of all normalised keys of
its head.  Per KV head the entries with the lowest scores stay: after prefill and at every step.
Queries are not used, so it makes no difference whether the question is known yet.

Deviation: the prompt is prefilled whole and cut once, not block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.config import named_options
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Needs, Observation, View

__all__ = ["KeyDiff"]


@named_options
@dataclass(frozen=True)
class KeyDiff(Retaining):
    """The most distinct keys of every KV head.

    capacity : entries per layer (the paper shows 2048 to 8192; not used with ``keep``).
    keep : replaces ``capacity``: see ``Retaining``; the budget also holds during generation.
    """

    name: ClassVar[str] = "keydiff"
    evicts: ClassVar[bool] = True

    capacity: int = 2048

    def floor(self) -> int:
        return 2  # two keys are equally far from their mean

    def needs(self, view: View) -> Needs:
        if not self.over(view):
            return Needs()
        return Needs(keys=True, retain=Best(self.limit(view), "own"))

    def score(self, seen: Observation) -> Tensor:
        assert seen.keys is not None
        keys = F.normalize(seen.keys, dim=-1)  # padding after a shorter head stays 0
        anchor = F.normalize(keys.sum(1, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)
