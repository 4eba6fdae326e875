"""The part of a cache that is in host memory while the request runs."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["Away"]


class Away:
    """The pages of a table that are in host memory.  The table lists and counts only the others.

    most : ``[layers, kv_heads]``, the number of whole pages of the prompt that may stay in the
    pool;  reserved : bytes of host memory that were reserved for the pages.

    here : by layer, bool ``[kv_heads, pages]``: which of its first pages are in the pool;
    blocks : by layer, the contents of the other pages, one head after another: a tensor ``[pages,
    page_size, ...]`` for each of ``Group.tensors``.
    """

    def __init__(self, most: np.ndarray, page_size: int, reserved: int) -> None:
        self.most, self.page_size, self.reserved = most, page_size, reserved
        self.here: dict[int, np.ndarray] = {}
        self.blocks: dict[int, list[Tensor]] = {}

    def anew(self) -> Away:
        """The same limits, and nothing in host memory yet."""
        return Away(self.most, self.page_size, self.reserved)

    @property
    def bytes(self) -> int:
        """Bytes of the pages in host memory."""
        return sum(each.nbytes for block in self.blocks.values() for each in block)

    def entries(self, kept: np.ndarray) -> np.ndarray:
        """Entries of every head together with the ``kept`` ones in the pool, ``[layers,
        kv_heads]``."""
        entries = kept.copy()
        for layer, here in self.here.items():
            entries[layer] += (~here).sum(1) * self.page_size
        return entries
