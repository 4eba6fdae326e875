"""Running scores: a decode step adds its attention weights to them."""

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
    """The attention weights of a step's queries, per layer ``[rows, kv_heads, longest]``."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.by_layer: dict[int, Tensor] = {}

    def add(self, table: Table, row: int) -> None:
        """Add a row to the running scores of its request: all layers at once in the kernels,
        else with ``Pool.add_scores``, which defines the result."""
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
        """What the kernels get per layer: its number, the addresses of its running scores and of
        its weights, and ``longest``; None if the kernels cannot add them."""
        if self.pool.kernels is None:
            return None
        found = []
        for layer, rows in self.by_layer.items():
            scores = self.pool.group(layer).scores
            if scores is None or rows.dtype != torch.float32:
                return None
            found.append((layer, pointer(scores), pointer(rows), rows.shape[2]))
        return np.array(found, dtype=np.int64)
