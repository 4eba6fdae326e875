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
from torch.nn import functional as F

from pyramidinfer.config import is_number
from pyramidinfer.native.library import Kernels, found_kernels, pointer
from pyramidinfer.types import Keep, Layers, Needs, Observation, State, View

__all__ = ["Forecast", "Policy", "best_entries", "check_keep", "pool_neighbours"]

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
    keeps_all: ClassVar[bool] = False  # a text computed anew gives the same cache
    streams: ClassVar[bool] = False  # rotary positions are places in the cache, so no text ends

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` where the options cannot be met on a model of this depth."""

    def for_model(self, folder: str) -> Policy:
        """The policy as it is for the model in ``folder`` (``""`` if it came from none)."""
        return self

    def lowest_keep(self, layers: Layers) -> float:
        """The share that ``keep`` must be above on a model of this depth, for long prompts."""
        return 0.0

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

    def idle_steps(self, kept: list[int], prompt_len: int, layers: Layers, state: State) -> int:
        """Tokens that can be generated from here on before any layer's ``evict`` can be due.

        ``kept``: entries per layer now.  0: ask again after the next token.
        """
        return 0

    def settled(self, view: View) -> State:
        """The state once a layer's prefill or extend is over (``view.kept_len`` is final)."""
        return view.state

    def truncated(self, state: State, kept: list[int]) -> State:
        """The state once the newest tokens were forgotten; ``kept`` entries are left per layer."""
        return state

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        """Upper bounds for a request; admission rests on them."""
        return Forecast([prompt_len] * layers.count, [prompt_len + max_new] * layers.count)

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """The policy at a lower ``keep``, and the state of a request that decodes under it from
        now on; None where some layer would not be held to less."""
        return None

    def working_bytes(self, prompt_len: int) -> int:
        """State beyond ``start``'s that is held while a prompt goes through the layers."""
        return 0

    @property
    def computes_less(self) -> bool:
        """Whether prompt tokens may be dropped between layers."""
        return type(self).propagate is not Policy.propagate

    @property
    def anchors(self) -> int:
        """For a policy that streams: entries that stay in front of what is dropped."""
        return 0

    def ring(self, prompt_len: int, max_new: int) -> int:
        """Queries per layer that ``evict`` looks back on while decoding (0: none)."""
        return 0


def best_entries(scores: Tensor, count: int, forced: Tensor, positions: Tensor | None = None
                 ) -> Tensor:  # fmt: skip
    """Indices ``[heads, max(count, forced)]`` of the highest scores, ascending.

    ``scores`` and ``forced`` (entries that win regardless) are ``[heads, n]``; equal scores go to
    the earlier entry: by ``positions`` in the text, for a cache that is not in order.
    """
    kernels = found_kernels()
    if kernels is not None and scores.is_cpu and scores.dtype == torch.float32:
        return _best_native(kernels, scores, count, forced, positions)
    count = max(count, int(forced.sum(-1).max()))
    ranked = torch.where(forced, torch.inf, scores)
    if positions is None:
        best = ranked.argsort(dim=-1, descending=True, stable=True)
    else:
        by_age = positions.expand_as(ranked).argsort(dim=-1)
        best = ranked.gather(1, by_age).argsort(dim=-1, descending=True, stable=True)
        best = by_age.gather(1, best)
    return best[:, :count].sort(-1).values


def _best_native(kernels: Kernels, scores: Tensor, count: int, forced: Tensor,
                 positions: Tensor | None) -> Tensor:  # fmt: skip
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    scores, forced = (each.expand(heads, size).contiguous() for each in (scores, forced))
    places = None if positions is None else positions.expand(heads, size).long().contiguous()
    out = torch.empty(heads * size, dtype=torch.int64)
    found = kernels.best_entries(
        pointer(scores), pointer(forced), pointer(places), heads, size, count, pointer(out)
    )
    return out[: heads * found].view(heads, found)


def pool_neighbours(scores: Tensor, positions: Tensor, kernel: int, how: str) -> Tensor:
    """Each score replaced by the ``"mean"`` or ``"max"`` of it and its neighbours in the text.

    scores ``[heads, n]``, positions ``[heads, n]`` or ``[1, n]`` in any order; ``kernel`` is odd.
    Neighbours are the nearest entries present; beyond either end a mean counts zeros.
    """
    if kernel == 1 or scores.shape[1] < 2:
        return scores
    kernels = found_kernels()
    if kernels is not None and scores.is_cpu and scores.dtype == torch.float32:
        scores, places = scores.contiguous(), positions.long().contiguous()
        out, row = torch.empty_like(scores), places.shape[1] if places.shape[0] > 1 else 0
        kernels.pool_neighbours(pointer(scores), pointer(places), row, *scores.shape, kernel,
                                how == "max", pointer(out))  # fmt: skip
        return out
    order = positions.expand(scores.shape[0], -1).argsort(1)
    sorted_scores = scores.gather(1, order)[:, None]
    if how == "max":
        pooled = F.max_pool1d(sorted_scores, kernel, 1, kernel // 2)
    else:
        pooled = F.avg_pool1d(sorted_scores, kernel, 1, kernel // 2)
    return torch.empty_like(scores).scatter_(1, order, pooled[:, 0])


def check_keep(keep: object) -> None:
    """``ValueError`` unless ``keep`` is None or a share in (0, 1]."""
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):  # type: ignore[operator]
        raise ValueError(f"keep={keep!r} must be above 0 and at most 1")
