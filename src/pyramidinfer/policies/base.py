"""The questions every method answers.

A policy is a frozen dataclass whose fields are its options.  Its methods are pure: what it must
remember of a request is handed in and out as ``state`` (small host tensors).  It sees lengths and
tensors, never a module, a cache or a model's config.  Everything not overridden means "all".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.types import Keep, Layers, Needs, Observation, State, View

__all__ = ["Forecast", "Policy", "best_entries"]

NOTHING = Needs()


class Forecast(NamedTuple):
    """Upper bounds per layer.

    ``reach``: prompt tokens that enter the layer; ``kept``: entries it holds from the end of its
    prefill to the end of generation.
    """

    reach: list[int]
    kept: list[int]


@dataclass(frozen=True)
class Policy:
    """Keep everything: the defaults of every question."""

    name: ClassVar[str] = ""
    uses_scores: ClassVar[bool] = False  # asks the pool for a running score per entry
    evicts: ClassVar[bool] = False  # is to be asked while decoding

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` where the options cannot be met on a model of this depth."""

    def start(self, layers: Layers) -> State:
        """The state of a request that has not begun."""
        return {}

    def needs(self, view: View) -> Needs:
        """What to observe, and which questions to ask now.  Called often: ints only."""
        return NOTHING

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which of the layer's new tokens enter the next layer: indices ``[1, k]``, ascending."""
        return Keep(), state

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which entries stay in the layer's cache after prefill or extend."""
        return Keep(), state

    def evict(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which entries stay while decoding."""
        return Keep(), state

    def settled(self, view: View) -> State:
        """The state once a layer's prefill or extend is over (``view.kept_len`` is final)."""
        return view.state

    def truncated(self, state: State, kept: list[int]) -> State:
        """The state once the newest tokens were forgotten; ``kept`` entries are left per layer."""
        return state

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        """Upper bounds for a request; admission rests on them."""
        return Forecast([prompt_len] * layers.count, [prompt_len + max_new] * layers.count)

    def ring(self, prompt_len: int, max_new: int) -> int:
        """Queries per layer that ``evict`` looks back on while decoding (0: none)."""
        return 0


def best_entries(scores: Tensor, count: int, forced: Tensor) -> Tensor:
    """Indices ``[heads, max(count, forced)]`` of the highest scores, ascending.

    ``scores`` and ``forced`` (entries that win regardless) are ``[heads, n]``; equal scores go to
    the earlier entry.
    """
    count = max(count, int(forced.sum(-1).max()))
    ranked = torch.where(forced, torch.inf, scores).argsort(dim=-1, descending=True, stable=True)
    return ranked[:, :count].sort(-1).values
