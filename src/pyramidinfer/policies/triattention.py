"""TriAttention: the queries to come are known beforehand (Mao et al., 2604.04921).

Before they are rotated a head's queries gather around a centre that belongs to the model, whatever
the text.  So the attention that a key will get follows from its place and the model alone: the dot
product of the key with the centre rotated to places to come, on average over the offsets 1, 2, 4, …
``offset_max`` behind the text.  To it comes what queries have beside their centre: over all rotated
pairs of numbers, the mean length of the queries' pair, less the length of its centre, times the
length of the key's.  Scores of a query head become z-scores over the entries that compete; an entry
has the largest of the heads that share its KV head, and every ``buffer`` generated tokens the best
of every KV head stay.  The prompt is pinned: all of it stays, and what is generated competes for a
budget beside it.  No query is looked at while serving.

Deviations: the official code takes a pinned prompt off its budget when it cuts, so that nothing of
an answer stays beside a longer prompt; a further text (``extend``) is pinned too, with what is left
of the answer before it; with ``pin_prompt=False`` a prompt over its budget is cut at its end, not
at the first cut after it.  An offset of 1 is the next token's place; numbers of a head that are not
rotated, all of them where a model has no rotary positions (OPT) or each key its own frequencies
(dynamic scaling), are attended to by their mean alone; no newest entries are set aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_whole, named_options
from pyramidinfer.policies.base import Forecast, Policy
from pyramidinfer.policies.profile import Centres, Profile
from pyramidinfer.policies.profiled import Profiled
from pyramidinfer.policies.retaining import Buffered
from pyramidinfer.types import Best, Layers, Needs, Observation, State, View

__all__ = ["TriAttention"]


@named_options
@dataclass(frozen=True)
class TriAttention(Buffered, Profiled):
    """What the model's mean queries will look at, per KV head.

    pin_prompt : the prompt stays whole, and budgets are of generated entries only; else prompt and
        generated entries have one budget.
    capacity : entries per layer after a cut (the official code's setting; not used with ``keep``).
    offset_max : the farthest place behind the text that is looked ahead to, in tokens.
    profile : where the model's queries lie: a ``Profile``, or the path of one; ``"auto"`` is the
        model's own, measured at its first load.
    keep : instead of ``capacity``: see ``Retaining``; held while generating, up to the buffer.
        Beside a pinned prompt so large a share of its length stays of the answer.
    """

    name: ClassVar[str] = "triattention"

    pin_prompt: bool = True
    capacity: int = 2048
    offset_max: int = 65536
    profile: Profile | str | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pin_prompt, bool):
            raise ValueError(f"pin_prompt={self.pin_prompt!r} must be True or False")
        check_whole("capacity", self.capacity, 1)
        check_whole("offset_max", self.offset_max, 1)
        self.load_profile()

    def check(self, layers: Layers) -> None:
        super().check(layers)
        if self.profile != "auto" and not isinstance(self._centres, Centres):
            raise ValueError(
                f"policy {self.name!r} needs to know where the model's queries lie, and its "
                f"profile was made without: make it again (pyramidinfer profile MODEL --force)"
            )

    @property
    def _centres(self) -> Centres | None:
        return getattr(self.profile, "queries", None)

    @property
    def rule(self) -> str:
        if not isinstance(self.profile, Profile):
            return ""
        return f"where the model's queries lie, as measured on {self.profile.text}"

    def entries(self, text_len: int) -> int:
        return self.capacity

    # --- a pinned prompt ------------------------------------------------------------------------

    def _pinned(self, view: View) -> int:
        """Positions before this one stay whatever their scores."""
        return self.text_len(view) if self.pin_prompt else 0

    def limits_at(self, view: View) -> Sequence[int]:
        limits = super().limits_at(view)
        if not self.pin_prompt or view.phase == "decode":
            return limits
        return [view.kept_len + limit for limit in limits]

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        if not self.pin_prompt:
            return super().forecast(prompt_len, max_new, layers)
        most = [
            min(max_new, self.budget(layer, prompt_len, layers) + self.slack + 1)
            if layers.governed[layer]
            else max_new
            for layer in range(layers.count)
        ]
        return Forecast([prompt_len] * layers.count, [prompt_len + more for more in most])

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        return None if self.pin_prompt else super().forecast_extended(text_len, max_new, layers)

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        if not self.pin_prompt or self.keep is None or keep >= self.keep:
            return super().tightened(keep, state, layers)
        lower, text = replace(self, keep=keep), int(state["text"])
        fall = self.budget(0, text, layers) - lower.budget(0, text, layers)
        if not fall or not any(layers.governed):
            return None
        limits = state["limits"] - fall * torch.tensor(layers.governed)[:, None]
        return lower, {**state, "limits": limits}

    # --- what is looked at ----------------------------------------------------------------------

    @property
    def offsets(self) -> tuple[int, ...]:
        """Places behind the text that are looked ahead to."""
        return tuple(1 << power for power in range(self.offset_max.bit_length()))

    def needs(self, view: View) -> Needs:
        if not self.over(view):
            return Needs()
        rule = Best(self.limit(view), "own", sinks=self._pinned(view))
        return Needs(keys=True, ahead=self.offsets, retain=rule)

    def score(self, seen: Observation) -> Tensor:
        """``[kv_heads, n]``."""
        keys, centres, layer = seen.keys, self._centres, seen.view.layer
        assert keys is not None and seen.rotation is not None and centres is not None
        centre, sizes = (keys.new_tensor(each[layer]) for each in (centres.mean, centres.sizes))
        pairs = sizes.shape[1]
        beside = sizes - _lengths(centre, pairs)  # of queries, without their centre's
        scores = _grouped(centre @ seen.rotation, keys) + _grouped(beside, _lengths(keys, pairs))
        there = (seen.positions >= self._pinned(seen.view))[:, None]  # those that compete
        count = there.sum(-1, keepdim=True)
        mean = torch.where(there, scores, 0.0).sum(-1, keepdim=True) / count
        scores = torch.where(there, scores - mean, 0.0)
        spread = (scores.square().sum(-1, keepdim=True) / count).sqrt()
        return (scores / spread.clamp(min=torch.finfo(spread.dtype).tiny)).amax(1)


def _lengths(vectors: Tensor, pairs: int) -> Tensor:
    """``[..., pairs]``: lengths of the pairs of numbers that rotate together."""
    return vectors[..., :pairs].hypot(vectors[..., pairs : 2 * pairs])


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """Dot products ``[kv_heads, group, n]`` of ``[heads, dim]`` with ``[kv_heads, n, dim]``."""
    return queries.view(len(keys), len(queries) // len(keys), queries.shape[1]) @ keys.mT
