"""PyramidInfer: fewer tokens in deeper layers (Yang et al., ACL Findings 2024, arXiv 2405.12532).

This follows the official *legacy* code, which produced the published numbers:

* Prefill: after a layer, the newest R+1 queries (R = prompt length x ``recent_ratio``) score the
  context by their attention, averaged over heads and over queries; query weights rise linearly
  from 1 to ``distance_weight``.  The best share of the context and the sinks stay, and only these
  tokens go to the next layer.
* Generation: prompt entries stay.  Every ``gen_chunk`` generated entries that leave the recent
  window are cut to ``gen_chunk * gen_keep`` times a share that falls with depth.

Deviations: ``decay_curve="linear"`` is linear (the official code silently uses a constant curve);
``interval`` above 1 works during generation (the official code crashes); ``start_layer`` and
``keep`` are our additions; layers with a sliding window shorter than the request are only limited
by that window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from pyramidinfer.config import check_choice, check_share, check_whole, is_number, named_options
from pyramidinfer.policies.base import NOTHING, Forecast, KeepError, Policy, check_keep
from pyramidinfer.policies.budgets import CURVES, curve_ratio
from pyramidinfer.policies.rule import best_entries
from pyramidinfer.types import Keep, Layers, Needs, Observation, Reduce, State, View

__all__ = ["PyramidInfer"]


class Schedule(NamedTuple):
    """The plan for one prompt length: tokens that enter each layer, and the solved decay."""

    reach: tuple[int, ...]
    ratio: float  # the recent window's share
    recent: int  # R: the window is R + 1 tokens
    curve: str
    decay: float


@named_options
@dataclass(frozen=True)
class PyramidInfer(Policy):
    """The paper's rule, both phases.

    Parameters
    ----------
    recent_ratio : the recent window as a share of the prompt; during generation, as a share of the
        first layer's entries.
    prefill_decay : share of the context that is kept after the last layer (the end of the curve).
    decay_curve : ``"cosine"``, ``"linear"`` or ``"constant"``.
    interval : layers from one drop to the next.
    min_context : the context of a layer is never cut to this many tokens or fewer.
    sinks : number of first tokens that always stay.
    distance_weight : weight of the newest query's attention; the oldest query has weight 1.
    gen_decay, gen_keep, gen_chunk : during generation, every ``gen_chunk`` entries that leave the
        recent window are cut to the share ``gen_keep``, times a cosine over depth that ends at
        ``gen_decay``.
    start_layer : the first layer after which tokens may be dropped.
    keep : replaces ``prefill_decay``: the share of the prompt that reaches a layer, as a mean over
        layers.  It uses the constant curve, solves for the decay at each prompt length, and lowers
        ``recent_ratio`` where no decay would meet ``keep``.  ``min_context`` still applies, so very
        short prompts keep more.  A layer's cache holds what reached the layer, so this is also the
        share of the cache after prefill.
    """

    name: ClassVar[str] = "pyramidinfer"
    computes_less: ClassVar[bool] = True
    evicts: ClassVar[bool] = True

    recent_ratio: float = 0.2
    prefill_decay: float = 0.8
    decay_curve: str = "cosine"
    interval: int = 1
    min_context: int = 64
    sinks: int = 4
    distance_weight: float = 1.2
    gen_decay: float = 0.1
    gen_keep: float = 0.9
    gen_chunk: int = 16
    start_layer: int = 0
    keep: float | None = None

    def __post_init__(self) -> None:
        check_choice("decay_curve", self.decay_curve, CURVES)
        if self.keep is not None and self.decay_curve == "linear":
            raise ValueError("keep= solves a constant curve; leave decay_curve='linear' out")
        if self.keep is not None and self.prefill_decay != PyramidInfer.prefill_decay:
            raise ValueError(
                f"keep= solves for the decay; leave prefill_decay={self.prefill_decay!r} out"
            )
        check_keep(self.keep)
        for name in ("recent_ratio", "prefill_decay", "gen_decay", "gen_keep"):
            check_share(name, getattr(self, name))
        if not (is_number(self.distance_weight) and 0 < self.distance_weight < float("inf")):
            raise ValueError(f"distance_weight={self.distance_weight!r} must be above 0")
        for name, least in (
            ("interval", 1),
            ("min_context", 0),
            ("sinks", 0),
            ("gen_chunk", 1),
            ("start_layer", 0),
        ):
            check_whole(name, getattr(self, name), least)

    def check(self, layers: Layers) -> None:
        if self.start_layer >= layers.count:
            raise ValueError(
                f"start_layer={self.start_layer}: the model has {layers.count} layers, so the last "
                f"one that can start is {layers.count - 1}"
            )
        untouched = _untouched(self, layers)
        lowest = untouched / layers.count
        if self.keep is not None and self.keep <= lowest and self.keep < 1:
            raise KeepError(
                f"keep={self.keep} cannot be reached: {untouched} of {layers.count} layers see "
                f"every token, so the lowest, for long prompts, is just above {lowest:.3f}; ask "
                f"for more, or lower start_layer={self.start_layer} or interval={self.interval}",
                lowest,
            )

    def start(self, layers: Layers) -> State:
        return {
            "marker": torch.zeros(layers.count, dtype=torch.int64),
            "ratio": torch.zeros((), dtype=torch.float64),
        }

    def needs(self, view: View) -> Needs:
        if not view.layers.governed[view.layer]:
            return NOTHING
        reduce = Reduce("mean", "mean", self.distance_weight)
        if view.phase == "decode":
            recent = self._recent(view)
            last = view.kept_len - recent - 1
            among = (last - self.gen_chunk, last)
            return Needs(window=recent + 1, reduce=reduce, retain=True, among=among)
        schedule = _schedule(self, view.prompt_len, view.layers)
        kept = self._kept_context(view.layer, view.new_len, view.prompt_len, schedule, view.layers)
        if kept is None:
            return NOTHING
        return Needs(window=schedule.recent + 1, reduce=reduce, propagate=True)

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        view = seen.view
        schedule = _schedule(self, view.prompt_len, view.layers)
        context = view.new_len - schedule.recent - 1
        count = self._kept_context(view.layer, view.new_len, view.prompt_len, schedule, view.layers)
        assert seen.scores is not None and count is not None
        forced = seen.protected[:, :context].clone()
        forced[:, : self.sinks] = True
        best = best_entries(seen.scores[:, :context], count, forced, kernels=seen.kernels)
        window = torch.arange(context, view.new_len, device=best.device)[None]
        return Keep(torch.cat([best, window], dim=1)), state

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        view, chunk = seen.view, self.gen_chunk
        order = seen.positions[0].argsort()  # all heads keep the same tokens
        last = view.kept_len - self._recent(view) - 1
        first = last - chunk
        candidates = order[first:last]
        share = curve_ratio("cosine", view.layer, view.layers.count, self.gen_decay)
        assert seen.scores is not None
        best = best_entries(
            seen.scores[:, candidates],
            max(1, int(chunk * self.gen_keep * share)),
            seen.protected[:, candidates].all(0, keepdim=True),
            kernels=seen.kernels,
        )[0]
        kept = torch.cat([order[:first], candidates[best], order[last:]])
        marker = state["marker"].clone()
        marker[view.layer] = len(kept) - self._recent(view)
        return Keep(kept[None]), {**state, "marker": marker}

    @property
    def slack(self) -> int:
        return self.gen_chunk - 1

    def ceiling(self, kept: np.ndarray, state: State, layers: Layers) -> np.ndarray:
        recent = int(int(kept[layers.first].max()) * float(state["ratio"]))  # grows, never falls
        found: np.ndarray = state["marker"].numpy()[:, None] + recent
        return found

    def prefilled(self, view: View) -> State:
        marker = view.state["marker"].clone()
        marker[view.layer] = view.kept_len
        ratio = _schedule(self, view.prompt_len, view.layers).ratio
        return {"marker": marker, "ratio": torch.tensor(ratio, dtype=torch.float64)}

    def truncated(self, state: State, kept: np.ndarray) -> State:
        longest = torch.from_numpy(kept.max(1)).to(torch.int64)
        return {**state, "marker": torch.minimum(state["marker"], longest)}

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        reach = list(_schedule(self, prompt_len, layers).reach)
        grown = _generation_peak(self, prompt_len, max_new, layers)
        return Forecast(reach, [n + extra for n, extra in zip(reach, grown, strict=True)])

    def ring(self, prompt_len: int, max_new: int) -> int:
        # Queries before the last prompt token cannot attend to generated entries.
        return min(int((prompt_len + max_new) * self.recent_ratio), max_new) + 1

    def _recent(self, view: View) -> int:
        """R while decoding: the same in all layers, growing with the first layer's entries."""
        return int(view.first_kept_len * float(view.state["ratio"]))

    def _kept_context(
        self, layer: int, length: int, prompt_len: int, schedule: Schedule, layers: Layers
    ) -> int | None:
        """Context tokens kept after ``layer`` when ``length`` entered it; None to keep all."""
        if not _drops_after(self, layer, layers):
            return None
        context = length - schedule.recent - 1
        least = min(self.min_context, prompt_len - 1 - schedule.recent)
        ratio = curve_ratio(schedule.curve, layer, layers.count, schedule.decay)
        count = int(context * ratio)
        return None if count <= least or context <= least or ratio >= 1 else count


