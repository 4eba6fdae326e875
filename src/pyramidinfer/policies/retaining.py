"""What methods share that hold every layer's cache to a budget of entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from pyramidinfer.config import check_share, check_whole
from pyramidinfer.policies.base import Forecast, Policy, check_keep
from pyramidinfer.types import Layers, State, View

__all__ = ["Adaptive", "Buffered", "Limited", "Retaining"]


@dataclass(frozen=True)
class Limited(Policy):
    """A limit of entries for every KV head, worked out when a text is taken in and fixed from then
    on; a policy that evicts holds it while decoding."""

    keep: float | None

    def limits_of(self, layer: int, text_len: int, layers: Layers) -> Sequence[int]:
        """What each of a layer's heads is held to in a text of this length."""
        raise NotImplementedError

    def limits_at(self, view: View) -> Sequence[int]:
        """What each of the view's heads is held to now."""
        if view.phase == "decode":
            found: list[int] = view.state["limits"].numpy()[view.layer].tolist()
            return found
        return self.limits_of(view.layer, view.seen_len, view.layers)

    def over(self, view: View) -> bool:
        """Whether the layer is the policy's business and any head holds more than it is held to."""
        pairs = zip(view.head_lens, self.limits_at(view), strict=True)
        return view.layers.governed[view.layer] and any(held > limit for held, limit in pairs)

    def start(self, layers: Layers) -> State:
        limits = torch.zeros(layers.count, layers.kv_heads, dtype=torch.int64)
        return {"text": torch.zeros((), dtype=torch.int64), "limits": limits}

    def prefilled(self, view: View) -> State:
        limits = view.state["limits"].clone()
        limits[view.layer] = torch.tensor(self.limits_at(view))
        return {**view.state, "text": torch.tensor(view.seen_len), "limits": limits}

    def ceiling(self, kept: np.ndarray, state: State, layers: Layers) -> np.ndarray:
        found: np.ndarray = state["limits"].numpy()
        return found

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """Limits as a text of the same length has them at ``keep``, none of them raised."""
        if not self.evicts or self.keep is None or keep >= self.keep:
            return None
        lower, text, old = replace(self, keep=keep), int(state["text"]), state["limits"]
        wanted = [lower.limits_of(layer, text, layers) for layer in range(layers.count)]
        limits = torch.minimum(old, torch.tensor(wanted))
        falls = (limits < old) & torch.tensor(layers.governed)[:, None]
        return (lower, {**state, "limits": limits}) if bool(falls.any()) else None


@dataclass(frozen=True)
class Retaining(Limited):
    """A budget of entries per layer, worked out when a text is taken in.

    keep : the mean over layers of a layer's entries, as a share of the text (the prompt; after
        ``extend`` the whole text).  Fixed after prefill.  A policy that evicts holds it from then
        on; otherwise generated entries come on top.  None: the method's published budget, which
        its other options set.

    A budget never falls below what the method always keeps (its window, and one entry more), so
    short texts keep a larger share than asked for.
    """

    keep: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def entries(self, text_len: int) -> int:
        """The mean budget per layer without ``keep``: everything, unless a method says less."""
        return text_len

    def floor(self) -> int:
        """The fewest entries a layer can be held to."""
        return 1

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        """Entries that ``layer`` is held to for a text of this length."""
        return max(self.floor(), self.mean_budget(text_len))

    def mean_budget(self, text_len: int) -> int:
        """The mean budget per layer, before any curve over depth."""
        if self.keep is None:
            return self.entries(text_len)
        return round(self.keep * text_len)

    def limits_of(self, layer: int, text_len: int, layers: Layers) -> Sequence[int]:
        return (self.budget(layer, text_len, layers),) * layers.kv_heads

    def limit(self, view: View) -> int:
        """The budget of the view's layer now: while decoding, the one fixed when its text was
        taken in."""
        return self.limits_at(view)[0]

    def text_len(self, view: View) -> int:
        """Length of the text that budgets are shares of."""
        return int(view.state["text"]) if view.phase == "decode" else view.seen_len

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        return self._bounds(prompt_len, max_new, layers)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        """A text is cut to the same budgets whatever part of it was there before."""
        return self._bounds(text_len, max_new, layers)

    def _bounds(self, text_len: int, max_new: int, layers: Layers) -> Forecast:
        kept = []
        for layer in range(layers.count):
            budget = self.budget(layer, text_len, layers)
            most = text_len + max_new
            if layers.governed[layer]:
                most = min(text_len, budget) + max_new
                if self.evicts:  # the newest entry is written before another one goes
                    most = min(most, budget + self.slack + 1)
            kept.append(most)
        return Forecast([text_len] * layers.count, kept)


@dataclass(frozen=True)
class Buffered(Retaining):
    """A budget that generated tokens outgrow for a while, until a layer is cut back to it at once.

    buffer : generated tokens between two cuts: with so many entries beyond its budget a layer is
        cut.  The first cut after a budget was lowered is made at once.
    """

    evicts: ClassVar[bool] = True

    buffer: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("buffer", self.buffer, 1)

    @property
    def slack(self) -> int:
        return self.buffer - 1


@dataclass(frozen=True)
class Adaptive(Retaining):
    """A budget of entries that a layer's heads may share unevenly, fixed after prefill.

    adaptive : a layer's entries go to the best scores of all its heads together, so that each KV
        head has a number of its own (Ada-KV, Feng et al., 2407.11550, algorithm 1); else all heads
        keep as many.
    safeguard : share of the even budget that no head falls below with ``adaptive``.
    """

    adaptive: bool = False
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("safeguard", self.safeguard)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive={self.adaptive!r} must be True or False")
        if self.safeguard != Adaptive.safeguard and not self.adaptive:
            raise ValueError(
                f"safeguard={self.safeguard} has no effect unless adaptive=True; leave it out"
            )

    @property
    def competing(self) -> float | None:
        """``Best.safeguard``."""
        return self.safeguard if self.adaptive else None

    def over(self, view: View) -> bool:
        held = sum(view.head_lens) / len(view.head_lens) if self.adaptive else view.kept_len
        return view.layers.governed[view.layer] and held > self.limit(view)

    def _bounds(self, text_len: int, max_new: int, layers: Layers) -> Forecast:
        even = super()._bounds(text_len, max_new, layers)
        if not self.adaptive:
            return even
        most = [min(text_len, layers.kv_heads * (kept - max_new)) + max_new for kept in even.kept]
        total = [layers.kv_heads * (kept + 1) for kept in even.kept]  # each is rounded
        return Forecast(even.reach, most, total=total)
