"""Duo: some heads keep everything, the others the newest tokens (DuoAttention, 2410.10819).

*Retrieval heads* keep every entry; *streaming heads* keep the first tokens and the newest ones.
Which head is which is a fact about the model, found once (``Profile``), so nothing is scored while
serving, and the cache is as good for a question that comes later as for one in the prompt.  Every
token attends to the whole prompt in every head while the prompt goes in; after the last layer with
a retrieval head only the tokens that streaming heads keep go deeper.

Deviations: heads are ordered by how much of a text each was seen to need (the ``Profile``), not by
masks optimised on passkeys, though DuoAttention's own mask files load as well; streaming heads
prefill with full attention; tokens that no deeper head keeps are not computed there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.base import Forecast, Policy, check_keep, keep_best
from pyramidinfer.policies.profile import Masks, Profile, load_heads
from pyramidinfer.types import Best, Keep, Layers, Needs, Observation, State, View

__all__ = ["Duo"]

ALL = 0  # a head's limit where it keeps everything
LONG = 1 << 30  # a text in which as many heads are retrieval heads as can be

#: Entries that every head is held to, ``[layers][kv_heads]``.
Limits = tuple[tuple[int, ...], ...]


@named_options
@dataclass(frozen=True)
class Duo(Policy):
    """Retrieval heads keep everything, streaming heads ``sinks`` and the ``recent`` tokens.

    keep : mean over the measured heads of a head's entries, as a share of the text, which tells
        how many retrieval heads there are; one more head keeps as much as is left over.  Heads are
        dealt by the length of the first text taken in, as if it had at least ``min_context``
        tokens; generated tokens come on top in retrieval heads.  Layers that the profile leaves
        out, because a sliding window bounds them in longer texts, keep all they may.
    profile : what each head needs: a ``Profile``, or the path of one or of DuoAttention's
        ``full_attention_heads.tsv``; ``"auto"`` is the model's own, measured at its first load.
    sinks, recent : first and newest tokens that streaming heads keep.
    spare : the deepest layers whose heads together hold no more than this share of all that
        matters get retrieval heads last, so that few tokens need be computed there; 0 goes by need
        alone.
    min_context : see ``keep``.
    stride : generated tokens between two evictions.
    """

    name: ClassVar[str] = "duo"
    evicts: ClassVar[bool] = True

    keep: float | None = 0.5
    profile: Profile | Masks | str | None = "auto"
    sinks: int = 4
    recent: int = 64
    spare: float = 0.0
    min_context: int = 1024
    stride: int = 16

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep is None:
            raise ValueError("keep=None: give a share above 0 and at most 1")
        check_share("spare", self.spare)
        for name, least in (("sinks", 0), ("recent", 1), ("min_context", 1), ("stride", 1)):
            check_whole(name, getattr(self, name), least)
        if not isinstance(self.profile, Profile | Masks | str | Path | None):
            raise ValueError(f"profile={self.profile!r} must be a path, 'auto' or None")
        if isinstance(self.profile, str | Path) and self.profile != "auto":
            object.__setattr__(self, "profile", load_heads(self.profile))

    @property
    def wants_profile(self) -> bool:
        return self.profile == "auto"

    def with_profile(self, profile: Profile | None) -> Duo:
        return replace(self, profile=profile) if self.wants_profile else self

    def check(self, layers: Layers) -> None:
        if self.wants_profile:  # to be checked once it is there
            return
        if not isinstance(self.profile, Profile | Masks):
            raise ValueError(
                "policy 'duo' needs to know what each head is for, and the model has no profile: "
                "make one (pyramidinfer profile MODEL) or give profile=FILE"
            )
        share, shape = self.profile.share, (layers.count, layers.kv_heads)
        if (len(share), len(share[0])) != shape:
            raise ValueError(
                f"the profile is of {len(share)} layers with {len(share[0])} KV heads, this model "
                f"has {shape[0]} with {shape[1]}: make its own (pyramidinfer profile MODEL)"
            )

    # --- who keeps what -----------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Entries of a streaming head."""
        return self.sinks + self.recent

    def limits(self, text_len: int, layers: Layers) -> Limits:
        """What every head is held to in a text of this length: ``ALL`` is a retrieval head."""
        return _deal(self, max(text_len, self.min_context), layers)

    def last(self, layers: Layers) -> int:
        """The last layer where any head may keep more than the newest tokens; few tokens go
        deeper.  A layer with a sliding window needs all that it can see."""
        wide = [
            layer
            for layer, limits in enumerate(_deal(self, LONG, layers))
            if not layers.governed[layer] or any(n == ALL or n > self.window for n in limits)
        ]
        return max(wide, default=0)

    def _limits(self, view: View) -> tuple[int, ...]:
        """Entries that each of the view's heads is held to now."""
        if bool(view.state["is_dealt"]) and view.phase != "prefill":
            return tuple(view.state["limits"][view.layer].tolist())
        return self.limits(view.seen_len, view.layers)[view.layer]

    def start(self, layers: Layers) -> State:
        limits = torch.zeros(layers.count, layers.kv_heads, dtype=torch.int64)
        return {"limits": limits, "is_dealt": torch.tensor(False)}

    def settled(self, view: View) -> State:
        if bool(view.state["is_dealt"]):
            return view.state
        limits = view.state["limits"].clone()
        limits[view.layer] = torch.tensor(self._limits(view))
        is_last = view.layer == view.layers.count - 1
        return {"limits": limits, "is_dealt": torch.tensor(is_last)}

    def needs(self, view: View) -> Needs:
        is_decode = view.phase == "decode"
        over = view.layers.governed[view.layer] and any(
            limit != ALL and held > limit + (self.stride - 1) * is_decode
            for held, limit in zip(view.head_lens, self._limits(view), strict=True)
        )
        if is_decode:
            return Needs(evict=True, best=self._rule(view)) if over else Needs()
        is_last = view.layer >= self.last(view.layers) and view.new_len > self.recent
        return Needs(retain=over, propagate=is_last)

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        going = self._forced(seen) | (seen.positions >= seen.view.seen_len - self.recent)
        return Keep(going[:1].nonzero(as_tuple=True)[1][None]), state

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        count = self._rule(seen.view).count
        return keep_best(seen, seen.positions.float(), count, self._forced(seen)), state

    evict = retain

    def _rule(self, view: View) -> Best:
        """What an eviction keeps."""
        counts = tuple(
            held if limit == ALL else limit
            for held, limit in zip(view.head_lens, self._limits(view), strict=True)
        )
        return Best(counts, 1, "max", self.sinks, 0)

    def _forced(self, seen: Observation) -> torch.Tensor:
        return (seen.positions < self.sinks) | seen.protected

    def idle_steps(self, kept: list[list[int]], prompt_len: int, layers: Layers, state: State
                   ) -> int:  # fmt: skip
        room = [
            limit + self.stride - 1 - held
            for lens, limits, governed in zip(
                kept, state["limits"].tolist(), layers.governed, strict=True
            )
            for held, limit in zip(lens, limits, strict=True)
            if governed and limit != ALL
        ]
        return max(0, min(room, default=1 << 30))

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        last, whole, slack = self.last(layers), prompt_len + max_new, min(self.stride, max_new)
        reach = [
            prompt_len if layer <= last else min(prompt_len, self.window)
            for layer in range(layers.count)
        ]
        heads = [
            [whole if limit == ALL else min(whole, limit + slack) for limit in limits]
            for limits in self.limits(prompt_len, layers)
        ]
        return Forecast(reach, [max(lens) for lens in heads], heads)


@lru_cache(maxsize=4096)
def _deal(policy: Duo, text_len: int, layers: Layers) -> Limits:
    """Retrieval heads are the most needed ones, as many as ``keep`` pays for."""
    needs = policy.profile
    assert isinstance(needs, Profile | Masks) and policy.keep is not None
    share, window = needs.share, policy.window
    ranked = [place for place in needs.ranked() if layers.governed[place[0]]]
    needed = sum(share[layer][head] for layer, head in ranked)
    deep, held = layers.count, 0.0
    while deep > 0 and (held := held + sum(share[deep - 1])) <= policy.spare * needed:
        deep -= 1
    ranked.sort(key=lambda place: place[0] >= deep)  # stable: the deepest come last
    limits = [[ALL] * layers.kv_heads for _ in layers.governed]  # also where nothing was measured
    for layer, head in ranked:
        limits[layer][head] = window
    room = max(text_len - window, 0)
    left = max(0.0, policy.keep * text_len - window) * len(ranked)  # entries beyond the windows
    for layer, head in ranked:
        if left >= room:
            limits[layer][head] = ALL
        else:
            limits[layer][head] = window + int(left)
            break
        left -= room
    return tuple(map(tuple, limits))
