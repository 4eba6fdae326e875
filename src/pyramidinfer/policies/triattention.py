"""TriAttention: future queries are predictable from the model (Mao et al., 2604.04921).

Before rotation, a head's queries lie close to a centre that depends on the model, not on the text.
So the attention that a key will receive can be predicted from its position and the model alone: the
dot product of the key with the centre rotated to future positions, averaged over the offsets 1, 2,
4, … ``offset_max`` after the text.  A second term covers the spread of the queries around the
centre: over all rotated pairs of channels, the mean norm of the queries' pair minus the norm of its
centre, times the norm of the key's pair.  The scores of a query head become z-scores over the
competing entries, and an entry takes the largest over the query heads that share its KV head.
Every ``buffer`` generated tokens, the best entries of every KV head stay.  The prompt is pinned:
all of it stays, and generated tokens compete for a budget of their own.  Queries are not used while
serving.

Deviations: the official code subtracts a pinned prompt from the budget, so that no answer tokens
stay after a longer prompt; here the budget is for the answer alone.  A further text (``extend``) is
pinned as well, with what is left of the answer before it.  With ``pin_prompt=False`` a prompt over
its budget is cut at the end of prefill, not at the next eviction.  An offset of 1 is the position
of the next token.  Channels that are not rotated (all of them in a model without rotary positions
such as OPT, or with dynamic frequencies) are scored by their mean alone.  No newest entries are
reserved.
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
    """The entries that the model's mean queries will attend to, per KV head.

    pin_prompt : True: the whole prompt stays, and the budget is for generated entries only.  False:
        prompt and generated entries share one budget.
    capacity : entries per layer after a cut (the official code's setting; not used with ``keep``).
    offset_max : the largest offset after the text at which queries are predicted, in tokens.
    profile : the centres of the model's queries: a ``Profile``, or the path of one; ``"auto"`` is
        the model's own, measured when it is first loaded.
    keep : replaces ``capacity``: see ``Retaining``; the budget also holds during generation, plus
        the buffer.  With a pinned prompt, the answer may keep this share of the prompt's length.
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
        check_whole("offset_max", self.offset_max, 1)
        self.load_profile()

    def check(self, layers: Layers) -> None:
        super().check(layers)
        if self.profile != "auto" and not isinstance(self._centres, Centres):
            raise ValueError(
                f"policy {self.name!r} needs the centres of the model's queries, and this "
                f"profile has none: make it again (pyramidinfer profile MODEL --force)"
            )

    @property
    def _centres(self) -> Centres | None:
        return getattr(self.profile, "queries", None)

    @property
    def rule(self) -> str:
        if not isinstance(self.profile, Profile):
            return ""
        return f"centres of the model's queries, as measured on {self.profile.text}"

    # --- a pinned prompt ------------------------------------------------------------------------

    def _pinned(self, view: View) -> int:
        """Positions before this one are pinned: they always stay."""
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
        """The offsets after the text at which queries are predicted."""
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
        beside = sizes - _lengths(centre, pairs)  # the queries' spread around it
        scores = _grouped(centre @ seen.rotation, keys) + _grouped(beside, _lengths(keys, pairs))
        there = (seen.positions >= self._pinned(seen.view))[:, None]  # the entries that compete
        count = there.sum(-1, keepdim=True)
        mean = torch.where(there, scores, 0.0).sum(-1, keepdim=True) / count
        scores = torch.where(there, scores - mean, 0.0)
        spread = (scores.square().sum(-1, keepdim=True) / count).sqrt()
        return (scores / spread.clamp(min=torch.finfo(spread.dtype).tiny)).amax(1)


def _lengths(vectors: Tensor, pairs: int) -> Tensor:
    """``[..., pairs]``: norms of the pairs of channels that rotate together."""
    return vectors[..., :pairs].hypot(vectors[..., pairs : 2 * pairs])


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """Dot products ``[kv_heads, group, n]`` of ``[heads, dim]`` with ``[kv_heads, n, dim]``."""
    return queries.view(len(keys), len(queries) // len(keys), queries.shape[1]) @ keys.mT
