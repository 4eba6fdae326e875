"""Pyramid: late start, maximum scores, a budget of its own for every layer (this project's policy).

The paper's two findings, kept apart.  *Propagation* (fewer tokens computed): from the layer on
where the layers agree which tokens matter, only a share of the prompt goes deeper; before that
everything does, and where layers never agree nothing is dropped.  *Retention* (fewer entries
kept): every layer's cache has a budget of its own, filled per KV head, after prefill and while
generating, for prompt and generated tokens alike.

A token's score is the largest attention weight that any of the last ``window`` queries of any
head (of the KV head's group, for retention) gave it or a neighbour: the maximum keeps what a
single retrieval head found, which a mean over heads hides.  The layers agree once the top
``propagate_ratio`` share of one layer is mostly the top share of the layer before (rank
stability, in the spirit of ASL, arXiv 2601.07667, which measures the variance of ranks).
Decoupled budgets follow FastKV (2502.01068), pooled window scores SnapKV (2404.14469).

A calibrated ``Schedule`` knows the model's start layer and what each layer's budget is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_choice, check_share, check_whole, named_options
from pyramidinfer.policies.base import Forecast, best_entries, keep_best, pool_neighbours
from pyramidinfer.policies.budgets import CURVES, SHAPES, curve_ratio, fill_budgets
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.policies.schedule import FILE_NAME, HEADS, Schedule
from pyramidinfer.policies.snapkv import check_kernel
from pyramidinfer.types import Best, Keep, Layers, Needs, Observation, Reduce, State, View

__all__ = ["Pyramid"]

NEVER = -1


@named_options
@dataclass(frozen=True)
class Pyramid(Retaining):
    """Late start, maximum scores, budgets per layer.

    keep : mean over layers of a layer's entries as a share of the text; never exceeded while
        generating.  Layers that fewer tokens reach use less, and the others get that where the
        start is known beforehand.
    schedule : a ``Schedule`` or the path of one; ``"auto"`` takes the one in the model's folder
        if there is one; None is none.
    start_layer : the first layer after which tokens may be dropped; None finds it: from the
        schedule, else per prompt by rank stability.
    propagate_ratio : share of the prompt that goes deeper; None is the schedule's, else 0.2, or
        more where the layers could not hold ``keep`` otherwise (at ``keep=1`` nothing is dropped).
    budgets : without a schedule, how the budgets run over depth: ``"level"``, ``"linear"`` or
        ``"cosine"`` (falling), ``"rising"``.
    curve : how the propagated share falls after the start: ``"step"`` at once, ``"linear"`` or
        ``"cosine"`` from 1 down to ``propagate_ratio`` at the last layer.
    stable : overlap of successive layers' top shares from which they are said to agree.
    window : queries that score, and newest tokens that stay.
    kernel : neighbours over which scores are max-pooled (odd; 1 is off); None is the schedule's,
        else 7.
    heads : ``"max"`` over heads and queries, or their ``"mean"`` in each KV head's group (what
        goes deeper is the best of the groups); None is the schedule's, else ``"max"``.
    sinks : first tokens that stay.
    min_context : a cache is not cut below so many tokens in the mean over layers, and so many
        always go deeper.
    stride : generated tokens between two evictions, at most.
    """

    name: ClassVar[str] = "pyramid"
    evicts: ClassVar[bool] = True

    keep: float | None = 0.45
    schedule: Schedule | str | None = "auto"
    start_layer: int | None = None
    propagate_ratio: float | None = None
    budgets: str = "level"
    curve: str = "step"
    stable: float = 0.5
    window: int = 16
    kernel: int | None = None
    heads: str | None = None
    sinks: int = 4
    min_context: int = 64
    stride: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise ValueError("keep=None: give a share above 0 and at most 1")
        if self.start_layer is not None:
            check_whole("start_layer", self.start_layer, 0)
        if self.propagate_ratio is not None:
            check_share("propagate_ratio", self.propagate_ratio)
        check_share("stable", self.stable)
        check_choice("curve", self.curve, ("step", *sorted({*CURVES} - {"constant"})))
        check_choice("budgets", self.budgets, SHAPES)
        if self.heads is not None:
            check_choice("heads", self.heads, HEADS)
        for name, least in (("window", 1), ("sinks", 0), ("min_context", 1), ("stride", 1)):
            check_whole(name, getattr(self, name), least)
        if self.kernel is not None:
            check_kernel(self.kernel)
        if not isinstance(self.schedule, Schedule | str | Path | None):
            raise ValueError(f"schedule={self.schedule!r} must be a path, 'auto' or None")
        if isinstance(self.schedule, str | Path) and self.schedule != "auto":
            object.__setattr__(self, "schedule", Schedule.load(self.schedule))

    def for_model(self, folder: str) -> Pyramid:
        """The schedule in the model's folder, where ``schedule="auto"`` and there is one."""
        if self.schedule != "auto":
            return self
        beside = Path(folder).expanduser() / FILE_NAME
        found = Schedule.load(beside) if folder and beside.is_file() else None
        return replace(self, schedule=found)

    def check(self, layers: Layers) -> None:
        if self.start_layer is not None and self.start_layer >= layers.count:
            raise ValueError(
                f"start_layer={self.start_layer}: the model has {layers.count} layers, 0 to "
                f"{layers.count - 1}"
            )
        plan = self._plan
        if plan is not None and plan.layers != layers.count:
            raise ValueError(
                f"the schedule is for a model of {plan.layers} layers, this one has "
                f"{layers.count}: calibrate it anew, or pass schedule=None"
            )

    # --- budgets ------------------------------------------------------------------------------

    def floor(self) -> int:
        return self.sinks + self.window + 1

    def budget(self, layer: int, text_len: int, layers: Layers) -> int:
        size = max(text_len, self.min_context)
        return max(self.floor(), round(self._share(layer, size, layers) * size))

    def _share(self, layer: int, text_len: int, layers: Layers) -> float:
        """The layer's share of the text: by the schedule, or the same for all that can fill it."""
        assert self.keep is not None
        keep = min(1.0, max(self.keep, self.min_context / text_len))
        caps = self._caps(text_len, layers)
        if self._plan is not None:
            return self._plan.budgets(keep, caps)[layer]
        return fill_budgets(self.budgets, keep, caps)[layer]

    def _caps(self, text_len: int, layers: Layers) -> tuple[float, ...]:
        """Share of the text that can reach each layer, where the start is known beforehand."""
        caps, start = [1.0] * layers.count, self._start(layers)
        if start is not None:
            least = min(1.0, self._least / text_len)
            for deeper in range(start + 1, layers.count):
                caps[deeper] = max(least, self._going(deeper - 1, start, layers))
        return tuple(caps)

    @property
    def _plan(self) -> Schedule | None:
        return self.schedule if isinstance(self.schedule, Schedule) else None

    def _start(self, layers: Layers) -> int | None:
        """The start layer where it is known before a prompt is seen."""
        if self.start_layer is not None:
            return self.start_layer
        return self._plan.start_layer if self._plan else None

    @property
    def _wanted(self) -> float:
        """Share of the prompt that is to go deeper, were it not for ``keep``."""
        if self.propagate_ratio is not None:
            return self.propagate_ratio
        return self._plan.propagate if self._plan else 0.2

    def _going(self, layer: int, start: int, layers: Layers) -> float:
        """Share of the prompt that goes deeper than ``layer``."""
        if layer < start:
            return 1.0
        end = self._wanted
        if self.propagate_ratio is None:
            assert self.keep is not None
            deep = max(1, layers.count - 1 - start)
            end = max(end, (self.keep * layers.count - start - 1) / deep)  # so that keep fits
        if self.curve == "step":
            return end
        return curve_ratio(self.curve, layer - start + 1, layers.count - 1 - start, end)

    @property
    def _least(self) -> int:
        """So many tokens always go deeper."""
        return max(self.min_context, self.floor())

    def _count(self, layer: int, start: int, prompt_len: int, layers: Layers) -> int:
        """Tokens that go deeper than ``layer``."""
        return max(self._least, int(self._going(layer, start, layers) * prompt_len))

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        reach, start = [prompt_len], self._start(layers)
        for layer in range(layers.count - 1):
            going = reach[-1]
            if start is not None and layer >= start and layers.governed[layer]:
                going = min(going, self._count(layer, start, prompt_len, layers))
            reach.append(going)
        kept = super().forecast(prompt_len, max_new, layers).kept
        return Forecast(reach, [min(k, r + max_new) for k, r in zip(kept, reach, strict=True)])

    def working_bytes(self, prompt_len: int) -> int:
        return prompt_len + 1024  # the top share of the layer before, and the overlaps so far

    # --- prefill ------------------------------------------------------------------------------

    def start(self, layers: Layers) -> State:
        return {**super().start(layers), "start": torch.tensor(NEVER)}

    def needs(self, view: View) -> Needs:
        if not view.layers.governed[view.layer]:
            return Needs()
        rows = self.heads or (self._plan.heads if self._plan else "max")
        reduce = Reduce("kv_max", "max") if rows == "max" else Reduce("kv_mean", "mean")
        over = self.over(view)
        if view.phase == "decode":
            return (
                Needs(self.window, reduce, evict=True, best=self._rule(view)) if over else Needs()
            )
        return Needs(
            window=self.window, reduce=reduce, remember=True, retain=over,
            propagate=self._may_drop(view),
        )  # fmt: skip

    def _may_drop(self, view: View) -> bool:
        if view.layer == view.layers.count - 1 or view.new_len <= self.floor():
            return False
        start = self._start(view.layers)
        return start is None or view.layer >= start

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        view, start = seen.view, self._start(seen.view.layers)
        assert seen.scores is not None
        scores = self._pooled(seen.scores.amax(0, keepdim=True), seen)
        if start is None:
            state = self._look(scores, view, state)
            start = int(state["start"])
        if start == NEVER or view.layer < start:
            return Keep(), state
        count = self._count(view.layer, start, view.prompt_len, view.layers)
        if count >= view.new_len:
            return Keep(), state
        return Keep(best_entries(scores, count, self._forced(seen))), state

    def _look(self, scores: Tensor, view: View, state: State) -> State:
        """Compare the layer's top share with that of the layer before; say where they agree."""
        if view.layer == view.layers.first:
            state = {**state, "start": torch.tensor(NEVER)}
            state.pop("top", None)
        if int(state["start"]) != NEVER:
            return state
        count = max(1, int(self._wanted * view.new_len))
        context = scores[0, : view.new_len - self.window]
        top = torch.zeros(view.new_len, dtype=torch.bool)
        top[context.argsort(descending=True, stable=True)[:count].cpu()] = True
        before = state.get("top")
        agreed = state.get("agreed", torch.zeros(0, dtype=torch.float64))
        if before is not None and before.shape == top.shape:
            shared = float((top & before).sum()) / float(top.sum())
            agreed = torch.cat([agreed, torch.tensor([shared], dtype=torch.float64)])
        span = max(1, round(view.layers.count / 8))
        if len(agreed) >= span and float(agreed[-span:].mean()) >= self.stable:
            state = {**state, "start": torch.tensor(view.layer)}
            state.pop("top", None)
            state.pop("agreed", None)
            return state
        return {**state, "top": top, "agreed": agreed}

    def settled(self, view: View) -> State:
        state = super().settled(view)
        if view.layer == view.layers.count - 1:
            state.pop("top", None)
            state.pop("agreed", None)
        return state

    # --- the cache ----------------------------------------------------------------------------

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        return self._best(seen, self.limit(seen.view)), state

    def evict(self, seen: Observation, state: State) -> tuple[Keep, State]:
        return self._best(seen, self._rule(seen.view).count), state

    def _rule(self, view: View) -> Best:
        """What an eviction keeps."""
        limit = self.limit(view)
        count = limit + 1 - min(self.stride, max(1, limit // 16))
        return Best(count, self._kernel, "max", self.sinks, self.window)

    def ring(self, prompt_len: int, max_new: int) -> int:
        return self.window

    def _best(self, seen: Observation, count: int | tuple[int, ...]) -> Keep:
        assert seen.scores is not None
        return keep_best(seen, self._pooled(seen.scores, seen), count, self._forced(seen))

    def _pooled(self, scores: Tensor, seen: Observation) -> Tensor:
        return pool_neighbours(scores, seen.positions, self._kernel, "max")

    @property
    def _kernel(self) -> int:
        return self.kernel or (self._plan.kernel if self._plan else 7)

    def _forced(self, seen: Observation) -> Tensor:
        recent = seen.positions > seen.view.seen_len - 1 - self.window
        return recent | (seen.positions < self.sinks) | seen.protected
