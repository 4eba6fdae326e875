"""The interface of attention backends.

Notation: n new tokens, m cached entries, H query heads, K KV heads (H is a multiple of K),
D key size, V value size, R decoding requests, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pyramidinfer.codec import Codec
from pyramidinfer.types import Reduce

__all__ = ["Attended", "Backend", "DecodePlan", "Pages", "Scale", "Scored"]


class Scale(NamedTuple):
    """How a layer turns ``q·k`` into a logit: times ``scale``, then ``softcap·tanh(x/softcap)``.

    ``window``: a query at position p sees positions above p - window; None: all positions up to p.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


class Pages(NamedTuple):
    """A group's storage: keys ``[pages, page, D]``, values ``[…, V]``, positions ``[…]``.

    A page holds entries of one KV head.  With a codec keys and values are its codes, and their
    scales are ``[pages, page, groups]``.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    codec: Codec | None = None

    @property
    def value_dim(self) -> int:
        """Size of a value (V)."""
        held = self.values.shape[-1]
        return held if self.codec is None else held * 8 // self.codec.bits


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The inputs that all layers of one decode step share; tensors are contiguous.

    tables : ``[L, R, K, P]`` int32 page numbers;  lengths : ``[L, R, K]`` int64, entries of each
    head, including the new one;  longest : ``[L]``, at least the largest length of each layer;
    positions : ``[R]`` int64, of the new tokens.
    """

    tables: Tensor
    lengths: Tensor
    longest: list[int]
    positions: Tensor


class Attended(NamedTuple):
    """out ``[n, H, V]``; lse ``[n, H]`` or None; probs ``[R, K, longest]`` (sum over a group)."""

    out: Tensor
    lse: Tensor | None = None
    probs: Tensor | None = None


class Scored(NamedTuple):
    """scores ``[1 or K, m]`` and the window's log-sum-exps ``[W, H]``."""

    scores: Tensor
    lse: Tensor


class ScoredPrefill(Protocol):
    """``Backend.prefill`` that also sums the weights of its newest queries in the same pass."""

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        ramp: Tensor,
    ) -> tuple[Tensor, Scored]:
        """``ramp`` ``[w]``: the factor for the weights of each of the newest w queries.

        ``reduce.heads`` is ``mean`` or ``kv_mean``; the scores are sums over those queries, and
        lse is ``[w, H]``.
        """
        ...


class Backend(Protocol):
    """Attention over pages (decode) and over one request's entries (prefill, extend)."""

    name: str

    @property
    def prefill_scored(self) -> ScoredPrefill | None:
        """``prefill`` that also sums weights, or None if the backend has no such version."""
        ...

    def run(
        self,
        plan: DecodePlan,
        layer: int,
        queries: Tensor,
        pages: Pages,
        scale: Scale,
        *,
        probs: bool = False,
    ) -> Attended:
        """One query ``[R, H, D]`` per request over its pages of ``layer``; also returns lse."""
        ...

    def prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        """Queries ``[n, H, D]`` over entries ``[K, m, D]`` of which the last n are their own.

        The other m - n entries are older than every query, in any order.  → ``[n, H, V]``.
        """
        ...

    def window_scores(
        self,
        queries: Tensor,
        keys: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        *,
        rows: int,
        lse: Tensor | None = None,
    ) -> Scored:
        """Attention weights of ``queries`` ``[W, H, D]`` over ``keys`` ``[K, m, D]``, reduced.

        A weight is ``exp(qk - lse)`` with the given log-sum-exp (``[W, H]``, from the time the
        query attended) and is never renormalised; without one, it is computed over ``keys``.
        ``rows`` is the length of the whole window: missing older rows count as zero weight
        (``reduce.rows="below"`` counts only the rows that exist).
        """
        ...

    def column_sums(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        """Attention weight that each entry gets from all ``queries``, summed over a group: ``[K,
        m]``.

        The last n entries are the queries' own, in order.
        """
        ...
