"""Running scores: what a decode step adds to those of its requests."""

from __future__ import annotations

import ctypes
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.table import Table
from pyramidinfer.native.library import Adding, pointer

__all__ = ["Weights"]


class Weights:
    """The weights that a step's queries gave, by layer ``[rows, kv_heads, longest]``."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.by_layer: dict[int, Tensor] = {}

    def add(self, table: Table, row: int) -> None:
        """Add a row to the running scores of its request: in the kernels all layers at once, else
        with ``Pool.add_scores``, which says what comes of it."""
        pool, places = self.pool, self._places
        if places is None:
            for layer, rows in self.by_layer.items():
                pool.add_scores(table, layer, rows[row])
            return
        kernels, pages, kept = pool.kernels, table.pages, table.kept
        assert kernels is not None
        written = np.zeros_like(kept)
        written[places[:, 0]] = kept[places[:, 0]]
        pool.own_fronts(table, written)
        call = Adding(
            places.ctypes.data,
            pages.ctypes.data,
            kept.ctypes.data + pool.own_heads.start * kept.itemsize,
            len(places),
            row,
            pool.kv_heads,
            pages.shape[2],
            kept.shape[1],
            pool.page_size,
        )
        kernels.add_scores(ctypes.byref(call))

    @cached_property
    def _places(self) -> np.ndarray | None:
        """What the kernels know of every layer: its number, where its running scores and where its
        weights are, and ``longest``; None where they cannot add them."""
        if self.pool.kernels is None:
            return None
        found = []
        for layer, rows in self.by_layer.items():
            scores = self.pool.group(layer).scores
            if scores is None or rows.dtype != torch.float32:
                return None
            found.append((layer, pointer(scores), pointer(rows), rows.shape[2]))
        return np.array(found, dtype=np.int64)
