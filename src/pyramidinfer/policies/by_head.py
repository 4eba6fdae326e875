"""What methods share that hold every KV head to a number of entries of its own, by the profile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from pyramidinfer.config import check_whole
from pyramidinfer.policies.base import Forecast, check_keep
from pyramidinfer.policies.profile import Masks, Profile
from pyramidinfer.policies.profiled import Profiled
from pyramidinfer.policies.retaining import Limited
from pyramidinfer.types import Layers, View

__all__ = ["ALL", "ByHead", "Limits"]

#: A head's limit where it keeps everything, what is generated too.
ALL = 1 << 30

#: Entries that every head is held to, ``[layers][kv_heads]``.
Limits = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ByHead(Limited, Profiled, ABC):
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

    def least(self, limit: int) -> int:
        """Entries that an eviction leaves a head of this limit with."""
        return limit

    @property
    def heads(self) -> Profile | Masks:
        """The profile, once it is there."""
        assert isinstance(self.profile, Profile | Masks)
        return self.profile

    def limits(self, text_len: int, layers: Layers) -> Limits:
        """``deal`` for this text, or for one of ``min_context`` tokens."""
        return _dealt(self, max(text_len, self.min_context), layers)

    def limits_of(self, layer: int, text_len: int, layers: Layers) -> Sequence[int]:
        return self.limits(text_len, layers)[layer]

    def counts(self, view: View) -> tuple[int, ...]:
        """Entries that stay in each of the view's heads."""
        pairs = zip(view.head_lens, self.limits_at(view), strict=True)
        if view.phase != "decode":
            return tuple(min(pair) for pair in pairs)
        return tuple(
            self.least(limit) if held > limit + self.slack else held for held, limit in pairs
        )

    @property
    def rule(self) -> str:
        if isinstance(self.profile, Profile):
            how = f"two texts agree by {self.profile.agreement:.2f}"
            return f"what each head needs, as measured on {self.profile.text} ({how})"
        return "what each head needs, by given masks" if self.profile != "auto" else ""

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
            [min(min(entering, limit) + max_new, limit + self.slack + 1) for limit in row]
            for entering, row in zip(reach, limits, strict=True)
        ]
        return Forecast(reach, [max(lens) for lens in heads], heads)


@lru_cache(maxsize=4096)
def _dealt(policy: ByHead, text_len: int, layers: Layers) -> Limits:
    return policy.deal(text_len, layers)
