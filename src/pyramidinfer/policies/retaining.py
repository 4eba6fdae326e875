"""Base classes of methods that limit every layer's cache to a budget of entries."""

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
    """A limit of entries for every KV head, computed when a text is prefilled and fixed from then
    on; a policy that evicts keeps to it while decoding."""

    keep: float | None

    def limits_of(self, layer: int, text_len: int, layers: Layers) -> Sequence[int]:
        """The limit of each of a layer's heads for a text of this length."""
        raise NotImplementedError

    def limits_at(self, view: View) -> Sequence[int]:
        """The current limit of each of the view's heads."""
        if view.phase == "decode":
            found: list[int] = view.state["limits"].numpy()[view.layer].tolist()
            return found
        return self.limits_of(view.layer, view.seen_len, view.layers)

    def over(self, view: View) -> bool:
        """Whether the layer is governed and any head is over its limit."""
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
        """The limits of a text of the same length at ``keep``; none is raised."""
        if not self.evicts or self.keep is None or keep >= self.keep:
            return None
        lower, text, old = replace(self, keep=keep), int(state["text"]), state["limits"]
        wanted = [lower.limits_of(layer, text, layers) for layer in range(layers.count)]
        limits = torch.minimum(old, torch.tensor(wanted))
        falls = (limits < old) & torch.tensor(layers.governed)[:, None]
        return (lower, {**state, "limits": limits}) if bool(falls.any()) else None


@dataclass(frozen=True)
class Retaining(Limited):
    """A budget of entries per layer, computed when a text is prefilled.

    keep : entries per layer as a share of the text (the prompt; after ``extend`` the whole text),
        as a mean over layers.  Fixed after prefill.  A policy that evicts keeps to it from then
        on; with any other policy generated entries are kept in addition.  None: the method's
        published budget, set by its other options.

    A budget is never smaller than what the method always keeps (its window, plus one entry), so
    short texts keep a larger share than requested.
    """

    keep: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("capacity", getattr(self, "capacity", 1), 1)

    def entries(self, text_len: int) -> int:
        """The mean budget per layer without ``keep``: the option ``capacity`` of methods that have
        it, else all entries; methods may override it."""
        found: int = getattr(self, "capacity", text_len)
        return found

    def floor(self) -> int:
        """The smallest possible budget of a layer."""
        return 1

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        """The budget of ``layer`` for a text of this length."""
        return max(self.floor(), self.mean_budget(text_len))

    def mean_budget(self, text_len: int) -> int:
        """The mean budget per layer, before any curve over depth."""
        if self.keep is None:
            return self.entries(text_len)
        return round(self.keep * text_len)

    def limits_of(self, layer: int, text_len: int, layers: Layers) -> Sequence[int]:
        return (self.budget(layer, text_len, layers),) * layers.kv_heads

    def limit(self, view: View) -> int:
        """The current budget of the view's layer: while decoding, the one fixed at prefill."""
        return self.limits_at(view)[0]

    def text_len(self, view: View) -> int:
        """Length of the text that ``keep`` refers to."""
        return int(view.state["text"]) if view.phase == "decode" else view.seen_len

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        return self._bounds(prompt_len, max_new, layers)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        """A text gets the same budgets, whatever part of it was cached before."""
        return self._bounds(text_len, max_new, layers)

    def _bounds(self, text_len: int, max_new: int, layers: Layers) -> Forecast:
        kept = []
        for layer in range(layers.count):
            budget = self.budget(layer, text_len, layers)
            most = text_len + max_new
            if layers.governed[layer]:
                most = min(text_len, budget) + max_new
                if self.evicts:  # the newest entry is written before another is evicted
                    most = min(most, budget + self.slack + 1)
            kept.append(most)
        return Forecast([text_len] * layers.count, kept)


@dataclass(frozen=True)
class Buffered(Retaining):
    """A budget that a layer may exceed by a buffer of generated tokens, and is then cut back to.

    buffer : generated tokens between two cuts: a layer with this many entries above its budget is
        cut.  The first cut after a budget was lowered happens immediately.
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
    """A budget of entries per layer that its heads may share unevenly, fixed after prefill.

    adaptive : the best scores of all heads of a layer compete for its budget, so that each KV head
        keeps its own number of entries (Ada-KV, Feng et al., 2407.11550, algorithm 1).  False: all
        heads keep the same number.
    safeguard : with ``adaptive``, no head keeps less than this share of the even budget.
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
        total = [layers.kv_heads * (kept + 1) for kept in even.kept]  # because each is rounded
        return Forecast(even.reach, most, total=total)
