"""How a byte budget is cut into pages: sizes and counts, without any storage."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyramidinfer.cache.group import GroupSpec

__all__ = ["Layout", "Place"]


class Place(NamedTuple):
    """What one rank holds: of these layers these KV heads."""

    layers: range
    heads: range


class Layout:
    """Pages for every KV head of every layer, out of one byte budget a rank.

    All layers have as many KV heads.  specs : groups of layers whose entries have the same size;
    scores : whether each entry has a running score beside it;  places : what each rank holds (one
    rank holds everything), of which ``own`` is that of ``rank``.  ``AssertionError`` where the
    budget holds less than a page a head (``least_bytes``).

    group_of, layer_page_bytes : ``[layers]``;  page_bytes : of every group;  uncoded_page_bytes :
    ``[layers]``, of pages whose entries have 16 bits a number (without a codec: as they are);
    page_counts : of every group of the first rank, then of the next one: the same on all ranks, so
    that they admit the same requests.
    """

    def __init__(
        self,
        specs: list[GroupSpec],
        budget: int,
        page_size: int = 16,
        *,
        scores: bool = False,
        places: Sequence[Place] = (),
        rank: int = 0,
    ) -> None:
        self.specs, self.budget, self.page_size, self.scores = specs, budget, page_size, scores
        self.layers = sum(len(spec.layers) for spec in specs)
        self.kv_heads = specs[0].kv_heads
        assert all(spec.kv_heads == self.kv_heads for spec in specs), "layers differ in KV heads"
        self.places = list(places) or [Place(range(self.layers), range(self.kv_heads))]
        self.rank, self.own = rank, self.places[rank]
        self.page_bytes = [spec.page_bytes(page_size, scores) for spec in specs]
        self.group_of = np.zeros(self.layers, dtype=np.int64)
        for index, spec in enumerate(specs):
            self.group_of[list(spec.layers)] = index
        self.heads_by_layer = self.by_layer(np.ones((self.layers, self.kv_heads), dtype=np.int64))
        counts = []
        for heads in self.by_group(self.heads_by_layer).reshape(-1, len(specs)).tolist():
            least = sum(map(operator.mul, heads, self.page_bytes))
            assert budget >= least, "the budget is below one page per head"
            for count, size in zip(heads, self.page_bytes, strict=True):
                counts.append(max(count, int(budget * (size * count / least)) // size))
        self.page_counts = np.array(counts)
        self.layer_page_bytes = np.array([self.page_bytes[group] for group in self.group_of])
        uncoded = np.array([spec.uncoded.page_bytes(page_size, scores) for spec in specs])
        self.uncoded_page_bytes = uncoded[self.group_of]

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

    @property
    def whole_blocks(self) -> int:
        """Blocks of ``page_size`` tokens there is room for where every head of every layer keeps
        all of them."""
        heads = self.by_group(self.heads_by_layer)
        return int((self.page_counts // np.maximum(heads, 1))[heads > 0].min())

    def pages_for(self, entries: Any) -> Any:
        """Pages of so many entries (a number or an array)."""
        return -(-entries // self.page_size)

    def by_layer(self, pages: np.ndarray) -> np.ndarray:
        """Pages of every KV head, ``[layers, kv_heads]``, added up by rank and layer: ``[ranks,
        layers]``, 0 where a rank does not hold the layer."""
        found = np.zeros((len(self.places), self.layers), dtype=np.int64)
        for row, (layers, heads) in zip(found, self.places, strict=True):
            part = slice(layers.start, layers.stop)
            row[part] = pages[part, heads.start : heads.stop].sum(1)
        return found

    def by_group(self, pages: np.ndarray) -> np.ndarray:
        """Pages ``[ranks, layers]`` added up by group, as in ``page_counts``."""
        found = [np.bincount(self.group_of, row, len(self.page_bytes)) for row in pages]
        return np.concatenate(found).astype(np.int64)

    def bytes_of(self, pages: np.ndarray) -> int:
        """Bytes of so many pages of every group, on the rank that has most."""
        return int((pages.reshape(-1, len(self.page_bytes)) * self.page_bytes).sum(1).max())
