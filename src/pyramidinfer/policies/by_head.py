"""What methods share that hold every KV head to a number of entries of its own, by the profile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_whole
from pyramidinfer.policies.base import Forecast, Policy, check_keep
from pyramidinfer.policies.profile import Masks, Profile
from pyramidinfer.policies.profiled import Profiled
from pyramidinfer.types import Layers, Observation, State, View

__all__ = ["ALL", "ByHead", "Limits"]

#: A head's limit where it keeps everything, what is generated too.
ALL = 1 << 30

#: Entries that every head is held to, ``[layers][kv_heads]``.
Limits = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ByHead(Profiled, ABC):
    """A limit for every KV head, dealt by the model's head profile.

    keep : mean over the measured heads of a head's entries, as a share of the text; heads that
        keep everything keep what is generated as well.  Layers that the profile leaves out, because
        a sliding window bounds them in longer texts, keep all they may.
    profile : what each head needs: a ``Profile``, or the path of one or of DuoAttention's
        ``full_attention_heads.tsv``; ``"auto"`` is the model's own, measured at its first load.
    sinks, recent : first and newest tokens that stay in every head.
    min_context : a shorter text is given what a text of so many tokens would be.
    stride : generated tokens between two evictions of a head, at most.
    """

    evicts: ClassVar[bool] = True

    keep: float | None = 0.5
    profile: Profile | Masks | str | None = "auto"
    sinks: int = 4
    recent: int = 64
    min_context: int = 1024
    stride: int = 16

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep is None:
            raise ValueError("keep=None: give a share above 0 and at most 1")
        for name, least in (("sinks", 0), ("recent", 1), ("min_context", 1), ("stride", 1)):
            check_whole(name, getattr(self, name), least)
        self.load_profile()

    # --- who keeps what -----------------------------------------------------------------------

    @abstractmethod
    def deal(self, text_len: int, layers: Layers) -> Limits:
        """What every head is held to in a text of this length."""

    def going(self, layer: int, text_len: int, layers: Layers) -> int:
        """Tokens of a text of this length that go deeper than ``layer``, at most."""
        return text_len

    def most(self, limit: int) -> int:
        """Entries that a head of this limit holds at most while decoding."""
        return limit

    def least(self, limit: int) -> int:
        """Entries that an eviction leaves it with."""
        return limit

    @property
    def heads(self) -> Profile | Masks:
        """The profile, once it is there."""
        assert isinstance(self.profile, Profile | Masks)
        return self.profile

    def limits(self, text_len: int, layers: Layers) -> Limits:
        """``deal`` for this text, or for one of ``min_context`` tokens."""
        return _dealt(self, max(text_len, self.min_context), layers)

    def limits_at(self, view: View) -> tuple[int, ...]:
        """Entries that each of the view's heads is held to now."""
        if view.phase == "decode":
            return tuple(view.state["limits"][view.layer].tolist())
        return self.limits(view.seen_len, view.layers)[view.layer]

    def over(self, view: View) -> bool:
        """Whether any of the view's heads holds more than it may."""
        limits, is_decode = self.limits_at(view), view.phase == "decode"
        return view.layers.governed[view.layer] and any(
            held > (self.most(limit) if is_decode else limit)
            for held, limit in zip(view.head_lens, limits, strict=True)
        )

    def counts(self, view: View) -> tuple[int, ...]:
        """Entries that stay in each of the view's heads."""
        pairs = zip(view.head_lens, self.limits_at(view), strict=True)
        if view.phase != "decode":
            return tuple(min(pair) for pair in pairs)
        return tuple(
            self.least(limit) if held > self.most(limit) else held for held, limit in pairs
        )

    def forced(self, seen: Observation) -> Tensor:
        """Entries that stay whatever their scores."""
        recent = seen.positions > seen.view.seen_len - 1 - self.recent
        return recent | (seen.positions < self.sinks) | seen.protected

    @property
    def rule(self) -> str:
        if isinstance(self.profile, Profile):
            how = f"two texts agree by {self.profile.agreement:.2f}"
            return f"what each head needs, as measured on {self.profile.text} ({how})"
        return "what each head needs, by given masks" if self.profile != "auto" else ""

    # --- what is remembered and reserved ------------------------------------------------------

    def start(self, layers: Layers) -> State:
        limits = torch.zeros(layers.count, layers.kv_heads, dtype=torch.int64)
        return {"text": torch.zeros((), dtype=torch.int64), "limits": limits}

    def prefilled(self, view: View) -> State:
        limits = view.state["limits"].clone()
        limits[view.layer] = torch.tensor(self.limits_at(view))
        return {"text": torch.tensor(view.seen_len), "limits": limits}

    def idle_steps(
        self, kept: list[list[int]], prompt_len: int, layers: Layers, state: State
    ) -> int:
        room = [
            self.most(limit) - held
            for lens, limits, governed in zip(
                kept, state["limits"].tolist(), layers.governed, strict=True
            )
            for held, limit in zip(lens, limits, strict=True)
            if governed
        ]
        return max(0, min(room, default=ALL))

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        assert self.keep is not None
        if keep >= self.keep:
            return None
        lower, old = replace(self, keep=keep), state["limits"]
        limits = torch.minimum(old, torch.tensor(lower.limits(int(state["text"]), layers)))
        falls = (limits < old) & torch.tensor(layers.governed)[:, None]
        return (lower, {**state, "limits": limits}) if bool(falls.any()) else None

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        reach = [prompt_len]
        for layer in range(layers.count - 1):
            reach.append(min(reach[-1], self.going(layer, prompt_len, layers)))
        return self._bounds(reach, self.limits(prompt_len, layers), max_new)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast:
        """Heads are held to their limits again, whatever part of the text was there before."""
        return self._bounds([text_len] * layers.count, self.limits(text_len, layers), max_new)

    def _bounds(self, reach: list[int], limits: Limits, max_new: int) -> Forecast:
        heads = [
            [min(min(entering, limit) + max_new, self.most(limit) + 1) for limit in row]
            for entering, row in zip(reach, limits, strict=True)
        ]
        return Forecast(reach, [max(lens) for lens in heads], heads)


@lru_cache(maxsize=4096)
def _dealt(policy: ByHead, text_len: int, layers: Layers) -> Limits:
    return policy.deal(text_len, layers)
