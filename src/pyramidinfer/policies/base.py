"""The questions every method answers.

A policy is a frozen dataclass whose fields are its options.  Its methods are pure: what it must
remember of a request is handed in and out as ``state`` (small host tensors).  It sees lengths and
tensors, never a module, a cache or a model's config.  Everything not overridden means "all".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.config import is_number
from pyramidinfer.native.library import Kernels, pointer
from pyramidinfer.policies.profile import Profile
from pyramidinfer.types import Keep, Layers, Needs, Observation, State, TokenIds, View

__all__ = ["Forecast", "Policy", "best_entries", "check_keep", "keep_best", "pool_neighbours"]

NOTHING = Needs()


class Forecast(NamedTuple):
    """Upper bounds per layer.

    ``reach``: prompt tokens that enter the layer; ``kept``: entries its longest KV head holds from
    the end of its prefill to the end of generation.  ``heads``: the same of every head, ``[layers,
    kv_heads]``, where they differ.  ``total``: entries that a layer's heads hold together, where
    that is less than their bounds add up to.  ``sum``: the same of all layers, for a policy whose
    text is read again (``readings``) and cut when that is over.
    """

    reach: list[int]
    kept: list[int]
    heads: list[list[int]] | None = None
    total: list[int] | None = None
    sum: int | None = None

    def by_head(self, kv_heads: int) -> np.ndarray:
        """What every head holds at most, ``[layers, kv_heads]``."""
        if self.heads is not None:
            return np.array(self.heads)
        return np.repeat(np.array(self.kept)[:, None], kv_heads, 1)


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

    def with_profile(self, profile: Profile | None) -> Policy:
        """The policy with the model's head profile, where it ``wants_profile``; None: there is
        none to be had."""
        return self

    def with_tokenizer(self, encode: Callable[[str], TokenIds] | None) -> Policy:
        """The policy with its sentences as tokens, where it ``wants_tokenizer``; None: the model
        came without one."""
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
        """Which entries stay in the layer's cache after prefill or extend; where the text was read
        again, once all of that is over: layer by layer, with a view whose ``new_len`` is 0."""
        return Keep(), state

    def readings(self, text: Sequence[int], room: int, head: int = 0) -> list[TokenIds]:
        """What is read behind a text once it is in, while every layer still holds all of it: one
        after the other, each from the text's end on, and forgotten again.

        ``text``: the new tokens (at admission only their number counts);  ``room``: positions that
        there are behind it;  ``head``: tokens in front that the tokenizer puts before every text.
        ``ValueError`` where there are too few positions.
        """
        return []

    def reread(self, seen: Observation, state: State) -> State:
        """The state once a reading is through a layer; ``seen`` holds what its queries gave the
        entries that were there before."""
        return state

    def evict(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which entries stay while decoding."""
        return Keep(), state

    def idle_steps(
        self, kept: list[list[int]], prompt_len: int, layers: Layers, state: State
    ) -> int:
        """Tokens that can be generated from here on before any layer's ``evict`` can be due.

        ``kept``: entries now, ``[layers][kv_heads]``.  0: ask again after the next token.
        """
        return 0

    def prefilled(self, view: View) -> State:
        """The state once a layer's prefill or extend is over (``view.kept_len`` is final)."""
        return view.state

    def truncated(self, state: State, kept: list[list[int]]) -> State:
        """The state once the newest tokens were forgotten; ``kept``: as in ``idle_steps``."""
        return state

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        """Upper bounds for a request; admission rests on them."""
        return Forecast([prompt_len] * layers.count, [prompt_len + max_new] * layers.count)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        """Upper bounds of what is kept once a further text has joined a cache, ``text_len`` tokens
        in all, however much was held before (its ``reach`` tells nothing); None: nothing of what
        was held is dropped then."""
        return None

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """The policy at a lower ``keep``, and the state of a request that decodes under it from
        now on; None where some layer would not be held to less."""
        return None

    def working_bytes(self, prompt_len: int, layers: Layers) -> int:
        """State beyond ``start``'s that is held while a prompt goes through the layers."""
        return 0

    @property
    def wants_profile(self) -> bool:
        """Whether the model's head profile is to be handed in (``with_profile``)."""
        return False

    @property
    def wants_tokenizer(self) -> bool:
        """Whether sentences are to be made into tokens (``with_tokenizer``)."""
        return False

    @property
    def rule(self) -> str:
        """What its choices rest on beside the options, in a few words; ``""`` for nothing."""
        return ""

    @property
    def reads_again(self) -> bool:
        """Whether a text may be read again once it is in."""
        return type(self).readings is not Policy.readings

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


