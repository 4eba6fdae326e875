"""A request's cache on its way between the pool and host memory.

On a GPU entries go through a stream of their own into pinned memory and back, so that the device
computes meanwhile.  Pages must stay owned until a copy out of them is over, and what came back must
not be read before its copy is over: ``Exported.copying`` and ``Table.arriving`` tell.  On a CPU a
copy is over when the call returns.
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

#: Where tensors begin in pinned memory, in bytes.
ALIGNED = 64


class Exported(NamedTuple):
    """A request's cache in host memory.

    kept : entries, ``[layers, kv_heads]``;  entries : a layer's keys, values, positions and, where
    there are any, scores, its heads one after the other: ``[entries of all heads, ...]``;
    on_device : names of the state that was on the pool's device;  copying : None once all of it is
    here.
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
        """Whether the copy is over."""
        return self.copying is None or self.copying.query()

    def wait(self) -> None:
        """Until the copy is over."""
        if self.copying is not None:
            self.copying.synchronize()


class Copier:
    """Moves caches out of a pool and back into it."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.device = pool, pool.device
        self._stream: Any = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def host_bytes(self, size: int) -> int:
        """Bytes of host memory that a cache of so many bytes takes: pinned memory comes in powers
        of two."""
        if self._stream is None:
            return size
        tensors = 4 * self.pool.layers + 64
        return int(1 << (size + ALIGNED * tensors - 1).bit_length())

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
        """Bring an exported cache back as a new table; ``arriving`` until the copy is over."""
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
        """What is asked of the device in this is done beside what is asked of it afterwards."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def _mark(self) -> Copying | None:
        """The moment when all that was asked for aside is done."""
        if self._stream is None:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        found: Copying = event
        return found

    def _to_host(self, table: Table, taken: list[Iterator[Tensor]]) -> list[list[Tensor]]:
        """Entries in host memory, in one block of pinned memory where they come from a GPU."""
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
    """A layer's keys, values, positions and scores, one after the other, copied."""
    slots = pool.slots_of(table, layer)
    for storage in pool.group(layer).tensors():
        yield storage[slots]
