"""Caches that are partly in host memory: the pool has what drafts read, and all newer entries.

A lossless request reads the whole cache only to verify drafts.  So the pages of its prompt that its
drafts skip can be in host memory, and a step that verifies copies them into spare pages of the
pool, one layer after another (``Staging``).  A page is full when it leaves the pool and never
changes afterwards, so it is copied to host memory once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.away import Away
from pyramidinfer.cache.group import Group
from pyramidinfer.cache.mover import upload
from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.table import Table

__all__ = ["Staging", "send_away"]


def send_away(pool: Pool, table: Table, layer: int, stays: np.ndarray) -> None:
    """Move the first pages of a layer to host memory, except those in ``stays``, bool
    ``[kv_heads, pages]``.  All of them are full."""
    group, pages, count = pool.group(layer), table.pages[layer], stays.shape[1]
    gone, away = pages[:, :count][~stays], table.away
    assert away is not None
    if not len(gone):
        return
    at = upload(gone, pool.device)
    away.blocks[layer] = [_on_host(storage[at]) for storage in group.tensors()]
    away.here[layer] = stays
    for head, row in enumerate(pages):
        held = int(table.held[layer, head])
        left = np.concatenate([row[:count][stays[head]], row[count:held]])
        row[: len(left)] = left
    lost = (~stays).sum(1)
    table.held[layer] -= lost
    table.kept[layer] -= lost * away.page_size
    group.drop(gone)


class Staging:
    """Spare pages of the pool for one layer of the caches that are partly in host memory.

    A context for one step: the pages are taken at its beginning, and freed at its end.
    """

    def __init__(self, pool: Pool, tables: Iterable[Table]) -> None:
        self.pool = pool
        self._caches = {each.away: each for each in tables if each.away is not None}
        self._spare: dict[Away, list[np.ndarray]] = {}

    def __enter__(self) -> Staging:
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _take(self) -> None:
        for away in self._caches:
            self._spare[away] = []
            for number, group in enumerate(self.pool.groups):
                sizes = [
                    int((~here).sum())
                    for layer, here in away.here.items()
                    if self.pool.group_of[layer] == number
                ]
                taken = np.array(group.take(max(sizes, default=0)), dtype=np.int32)
                self._spare[away].append(taken)
        for table in self._caches.values():
            self.pool.note_peak(table)

    def __exit__(self, *_: Any) -> None:
        for spare in self._spare.values():
            for group, pages in zip(self.pool.groups, spare, strict=False):
                group.drop(pages)
        self._spare.clear()

    def __bool__(self) -> bool:
        return bool(self._caches)

    def width(self, tables: Iterable[Table]) -> int:
        """The largest number of pages per head that a step over these whole caches reads."""
        most = [each.entries.max() for each in tables if each.away is not None]
        return int(self.pool.pages_for(max(most, default=0)))

    def load(self, layer: int) -> None:
        """Copy the layer's pages from host memory into the spare pages, before it runs."""
        group: Group = self.pool.group(layer)
        for away in self._caches:
            if (block := away.blocks.get(layer)) is None:
                continue
            at = upload(self._pages(away, layer), self.pool.device).long()
            for storage, given in zip(group.tensors(), block, strict=True):
                storage[at] = given.to(self.pool.device, non_blocking=True)

    def read(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Pages ``[layers, kv_heads, n]`` of the whole cache in its order, and the number of
        entries in them ``[layers, kv_heads]``; those of a layer are valid after ``load``."""
        away, entries = table.away, table.entries
        assert away is not None
        wide = int(self.pool.pages_for(entries.max()))
        pages = np.zeros((*table.held.shape, wide), dtype=np.int32)
        own = table.pages[..., :wide]
        pages[..., : own.shape[2]] = own
        for layer, here in away.here.items():
            count, row = here.shape[1], pages[layer]
            row[:, :count][~here] = self._pages(away, layer)
            for head, stays in enumerate(here):
                picked, held = int(stays.sum()), int(table.held[layer, head])
                row[head, :count][stays] = table.pages[layer, head, :picked]
                row[head, count : count + held - picked] = table.pages[layer, head, picked:held]
        return pages, entries

    def _pages(self, away: Away, layer: int) -> np.ndarray:
        """The spare pages that a layer's pages from host memory are copied to."""
        count = int((~away.here[layer]).sum())
        return self._spare[away][int(self.pool.group_of[layer])][:count]


def _on_host(pages: Tensor) -> Tensor:
    if pages.device.type == "cpu":
        return pages
    host = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)
    return host.copy_(pages)
