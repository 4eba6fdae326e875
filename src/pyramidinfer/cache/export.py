"""Copies of a request's cache between the pool and host memory.

On a GPU, entries are copied to pinned memory and back on a separate stream, so that the device
computes meanwhile.  Pages must stay owned until a copy out of them has finished, and restored
entries must not be read before their copy has finished: ``Exported.copying`` and ``Table.arriving``
tell when.  On a CPU, a copy has finished when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.pool import Pool, copy_ring
from pyramidinfer.cache.table import Copying, Ring, Table
from pyramidinfer.types import State

__all__ = ["Copier", "Exported"]

#: Alignment of tensors in pinned memory, in bytes.
ALIGNED = 64


class Exported(NamedTuple):
    """A request's cache in host memory.

    kept : entries, ``[layers, kv_heads]``;  entries : a layer's keys, values, positions and, if
    it has any, scores, one head after another: ``[entries of all heads, ...]``;
    on_device : names of the state that was on the pool's device;  copying : None once the copy has
    finished.
    """

    kept: np.ndarray
    entries: list[list[Tensor]]
    seen_len: int
    state: State
    ring: Ring | None
    peak_bytes: int
    on_device: frozenset[str] = frozenset()
    copying: Copying | None = None

    @property
    def is_here(self) -> bool:
        """Whether the copy has finished."""
        return self.copying is None or self.copying.query()

    def wait(self) -> None:
        """Wait until the copy has finished."""
        if self.copying is not None:
            self.copying.synchronize()


class Copier:
    """Copies caches out of a pool and back into it."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.device = pool, pool.device
        self._stream: Any = None
        if pool.on_gpu:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def host_bytes(self, size: int) -> int:
        """Bytes of host memory for a cache of ``bytes``: pinned memory is allocated in powers
        of two."""
        if self._stream is None:
            return size
        tensors = 4 * self.pool.layers + 64
        return int(1 << (size + ALIGNED * tensors - 1).bit_length())

    def block_bytes(self, layer: int, pages: int) -> int:
        """Bytes of host memory for pages of a layer that leave the pool while the request runs: one
        block per tensor of the layer's group (``send_away``)."""
        sizes = [pages * each[0].nbytes for each in self.pool.group(layer).tensors()]
        if self._stream is None or not pages:
            return sum(sizes)
        return sum(1 << (size - 1).bit_length() for size in sizes)

    def export(self, table: Table) -> Exported:
        """Copy a request's cache to host memory; the table still owns its pages."""
        pool = self.pool
        with self._aside():
            taken = [_entries(pool, table, layer) for layer in pool.own_layers]
            entries = self._to_host(table, taken)
            copying = self._mark()
        on_device = frozenset(
            name for name, value in table.state.items() if value.device.type != "cpu"
        )
        state = {name: value.to("cpu", copy=True) for name, value in table.state.items()}
        ring = copy_ring(table.ring, torch.device("cpu"))
        return Exported(
            table.kept.copy(),
            entries,
            table.seen_len,
            state,
            ring,
            table.peak_bytes,
            on_device,
            copying,
        )

    def import_(self, exported: Exported) -> Table:
        """Copy an exported cache back into a new table; ``arriving`` until the copy has
        finished."""
        pool = self.pool
        exported.wait()
        table = pool.new_table(int(exported.kept.max()))
        try:
            with self._aside():
                for layer, entries in zip(pool.own_layers, exported.entries, strict=True):
                    kept = exported.kept[layer, pool.own_heads]
                    pool.claim(table, layer, np.zeros_like(kept), kept)
                    table.kept[layer] = exported.kept[layer]
                    slots = pool.slots_of(table, layer)
                    for storage, given in zip(pool.group(layer).tensors(), entries, strict=True):
                        storage[slots] = given.to(self.device, non_blocking=True)
                table.arriving = self._mark()
        except BaseException:
            pool.release(table)
            raise
        table.kept[:] = exported.kept
        table.seen_len = exported.seen_len
        table.state = {
            name: value.to(self.device) if name in exported.on_device else value.clone()
            for name, value in exported.state.items()
        }
        table.ring = copy_ring(exported.ring, self.device)
        table.peak_bytes = exported.peak_bytes
        return table

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work submitted in this context runs concurrently with work submitted after it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def _mark(self) -> Copying | None:
        """An event that is reached when all work on the separate stream is done."""
        if self._stream is None:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        found: Copying = event
        return found

    def _to_host(self, table: Table, taken: list[Iterator[Tensor]]) -> list[list[Tensor]]:
        """Entries in host memory, in one block of pinned memory if they come from a GPU."""
        if self._stream is None:
            return [list(layer) for layer in taken]
        pool, sizes = self.pool, 0
        found: list[list[Tensor]] = []
        for layer in pool.own_layers:
            count = int(pool.lens(table)[layer].sum())
            for storage in pool.group(layer).tensors():
                size = storage[0, 0].nbytes * count
                sizes += -(-size // ALIGNED) * ALIGNED
        block, at = torch.empty(sizes, dtype=torch.uint8, pin_memory=True), 0
        for given in taken:
            found.append([])
            for each in given:
                part = block[at : at + each.nbytes].view(each.dtype).view(each.shape)
                part.copy_(each, non_blocking=True)
                found[-1].append(part)
                at += -(-each.nbytes // ALIGNED) * ALIGNED
        return found


def _entries(pool: Pool, table: Table, layer: int) -> Iterator[Tensor]:
    """Copies of a layer's keys, values, positions and scores, in this order."""
    slots = pool.slots_of(table, layer)
    for storage in pool.group(layer).tensors():
        yield storage[slots]
