"""Duo: some heads keep everything, the others the newest tokens (DuoAttention, 2410.10819).

*Retrieval heads* keep every entry; *streaming heads* keep the first tokens and the newest ones.
Which head is which depends on the model alone and is measured once (``Profile``).  So nothing is
scored while serving, and the cache serves a later question as well as one inside the prompt.
During prefill every token attends to the whole prompt in every head.  After the last layer with a
retrieval head, only the tokens that streaming heads keep go deeper.

Deviations: heads are ranked by how much of a text they need (the ``Profile``), not by masks
optimised on passkeys; DuoAttention's own mask files can be loaded as well.  Streaming heads use
full attention during prefill.  Tokens that no deeper head keeps are not computed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from pyramidinfer.config import check_share, named_options
from pyramidinfer.policies.by_head import ALL, ByHead, Limits
from pyramidinfer.types import Best, Layers, Needs, View

__all__ = ["Duo"]

LONG = 1 << 30  # the text length at which most heads are retrieval heads


@named_options
@dataclass(frozen=True)
class Duo(ByHead):
    """Retrieval heads keep everything, streaming heads ``sinks`` and the ``recent`` tokens.

    keep : share of the text's entries that stay, as a mean over the measured heads.  It decides
        how many retrieval heads there are; one more head keeps what is left of the budget.
    sinks, recent : number of first and newest tokens that streaming heads keep.
    spare : the deepest layers that together have at most this share of the total need become
        retrieval layers last, so that few tokens are computed there; 0 ranks by need alone.
    """

    name: ClassVar[str] = "duo"
    computes_less: ClassVar[bool] = True

    spare: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("spare", self.spare)

    # --- who keeps what -----------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Entries of a streaming head."""
        return self.sinks + self.recent

    def deal(self, text_len: int, layers: Layers) -> Limits:
        """The heads with the most need become retrieval heads, as many as ``keep`` allows."""
        needs, window = self.heads, self.window
        assert self.keep is not None
        share = needs.share
        ranked = [place for place in needs.ranked() if layers.governed[place[0]]]
        needed = sum(share[layer][head] for layer, head in ranked)
        deep, held = layers.count, 0.0
        while deep > 0 and (held := held + sum(share[deep - 1])) <= self.spare * needed:
            deep -= 1
        ranked.sort(key=lambda place: place[0] >= deep)  # stable: the deepest come last
        limits = [[ALL] * layers.kv_heads for _ in layers.governed]  # also without a profile
        for layer, head in ranked:
            limits[layer][head] = window
        room = max(text_len - window, 0)
        left = max(0.0, self.keep * text_len - window) * len(ranked)  # entries beyond the windows
        for layer, head in ranked:
            if left >= room:
                limits[layer][head] = ALL
            else:
                limits[layer][head] = window + int(left)
                break
            left -= room
        return tuple(map(tuple, limits))

    def last(self, layers: Layers) -> int:
        """The last layer in which any head may keep more than the newest tokens; few tokens go
        deeper.  A layer with a sliding window needs every token that its window covers."""
        return _last(self, layers)

    def going(self, layer: int, text_len: int, layers: Layers) -> int:
        return text_len if layer < self.last(layers) else min(text_len, self.window)

    @property
    def slack(self) -> int:
        return self.stride - 1

    def needs(self, view: View) -> Needs:
        rule = Best(self.counts(view), "new", sinks=self.sinks)
        if view.phase == "decode":
            return Needs(retain=rule)
        is_last = view.layer >= self.last(view.layers) and view.new_len > self.recent
        return Needs(
            propagate=Best(0, "new", sinks=self.sinks, recent=self.recent) if is_last else None,
            retain=rule if self.over(view) else None,
        )


@lru_cache(maxsize=64)
def _last(policy: Duo, layers: Layers) -> int:
    wide = [
        layer
        for layer, limits in enumerate(policy.limits(LONG, layers))
        if not layers.governed[layer] or any(limit > policy.window for limit in limits)
    ]
    return max(wide, default=0)
