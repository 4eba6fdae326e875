"""How a byte budget is divided into pages: sizes and counts, without any storage."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyramidinfer.cache.group import GroupSpec

__all__ = ["Layout", "Place"]


class Place(NamedTuple):
    """The layers and KV heads that one rank holds."""

    layers: range
    heads: range


class Layout:
    """Pages for every KV head of every layer, from one byte budget per rank.

    All layers have the same number of KV heads.  specs : groups of layers whose entries have the
    same size;
    scores : whether each entry has a running score;  places : what each rank holds (a single
    rank holds everything); ``own`` is the place of ``rank``.  ``AssertionError`` if the budget is
    less than one page per head (``least_bytes``).

    group_of, layer_page_bytes : ``[layers]``;  page_bytes : of every group;  uncoded_page_bytes :
    ``[layers]``, of pages whose entries have 16 bits per number (without a codec: their own dtype);
    page_counts : of every group of the first rank, then of the next rank.  All ranks compute the
    same counts, so that they admit the same requests.
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
        """A layout with one page per head, to compute costs with."""
        return cls(specs, cls.least_bytes(specs, page_size, scores), page_size, scores=scores)

    @staticmethod
    def least_bytes(specs: list[GroupSpec], page_size: int, scores: bool = False) -> int:
        """Bytes of one page per head of every layer."""
        return sum(
            spec.page_bytes(page_size, scores) * len(spec.layers) * spec.kv_heads for spec in specs
        )

    @property
    def whole_blocks(self) -> int:
        """Blocks of ``page_size`` tokens that fit if every head of every layer keeps all of
        them."""
        heads = self.by_group(self.heads_by_layer)
        return int((self.page_counts // np.maximum(heads, 1))[heads > 0].min())

    def pages_for(self, entries: Any) -> Any:
        """Pages for a number of entries (an integer or an array)."""
        return -(-entries // self.page_size)

    def by_layer(self, pages: np.ndarray) -> np.ndarray:
        """Pages of every KV head, ``[layers, kv_heads]``, summed per rank and layer: ``[ranks,
        layers]``, 0 if a rank does not hold the layer."""
        found = np.zeros((len(self.places), self.layers), dtype=np.int64)
        for row, (layers, heads) in zip(found, self.places, strict=True):
            part = slice(layers.start, layers.stop)
            row[part] = pages[part, heads.start : heads.stop].sum(1)
        return found

    def by_group(self, pages: np.ndarray) -> np.ndarray:
        """Pages ``[ranks, layers]`` summed per group, as in ``page_counts``."""
        found = [np.bincount(self.group_of, row, len(self.page_bytes)) for row in pages]
        return np.concatenate(found).astype(np.int64)

    def bytes_of(self, pages: np.ndarray) -> int:
        """Bytes of these page counts per group, on the rank that has the most."""
        return int((pages.reshape(-1, len(self.page_bytes)) * self.page_bytes).sum(1).max())
