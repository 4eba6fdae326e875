"""Expected Attention: what future queries will attend to (Devoto et al., 2510.00636).

Before rotation, the queries of a text are roughly normally distributed.  Their mean μ and
covariance Σ, rotated to the next ``ahead`` positions and averaged, give the attention that an entry
with key k and value v can expect: exp(kᵀμ + kᵀΣk / 2), normalised over all entries; μ and Σ include
the softmax scale.  An entry's score is this expected attention plus ``epsilon``, times the norm of
v; the best entries stay after prefill.  No window of queries is used, so it makes no difference
whether the question is known yet.  Nothing is evicted during generation.

Deviations: the statistics are those of the queries that attend, after any query norm; a further
text is scored by its own queries.  A soft cap on logits is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_share, check_whole, is_number, named_options
from pyramidinfer.policies.retaining import Adaptive
from pyramidinfer.types import Best, Needs, Observation, View

__all__ = ["ExpectedAttention"]


@named_options
@dataclass(frozen=True)
class ExpectedAttention(Adaptive):
    """The same budget in every layer, shared among its heads.

    retain_ratio : share of the text kept (not used with ``keep``).
    ahead : number of positions after the text at which queries are expected.
    sinks : number of first tokens, which always stay and whose queries are not counted.
    epsilon : added to the expected attention.
    keep : replaces ``retain_ratio``: see ``Retaining``; generated entries are kept in addition.
    """

    name: ClassVar[str] = "expected_attention"

    adaptive: bool = True
    retain_ratio: float = 0.5
    ahead: int = 512
    sinks: int = 4
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("retain_ratio", self.retain_ratio)
        check_whole("ahead", self.ahead, 1)
        check_whole("sinks", self.sinks, 0)
        if not (is_number(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon={self.epsilon!r} must be a number of at least 0")

    def entries(self, text_len: int) -> int:
        return round(text_len * self.retain_ratio)

    def floor(self) -> int:
        return self.sinks + 1

    def needs(self, view: View) -> Needs:
        if view.phase == "decode" or not self.over(view):
            return Needs()
        places = range(1, self.ahead + 1)
        rule = Best(self.limit(view), "own", sinks=self.sinks, safeguard=self.competing)
        return Needs(keys=True, values=True, queries_from=self.sinks, ahead=places, retain=rule)

    def score(self, seen: Observation) -> Tensor:
        assert seen.keys is not None and seen.values is not None
        assert seen.queries is not None and seen.rotation is not None
        heads, dim, rotation = len(seen.keys), seen.keys.shape[-1], seen.rotation
        mean = (seen.queries.mean @ rotation).view(heads, -1, dim)
        covariance = (rotation.T @ seen.queries.covariance @ rotation).view(heads, -1, dim, dim)
        keys = seen.keys[:, None]  # of every query head of the group
        logits = (keys @ mean[..., None])[..., 0] + ((keys @ covariance) * keys).sum(-1) / 2
        counts = seen.positions >= self.sinks
        expected = torch.where(counts[:, None], logits, -torch.inf).softmax(-1).mean(1)
        sizes: Tensor = seen.values.norm(dim=-1)
        return (expected + self.epsilon) * sizes
