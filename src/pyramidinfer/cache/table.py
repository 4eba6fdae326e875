"""What one request owns: pages and lengths per KV head, policy state and query ring.

``seen_len`` is the number of tokens that the request has processed (its next position);
``kept[layer, head]`` is the number of entries that a head still has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.away import Away
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.types import State

__all__ = ["Copying", "Ring", "Table"]


class Copying(Protocol):
    """A started copy between a device and host memory (``torch.cuda.Event`` is one)."""

    def query(self) -> bool:
        """Whether it has finished."""

    def synchronize(self) -> None:
        """Wait until it has finished."""


@dataclass(slots=True)
class Ring:
    """The newest queries of every layer, with the log-sum-exp that each had when it attended.

    queries : ``[layers, capacity, heads, key_dim]``;  lse : ``[layers, capacity, heads]``;
    positions : ``[capacity]``.  Rows are numbered in the order of writing; row ``i`` is at
    ``i % capacity``, and rows ``oldest`` to ``written - 1`` are valid.
    """

    queries: Tensor
    lse: Tensor
    positions: Tensor
    written: int = 0
    oldest: int = 0

    @classmethod
    def empty(
        cls,
        layers: int,
        capacity: int,
        heads: int,
        key_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Ring:
        return cls(
            torch.zeros(layers, capacity, heads, key_dim, dtype=dtype, device=device),
            torch.zeros(layers, capacity, heads, dtype=accumulate_dtype(dtype), device=device),
            torch.zeros(capacity, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        return self.positions.shape[0]

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + self.lse.nbytes + self.positions.nbytes

    def push(self, queries: Tensor, lse: Tensor, position: int) -> None:
        """Add one row: queries ``[layers, heads, key_dim]`` and lse ``[layers, heads]``."""
        row = self.written % self.capacity
        self.queries[:, row], self.lse[:, row] = queries, lse
        self.positions[row] = position
        self.written += 1
        self.oldest = max(self.oldest, self.written - self.capacity)

    def begin(self, positions: Tensor) -> None:
        """Record that the first rows of every layer were just written, for these positions."""
        count = positions.shape[0]
        self.positions[:count], self.oldest, self.written = positions, 0, count

    def truncate(self, seen_len: int) -> None:
        """Remove rows of positions from ``seen_len`` on."""
        while self.written > self.oldest:
            if int(self.positions[(self.written - 1) % self.capacity]) < seen_len:
                break
            self.written -= 1

    def rows(self, count: int) -> Tensor:
        """Indices of the newest rows, at most ``count``, oldest first."""
        count = min(count, self.written - self.oldest)
        rows = torch.arange(self.written - count, self.written, device=self.positions.device)
        return rows % self.capacity

    def newest(self, layer: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The newest rows of a layer, at most ``count``, oldest first."""
        rows = self.rows(count)
        return self.queries[layer, rows], self.lse[layer, rows], self.positions[rows]


@dataclass(slots=True, eq=False)
class Table:
    """Pages and lengths of one request.

    pages : ``[layers, own, capacity]`` int32, of the KV heads this rank holds (all of them on one
    rank); the first ``held[layer, head]`` of a row are owned.  held : ``[layers, own]`` int64,
    pages in use.  kept : ``[layers, kv_heads]`` int64, entries of every head, of all ranks.
    transient_bytes : hidden states and window queries of a prompt in progress, outside the pool.
    arriving : the copy of its entries from host memory, until it is known to have finished.
    away : its pages that are in host memory while it is in use (``cache/away.py``), or None.
    """

    pages: np.ndarray
    held: np.ndarray
    kept: np.ndarray
    seen_len: int = 0
    state: State = field(default_factory=dict)
    ring: Ring | None = None
    transient_bytes: int = 0
    peak_bytes: int = 0
    noted_bytes: int = 0  # bytes outside pages, when the pool last recorded them
    arriving: Copying | None = None
    away: Away | None = None

    @property
    def is_here(self) -> bool:
        """Whether all entries have been copied back from host memory."""
        if self.arriving is not None and self.arriving.query():
            self.arriving = None
        return self.arriving is None

    def wait(self) -> None:
        """Wait until all entries have been copied back from host memory."""
        if self.arriving is not None:
            self.arriving.synchronize()
            self.arriving = None

    @classmethod
    def empty(cls, layers: int, kv_heads: int, own: int, capacity: int) -> Table:
        return cls(
            np.zeros((layers, own, capacity), dtype=np.int32),
            np.zeros((layers, own), dtype=np.int64),
            np.zeros((layers, kv_heads), dtype=np.int64),
        )

    @property
    def entries(self) -> np.ndarray:
        """Entries of every head, also those in host memory, ``[layers, kv_heads]``."""
        return self.kept if self.away is None else self.away.entries(self.kept)

    @property
    def longest(self) -> np.ndarray:
        """Number of entries of each layer's longest head, ``[layers]``."""
        longest: np.ndarray = self.kept.max(1)
        return longest

    @property
    def layer_tokens(self) -> float:
        """Number of entries per layer, averaged over its heads."""
        return float(self.kept.mean(1).sum())

    def lens(self, layer: int) -> tuple[int, ...]:
        """Number of entries of each of a layer's heads."""
        return tuple(self.kept[layer].tolist())

    @property
    def extra_bytes(self) -> int:
        """Bytes outside pages: policy state, ring, and a prompt in progress."""
        ring = self.ring.nbytes if self.ring else 0
        return ring + self.transient_bytes + sum(value.nbytes for value in self.state.values())

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` page numbers per head."""
        layers, kv_heads, old = self.pages.shape
        wider = np.zeros((layers, kv_heads, max(capacity, 2 * old)), dtype=np.int32)
        wider[:, :, :old] = self.pages
        self.pages = wider
