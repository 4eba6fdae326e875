"""Layers whose entries have the same size: their tensors, page counts and free list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.codec import Codec

__all__ = ["Group", "GroupSpec", "PoolExhausted"]


class PoolExhausted(RuntimeError):
    """No free page is left.  The engine reserves pages at admission, so it never gets here."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers that share pages because their entries have the same size.

    dtype : of keys and values in computations;  codec : how they are stored, None if they are
    stored in ``dtype``.
    """

    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    codec: Codec | None = None

    def page_bytes(self, page_size: int, scores: bool) -> int:
        """Bytes of a page, which belongs to one head: keys and values with their scales, int32
        positions and, if requested, float32 scores."""
        sizes = (self.key_dim, self.value_dim)
        numbers = sum(sizes) * self.dtype.itemsize
        if self.codec is not None:
            numbers = sum(map(self.codec.entry_bytes, sizes))
        return page_size * (numbers + 4 + (4 if scores else 0))

    @property
    def plain(self) -> GroupSpec:
        """Bytes of a page whose entries are stored in ``dtype``."""
        return replace(self, codec=None)

    @property
    def uncoded(self) -> GroupSpec:
        """Bytes of a page to compare with: entries of 16 bits with a codec, else of ``dtype``."""
        return self if self.codec is None else replace(self.plain, dtype=torch.bfloat16)


class Group:
    """One group's tensors, page counts and free list.

    ``scratch``: an extra last page that is never allocated; rows without a request write there.
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
        self.keys, self.key_scales = self._storage(shape, spec.key_dim, device)
        self.values, self.value_scales = self._storage(shape, spec.value_dim, device)
        self.positions = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scores = torch.zeros(shape, device=device) if scores else None
        self.counts = np.zeros(pages, dtype=np.int32)
        self.free = list(range(pages - 1, -1, -1))

    def _storage(
        self, shape: tuple[int, int], size: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Keys or values ``[pages, page, size]``; with a codec, their codes and scales."""
        codec, fill = self.spec.codec, float("nan") if self.poison else 0.0
        make = torch.full if self.poison else lambda size, _, **kw: torch.zeros(size, **kw)
        if codec is None:
            return make((*shape, size), fill, dtype=self.spec.dtype, device=device), None
        codes = torch.zeros((*shape, codec.code_bytes(size)), dtype=torch.uint8, device=device)
        scales = (*shape, size // codec.group(size))
        return codes, make(scales, fill, dtype=torch.float16, device=device)

    def tensors(self) -> list[Tensor]:
        """All tensors of an entry: keys, values, positions; scores if there are any; with a codec,
        the scales of keys and of values."""
        extra = (self.scores, self.key_scales, self.value_scales)
        return [self.keys, self.values, self.positions, *(x for x in extra if x is not None)]

    def spoil(self, *at: Any) -> None:
        """Make the entries at an index unusable."""
        storages = [(self.keys, self.key_scales), (self.values, self.value_scales)]
        for numbers, scales in storages:
            (numbers if scales is None else scales)[at] = float("nan")

    def take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise PoolExhausted(f"{count} pages requested, {len(self.free)} free")
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
            self.spoil(freed)
