"""The base class of methods that give every KV head its own limit, by the head profile."""

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

#: The limit of a head that keeps everything, generated tokens included.
ALL = 1 << 30

#: The limit of every head in entries, ``[layers][kv_heads]``.
Limits = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ByHead(Limited, Profiled, ABC):
    """A limit for every KV head, set by the model's head profile.

    keep : share of the text's entries that stay, as a mean over the measured heads.  Heads that
        keep everything also keep generated tokens.  Layers that the profile did not measure (a
        sliding window bounds them) keep everything inside their window.
    profile : the need of each head: a ``Profile``, or the path of one or of DuoAttention's
        ``full_attention_heads.tsv``; ``"auto"`` is the model's own, measured when it is first
        loaded.
    sinks, recent : number of first and newest tokens that stay in every head.
    min_context : a text shorter than this gets the limits of a text of this length.
    stride : most generated tokens between two evictions of a head.
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
        """The limit of every head for a text of this length."""

    def going(self, layer: int, text_len: int, layers: Layers) -> int:
        """Most tokens of a text of this length that go deeper than ``layer``."""
        return text_len

    def least(self, limit: int) -> int:
        """Entries that an eviction leaves in a head with this limit."""
        return limit

    @property
    def heads(self) -> Profile | Masks:
        """The profile, when it is available."""
        assert isinstance(self.profile, Profile | Masks)
        return self.profile

    def limits(self, text_len: int, layers: Layers) -> Limits:
        """``deal`` for this text, or for ``min_context`` tokens if it is shorter."""
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
            how = f"agreement {self.profile.agreement:.2f}"
            return f"what each head needs, as measured on {self.profile.text} ({how})"
        return "what each head needs, by given masks" if self.profile != "auto" else ""

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        reach = [prompt_len]
        for layer in range(layers.count - 1):
            reach.append(min(reach[-1], self.going(layer, prompt_len, layers)))
        return self._bounds(reach, self.limits(prompt_len, layers), max_new)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast:
        """The limits apply again, whatever part of the text was cached before."""
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
