"""Layers whose entries have the same size: their tensors, page counts and free list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Group", "GroupSpec", "PoolExhausted"]


class PoolExhausted(RuntimeError):
    """No free page is left; admission by reservation makes this unreachable in the engine."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers that share pages because their entries have the same size."""

    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def page_bytes(self, page_size: int, scores: bool) -> int:
        """Bytes of a page, which is one head's: keys, values, int32 positions and, if asked,
        float32 scores."""
        entry = (self.key_dim + self.value_dim) * self.dtype.itemsize + 4 + (4 if scores else 0)
        return page_size * entry


class Group:
    """One group's tensors, page counts and free list.

    ``scratch``: a page behind all others that is never taken; rows without a request write there.
    """

    def __init__(
        self,
        spec: GroupSpec,
        pages: int,
        page_size: int,
        device: torch.device,
        scores: bool,
        poison: bool,
    ) -> None:
        self.spec, self.poison, self.scratch = spec, poison, pages
        shape = (pages + 1, page_size)
        fill = float("nan") if poison else 0.0
        make = torch.full if poison else lambda size, _, **kw: torch.zeros(size, **kw)
        self.keys = make((*shape, spec.key_dim), fill, dtype=spec.dtype, device=device)
        self.values = make((*shape, spec.value_dim), fill, dtype=spec.dtype, device=device)
        self.positions = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scores = torch.zeros(shape, device=device) if scores else None
        self.counts = np.zeros(pages, dtype=np.int32)
        self.free = list(range(pages - 1, -1, -1))

    def tensors(self) -> list[Tensor]:
        extra = [] if self.scores is None else [self.scores]
        return [self.keys, self.values, self.positions, *extra]

    def take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise PoolExhausted(f"{count} pages asked for, {len(self.free)} free")
        if not count:
            return []
        taken = self.free[: -count - 1 : -1]
        del self.free[-count:]
        self.counts[taken] = 1
        return taken

    def drop(self, pages: np.ndarray) -> None:
        self.counts[pages] -= 1
        freed = pages[self.counts[pages] == 0].tolist()
        self.free.extend(freed)
        if self.poison and freed:
            self.keys[freed] = float("nan")
            self.values[freed] = float("nan")
