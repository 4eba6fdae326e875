"""What methods share that hold every layer's cache to a budget of entries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_share, check_whole
from pyramidinfer.policies.base import Forecast, Policy, check_keep, keep_best
from pyramidinfer.types import Keep, Layers, Observation, State, View

__all__ = ["Adaptive", "Buffered", "Retaining", "newest"]


@dataclass(frozen=True)
class Retaining(Policy):
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

    @property
    def slack(self) -> int:
        """Entries that a layer may gather beyond its budget while decoding."""
        return 0

    def full(self, state: State) -> Tensor:
        """Entries ``[layers]`` that may be in a layer while decoding; one more and it is cut."""
        return state["budgets"]

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        """Entries that ``layer`` is held to for a text of this length."""
        return max(self.floor(), self.mean_budget(text_len))

    def mean_budget(self, text_len: int) -> int:
        """The mean budget per layer, before any curve over depth."""
        if self.keep is None:
            return self.entries(text_len)
        return round(self.keep * text_len)

    def start(self, layers: Layers) -> State:
        budgets = torch.zeros(layers.count, dtype=torch.int64)
        return {"text": torch.zeros((), dtype=torch.int64), "budgets": budgets}

    def prefilled(self, view: View) -> State:
        budgets = view.state["budgets"].clone()
        budgets[view.layer] = self.limit(view)
        return {**view.state, "text": torch.tensor(view.seen_len), "budgets": budgets}

    def limit(self, view: View) -> int:
        """The budget of the view's layer now: while decoding, the one fixed when its text was
        taken in."""
        if view.phase == "decode":
            return int(view.state["budgets"][view.layer])
        return self.budget(view.layer, view.seen_len, view.layers)

    def idle_steps(
        self, kept: list[list[int]], prompt_len: int, layers: Layers, state: State
    ) -> int:
        room = [
            most - max(count)
            for most, count, governed in zip(
                self.full(state).tolist(), kept, layers.governed, strict=True
            )
            if governed
        ]
        return max(0, min(room, default=0))

    def text_len(self, view: View) -> int:
        """Length of the text that budgets are shares of."""
        return int(view.state["text"]) if view.phase == "decode" else view.seen_len

    def over(self, view: View) -> bool:
        """Whether the layer is the policy's business and holds more than it may."""
        if view.phase == "decode":
            most = int(self.full(view.state)[view.layer])
        else:
            most = self.limit(view)
        return view.layers.governed[view.layer] and view.kept_len > most

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """Budgets as a text of the same length has them at ``keep``, none of them raised."""
        if not self.evicts or self.keep is None or keep >= self.keep:
            return None
        lower, text, old = replace(self, keep=keep), int(state["text"]), state["budgets"]
        wanted = [lower.budget(layer, text, layers) for layer in range(layers.count)]
        budgets = torch.minimum(old, torch.tensor(wanted))
        falls = (budgets < old) & torch.tensor(layers.governed)
        return (lower, {**state, "budgets": budgets}) if bool(falls.any()) else None

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

    def full(self, state: State) -> Tensor:
        return state["full"]

    def start(self, layers: Layers) -> State:
        return {**super().start(layers), "full": torch.zeros(layers.count, dtype=torch.int64)}

    def prefilled(self, view: View) -> State:
        return self._filling(view, super().prefilled(view))

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        if (found := super().tightened(keep, state, layers)) is None:
            return None
        lower, state = found
        return lower, {**state, "full": state["budgets"].clone()}

    def cut(
        self, seen: Observation, scores: Tensor, forced: Tensor, state: State
    ) -> tuple[Keep, State]:
        """The best entries of every head (``keep_best``), and the state once they are left."""
        keep = keep_best(seen, scores, self.limit(seen.view), forced)
        return keep, self._filling(seen.view, state)

    def _filling(self, view: View, state: State) -> State:
        """The state with the view's layer at its budget, its buffer empty."""
        full = state["full"].clone()
        full[view.layer] = self.limit(view) + self.slack
        return {**state, "full": full}


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

    def keep_adaptive(self, seen: Observation, scores: Tensor, always: Tensor) -> Keep:
        """Of every head what ``always`` stays (bool like ``scores``), and its best entries."""
        limit: int | Tensor = self.limit(seen.view)
        if self.adaptive:
            limit = self._own_limits(scores, always, seen)
        return keep_best(seen, scores, limit, always | seen.protected)

    def _own_limits(self, scores: Tensor, always: Tensor, seen: Observation) -> Tensor:
        """Entries of each head, ``[kv_heads]``: what always stays, and its part of the layer's
        best, never less than the safeguard."""
        heads, fixed = len(scores), int(always[0].sum())
        even = self.limit(seen.view) - fixed
        lengths = torch.tensor(seen.view.head_lens, device=scores.device)
        there = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
        context = torch.where(there & ~always, scores, -torch.inf)
        best = context.flatten().topk(min(heads * even, int(there.sum()))).indices
        won = torch.bincount(best // scores.shape[1], minlength=heads).cpu()
        own = (1 - self.safeguard) * won + self.safeguard * even
        return fixed + own.round().long()

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


def newest(positions: Tensor, count: int) -> Tensor:
    """Which entries are among the ``count`` newest present; bool like ``positions``."""
    if count <= 0:
        return torch.zeros_like(positions, dtype=torch.bool)
    if count >= positions.shape[1]:
        return torch.ones_like(positions, dtype=torch.bool)
    return positions >= positions.topk(count, dim=1).values[:, -1:]