def keep_best(
    seen: Observation, scores: Tensor, count: int | tuple[int, ...] | Tensor, forced: Tensor
) -> Keep:
    """Of every KV head the entries with the highest scores; forced ones win.

    ``scores``: ``[1 or kv_heads, n]`` (one row for all heads that hold the same tokens);
    ``count``: of every head, or one a head;  ``forced``: bool ``[1 or kv_heads, n]``.  Each
    head gets room for as many as the one with most forced entries has, heads that lose nothing
    left aside; a shorter one keeps what it has.
    """
    heads = max(len(scores), len(forced))
    counts = torch.as_tensor(count).expand(heads)
    lengths = torch.tensor(seen.view.head_lens[:heads])
    indices, found = _best(scores, counts, forced, seen.positions[:heads], lengths, seen.kernels)
    same = bool((found == indices.shape[1]).all())
    return Keep(indices, None if same else found)


def best_entries(
    scores: Tensor,
    count: int,
    forced: Tensor,
    positions: Tensor | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Indices ``[heads, max(count, forced)]`` of the highest scores, ascending.

    ``scores`` and ``forced`` (entries that win regardless) are ``[heads, n]``; equal scores go to
    the earlier entry: by ``positions`` in the text, for a cache that is not in order.
    ``kernels``: as in an observation.
    """
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    lengths = torch.full((heads,), size)
    return _best(scores, torch.full((heads,), count), forced, positions, lengths, kernels)[0]


def _best(
    scores: Tensor,
    counts: Tensor,
    forced: Tensor,
    positions: Tensor | None,
    lengths: Tensor,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices ``[heads, k]``, and how many of each head count (``[heads]``, on the host)."""
    if kernels is not None and scores.is_cpu and scores.dtype == torch.float32:
        return _best_native(kernels, scores, counts, forced, positions, lengths)
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    there = torch.arange(size) < lengths[:, None]
    forced = forced.expand(heads, size) & there.to(forced.device)
    must = torch.where(counts < lengths, forced.sum(-1).cpu(), 0)
    counts = torch.minimum(counts.clamp(min=int(must.max())), lengths)
    ranked = torch.where(forced, torch.inf, scores)
    ranked = torch.where(there.to(ranked.device), ranked, -torch.inf)
    places = -torch.arange(size, device=ranked.device)[None] if positions is None else -positions
    places = torch.where(there.to(ranked.device), places, -(2**62))  # what is not there comes last
    by_age = places.expand_as(ranked).argsort(dim=-1, descending=True, stable=True)
    best = ranked.gather(1, by_age).argsort(dim=-1, descending=True, stable=True)
    best = by_age.gather(1, best)[:, : int(counts.max())]
    beyond = (torch.arange(best.shape[1]) >= counts[:, None]).to(best.device)
    best = torch.where(beyond, size, best).sort(-1).values
    return torch.where(beyond, 0, best), counts


def _best_native(
    kernels: Kernels,
    scores: Tensor,
    counts: Tensor,
    forced: Tensor,
    positions: Tensor | None,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    scores, forced = (each.expand(heads, size).contiguous() for each in (scores, forced))
    places = None if positions is None else positions.expand(heads, size).long().contiguous()
    out, counts = torch.empty(heads * size, dtype=torch.int64), counts.long().clone()
    found = kernels.best_entries(
        pointer(scores),
        pointer(forced),
        pointer(places),
        pointer(lengths),
        heads,
        size,
        pointer(counts),
        pointer(out),
    )
    return out[: heads * found].view(heads, found), counts


def pool_neighbours(
    scores: Tensor, positions: Tensor, kernel: int, how: str, kernels: Kernels | None = None
) -> Tensor:
    """Each score replaced by the ``"mean"`` or ``"max"`` of it and its neighbours in the text.

    scores ``[heads, n]``, positions ``[heads, n]`` or ``[1, n]`` in any order; ``kernel`` is odd.
    Neighbours are the nearest entries present; beyond either end a mean counts zeros.
    ``kernels``: as in an observation.
    """
    if kernel == 1 or scores.shape[1] < 2:
        return scores
    if kernels is not None and scores.is_cpu and scores.dtype == torch.float32:
        scores, places = scores.contiguous(), positions.long().contiguous()
        out, row = torch.empty_like(scores), places.shape[1] if places.shape[0] > 1 else 0
        kernels.pool_neighbours(
            pointer(scores), pointer(places), row, *scores.shape, kernel, how == "max", pointer(out)
        )
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
