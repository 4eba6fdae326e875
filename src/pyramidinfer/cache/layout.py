"""How a byte budget is cut into pages: sizes and counts, without any storage."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyramidinfer.cache.group import GroupSpec

__all__ = ["Layout"]


class Layout:
    """Pages for every KV head of every layer, out of one byte budget.

    All layers have as many KV heads.  specs : groups of layers whose entries have the same size;
    scores : whether each entry has a running score beside it.  ``AssertionError`` where the budget
    holds less than a page a head (``least_bytes``).

    group_of, layer_page_bytes : ``[layers]``;  page_bytes, page_counts : of every group.
    """

    def __init__(
        self, specs: list[GroupSpec], budget: int, page_size: int = 16, *, scores: bool = False
    ) -> None:
        self.specs, self.budget, self.page_size, self.scores = specs, budget, page_size, scores
        self.layers = sum(len(spec.layers) for spec in specs)
        self.kv_heads = specs[0].kv_heads
        assert all(spec.kv_heads == self.kv_heads for spec in specs), "layers differ in KV heads"
        self.page_bytes = [spec.page_bytes(page_size, scores) for spec in specs]
        least = self.least_bytes(specs, page_size, scores)
        assert budget >= least, "the budget is below one page per head"
        self.group_of = np.zeros(self.layers, dtype=np.int64)
        counts = []
        for index, (spec, size) in enumerate(zip(specs, self.page_bytes, strict=True)):
            heads = len(spec.layers) * spec.kv_heads
            counts.append(max(heads, int(budget * (size * heads / least)) // size))
            self.group_of[list(spec.layers)] = index
        self.page_counts = np.array(counts)
        self.layer_page_bytes = np.array([self.page_bytes[group] for group in self.group_of])

    @classmethod
    def smallest(cls, specs: list[GroupSpec], page_size: int, scores: bool = False) -> Layout:
        """One page a head: for working out what something costs."""
        return cls(specs, cls.least_bytes(specs, page_size, scores), page_size, scores=scores)

    @staticmethod
    def least_bytes(specs: list[GroupSpec], page_size: int, scores: bool = False) -> int:
        """Bytes of one page per head of every layer."""
        return sum(
            spec.page_bytes(page_size, scores) * len(spec.layers) * spec.kv_heads for spec in specs
        )

    def pages_for(self, entries: Any) -> Any:
        """Pages of so many entries (a number or an array)."""
        return -(-entries // self.page_size)

    def by_group(self, pages: np.ndarray) -> np.ndarray:
        """Pages of every layer, ``[layers]``, added up by group."""
        return np.bincount(self.group_of, pages, len(self.page_bytes)).astype(np.int64)

    def bytes_of(self, pages: np.ndarray) -> int:
        """Bytes of so many pages of every group."""
        return int((pages * np.array(self.page_bytes)).sum())