def _drops_after(policy: PyramidInfer, layer: int, layers: Layers) -> bool:
    due = layer >= policy.start_layer and (layer - policy.start_layer) % policy.interval == 0
    return due and layer < layers.count - 1 and layers.governed[layer]


def _untouched(policy: PyramidInfer, layers: Layers) -> int:
    """Number of layers that every token reaches, up to the first drop."""
    drops = (layer for layer in range(layers.count) if _drops_after(policy, layer, layers))
    return next(drops, layers.count - 1) + 1


@lru_cache(maxsize=4096)
def _schedule(policy: PyramidInfer, prompt_len: int, layers: Layers) -> Schedule:
    """Tokens that enter each layer; exact, because they depend on lengths only."""

    def run(ratio: float, curve: str, decay: float) -> Schedule:
        recent = int(prompt_len * ratio)
        schedule, reach = Schedule((), ratio, recent, curve, decay), [prompt_len]
        for layer in range(layers.count - 1):
            kept = policy._kept_context(layer, reach[-1], prompt_len, schedule, layers)
            if kept is not None:
                kept = max(kept, min(policy.sinks, reach[-1] - recent - 1)) + recent + 1
            reach.append(reach[-1] if kept is None else kept)
        return schedule._replace(reach=tuple(reach))

    if policy.keep is None:
        return run(policy.recent_ratio, policy.decay_curve, policy.prefill_decay)
    wanted = policy.keep * layers.count * prompt_len

    def miss(schedule: Schedule) -> float:
        return abs(sum(schedule.reach) - wanted)

    best = run(policy.recent_ratio, "constant", 1.0)
    for narrower in range(8):
        ratio = policy.recent_ratio / 2**narrower if narrower < 7 else 0.0
        # min_context makes the share jump up for small decays, so bisection would not do.
        found = min((run(ratio, "constant", i / 256) for i in range(257)), key=miss)
        near = (found.decay + i / 8192 for i in range(-32, 33))
        fine = (run(ratio, "constant", decay) for decay in near if 0 <= decay <= 1)
        best = min([best, found, *fine], key=miss)
        if miss(best) <= 0.002 * layers.count * prompt_len:
            break
    return best


@lru_cache(maxsize=4096)
def _generation_peak(
    policy: PyramidInfer, prompt_len: int, max_new: int, layers: Layers
) -> tuple[int, ...]:
    """The most generated entries that each layer ever holds, found by simulating the lengths.

    For very long generations the bound is the number of generated tokens.
    """
    if max_new > 20_000:
        return (max_new,) * layers.count
    ratio, chunk = _schedule(policy, prompt_len, layers).ratio, policy.gen_chunk
    shares = [curve_ratio("cosine", i, layers.count, policy.gen_decay) for i in range(layers.count)]
    left = np.array([max(1, int(chunk * policy.gen_keep * share)) for share in shares])
    governed = np.array(layers.governed)
    held, marker = np.zeros(layers.count, dtype=np.int64), np.zeros(layers.count, dtype=np.int64)
    peak = held.copy()
    for _ in range(max_new):
        held += 1
        peak = np.maximum(peak, held)
        recent = int((prompt_len + int(held[layers.first])) * ratio)
        due = governed & (held - recent - marker >= chunk)
        held = np.where(due, held - chunk + left, held)
        marker = np.where(due, held - recent, marker)
    return tuple(peak.tolist())
