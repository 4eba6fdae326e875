"""The paged pool: allocated once, shared by all layers of all requests.

A page holds entries of one KV head of one layer, so every head has its own length.  Layout of
one group (layers whose entries have the same size)::

    keys      [pages, page_size, key_dim]
    values    [pages, page_size, value_dim]
    positions [pages, page_size]   original position of the entry in each slot
    scores    [pages, page_size]   running score, if a policy needs one

With a codec (``codec.py``) keys and values are codes with scales::

    key_scales, value_scales [pages, page_size, groups]

Attention only reads these tensors; only this module writes, moves and frees entries.  A page's
count is the number of tables that own it; a page with several owners is copied before it is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.cache.layout import Layout
from pyramidinfer.cache.mover import Mover, Slots, Stays, put, upload
from pyramidinfer.cache.table import Ring, Table
from pyramidinfer.native.library import DTYPES, Kernels
from pyramidinfer.types import Best, Keep, Needs

__all__ = ["Pool", "Slots", "copy_ring"]


class Pool:
    """The storage of a ``Layout`` on one rank, and the owners of its pages.

    kv_heads : the KV heads that this rank holds, in the layers ``own_layers``.  Lengths
    (``Table.kept``) cover the heads of all ranks; reads and writes cover this rank's only.

    mover : writes, moves and reads entries;  poison : freed entries become NaN, so that tests
    notice when they are read.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device | str = "cpu",
        *,
        mover: Mover | None = None,
        poison: bool = False,
    ) -> None:
        self.layout, self.device, self.mover = layout, torch.device(device), mover or Mover()
        self.page_size, self.budget = layout.page_size, layout.budget
        layers, heads = layout.own
        self.layers, self.kv_heads = layout.layers, len(heads)
        self.own_layers, self.own_heads = layers, slice(heads.start, heads.stop)
        self.group_of, self.pages_for = layout.group_of, layout.pages_for
        self._is_own = np.isin(np.arange(self.layers), layers)
        counts = layout.page_counts.reshape(len(layout.places), -1)[layout.rank]
        self.groups = [
            Group(spec, int(pages), self.page_size, self.device, layout.scores, poison)
            for spec, pages in zip(layout.specs, counts, strict=True)
        ]
        self.tables: set[Table] = set()
        self.peak_bytes = 0  # peak bytes of all tables together, when last noted
        self._overhead = 0  # bytes outside pages of all tables, when last noted

    @property
    def on_gpu(self) -> bool:
        """Whether its memory is on a GPU."""
        return self.device.type == "cuda"

    # --- lifetime -----------------------------------------------------------------------------

    def new_table(self, entries: int = 0) -> Table:
        """An empty table with room for ``entries`` per head before its page lists grow."""
        capacity = int(self.pages_for(max(entries, 1)))
        table = Table.empty(self.layers, self.layout.kv_heads, self.kv_heads, capacity)
        self.tables.add(table)
        return table

    def release(self, table: Table) -> None:
        """Free everything that a table owns; the table cannot be used afterwards."""
        if table.arriving is not None:
            table.arriving.synchronize()
        for layer in self.own_layers:
            self.shrink(table, layer, 0)
        table.kept[:] = 0
        table.ring, table.state, table.away = None, {}, None
        self._overhead -= table.noted_bytes
        table.noted_bytes = 0
        self.tables.remove(table)

    def fork(self, table: Table, seen_len: int | None = None) -> Table:
        """A second table on the same pages; the first write to a shared page copies it.

        seen_len : share only this many first tokens, none of which was dropped; without a ring.
        """
        twin = Table(table.pages.copy(), table.held.copy(), table.kept.copy(), table.seen_len)
        twin.state = {name: value.clone() for name, value in table.state.items()}
        twin.arriving, twin.away = table.arriving, table.away
        if seen_len is None:
            twin.ring, twin.peak_bytes = copy_ring(table.ring, self.device), table.peak_bytes
        else:
            assert table.away is None
            twin.kept[:], twin.seen_len = seen_len, seen_len
            twin.held = np.minimum(twin.held, self.pages_for(self.lens(twin)))
        for layer in self.own_layers:
            self.group(layer).counts[self.owned(twin, layer)] += 1
        self.tables.add(twin)
        return twin

    # --- writing ------------------------------------------------------------------------------

    def append(self, table: Table, layer: int, count: int) -> Slots:
        """Claim ``count`` new entries in each head of a layer (the caller writes them next)."""
        first = self.lens(table)[layer].copy()
        self.claim(table, layer, first, first + count)
        entry = first[:, None] + np.arange(count)
        pages = np.take_along_axis(table.pages[layer], entry // self.page_size, 1)
        table.kept[layer] += count
        return Slots(self._upload(pages.T), self._upload((entry % self.page_size).T))

    def append_each(
        self, tables: list[Table], counts: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Claim new entries in every head of each table, as many as ``counts`` says (one by
        default).  Returns pages and offsets ``[layers, n, kv_heads]``, both int64 (0 in layers of
        other ranks), one table after another."""
        if max(counts, default=1) == 1:
            return self._append_one(tables)
        order, parts = [], []
        for number in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if count > number]
            parts.append(self._append_one([tables[row] for row in rows]))
            order += [(row, number) for row in rows]
        sort = sorted(range(len(order)), key=order.__getitem__)
        pages, offsets = (
            np.concatenate(part, axis=1)[:, sort] for part in zip(*parts, strict=True)
        )
        return pages, offsets

    def _append_one(self, tables: list[Table]) -> tuple[np.ndarray, np.ndarray]:
        """Claim one new entry in every head of each table."""
        kept = np.stack(list(map(self.lens, tables)), axis=1)  # [layers, n, heads]
        kept[~self._is_own] = 0
        held = np.stack([table.held for table in tables], axis=1)
        full = (kept == held * self.page_size) & self._is_own[:, None, None]
        for row in full.any((0, 2)).nonzero()[0].tolist():
            self._claim_next(tables[row], full[:, row])
        index = kept // self.page_size
        every = np.ogrid[: self.layers, : self.kv_heads]
        pages = np.stack([t.pages[*every, index[:, row]] for row, t in enumerate(tables)], axis=1)
        for number, group in enumerate(self.groups):
            mine = np.nonzero((self.group_of == number) & self._is_own)[0]
            shared = group.counts[pages[mine]] > 1
            for at, row, head in zip(*np.nonzero(shared), strict=True):
                layer = mine[at]
                self._own(tables[row], layer, head, [int(index[layer, row, head])])
                pages[layer, row, head] = tables[row].pages[layer, head, index[layer, row, head]]
        for table in tables:
            table.kept += 1
        return pages.astype(np.int64), kept % self.page_size

    def _claim_next(self, table: Table, full: np.ndarray) -> None:
        """Allocate a page for the next entry of heads whose pages are ``full``, ``[layers,
        own]``."""
        if int(table.held[full].max()) == table.pages.shape[2]:
            table.grow(table.pages.shape[2] + 1)
        for number, group in enumerate(self.groups):
            layers, heads = np.nonzero(full & (self.group_of == number)[:, None])
            table.pages[layers, heads, table.held[layers, heads]] = group.take(len(layers))
            table.held[layers, heads] += 1

    def write(
        self, layer: int, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
    ) -> None:
        """Store ``keys`` ``[n, kv_heads, key_dim]``, ``values`` and ``positions`` ``[n]``."""
        self.mover.write(self.group(layer), slots, keys, values, positions)

    def add_scores(self, table: Table, layer: int, amounts: Tensor) -> None:
        """Add ``amounts`` ``[kv_heads, longest]`` to the entries' running scores."""
        group, kept = self.group(layer), self.lens(table)[layer]
        if group.scores is None:
            raise AssertionError("this pool keeps no scores")
        self.own_front(table, layer, kept)
        head, entry = np.nonzero(np.arange(int(kept.max())) < kept[:, None])
        pages = self._upload(table.pages[layer, head, entry // self.page_size])
        slots = (pages, self._upload(entry % self.page_size))
        group.scores[slots] += amounts[self._upload(head), self._upload(entry)].float()

    def keep(self, table: Table, layer: int, keep: Keep) -> None:
        """Drop all entries of a layer except those in ``keep``; free empty pages.

        Counts cover all heads.  Indices cover all heads, this rank's heads, or are one row for
        all heads.
        """
        indices = keep.indices
        if indices is None:
            return
        kept = np.full(self.layout.kv_heads, indices.shape[1])
        if keep.counts is not None:
            kept = keep.counts.cpu().numpy()
        group, lengths, mine = self.group(layer), self.lens(table)[layer], kept[self.own_heads]
        if len(indices) == len(kept):
            indices = indices[self.own_heads]
        if (mine < lengths).any():
            self.own_front(table, layer, mine)
            self.mover.keep(group, [Stays(table.pages[layer], indices, mine, lengths)])
        self.shrink(table, layer, kept)

    @property
    def kernels(self) -> Kernels | None:
        """C++ kernels that select entries and carry out whole evictions, or None."""
        return self.mover.kernels

    def evicts_best(self, needs: Needs, dtype: torch.dtype) -> bool:
        """Whether ``evict_best`` can carry this eviction out."""
        rule, reduce = needs.retain, needs.reduce
        alone = self.kv_heads == self.layout.kv_heads  # other ranks' counts are unknown
        if self.kernels is None or dtype not in DTYPES or not isinstance(rule, Best) or not alone:
            return False
        flat = (reduce.heads, reduce.rows) in (("kv_max", "max"), ("kv_mean", "mean"))
        known = rule.by in ("new", "running") or (
            rule.by == "window" and flat and reduce.newest_weight == 1
        )
        return known and rule.safeguard is None

    def rewrite_keys(self, table: Table, layer: int, places: Tensor, keys: Tensor) -> None:
        """Replace the keys ``[kv_heads, n, key_dim]`` of entries at ``places`` ``[n]``."""
        group, entry = self.group(layer), self._entries_at(table, layer, places).cpu().numpy()
        touched = np.unique(entry // self.page_size).tolist()
        for head in range(self.kv_heads):
            self._own(table, layer, head, touched)
        pages = self._upload(table.pages[layer][:, entry // self.page_size])
        at = pages, self._upload(entry % self.page_size)
        put(group, group.keys, group.key_scales, at, keys)

    def keys_at(self, table: Table, layer: int, places: Tensor) -> Tensor:
        """A copy of the keys of entries at ``places``, ``[kv_heads, n, key_dim]``."""
        return self.keys(table, layer)[:, self._entries_at(table, layer, places)]

    def truncate(
        self, table: Table, seen_len: int, join: Callable[[Tensor], Tensor] = lambda own: own
    ) -> None:
        """Remove all tokens from position ``seen_len`` on (a rejected draft, a changed turn).

        join : gathers numbers of this rank's heads into those of all ranks' heads.
        """
        if not 0 <= seen_len <= table.seen_len:
            raise ValueError(f"seen_len={seen_len} is outside 0..{table.seen_len}")
        for layer in self.own_layers:
            positions = self.positions(table, layer)
            stays = (positions >= 0) & (positions < seen_len)
            order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
            self.keep(table, layer, Keep(order, join(stays.sum(1))))
        table.seen_len = seen_len
        if table.ring is not None:
            table.ring.truncate(seen_len)

    def retract(self, table: Table, kept: np.ndarray) -> None:
        """``shrink`` of all layers to ``kept`` ``[layers, kv_heads]`` at once: undo appends, or end
        an eviction."""
        wanted = self.pages_for(kept[:, self.own_heads])
        wanted[~self._is_own] = 0
        slots = np.arange(table.pages.shape[2])
        if (wanted < table.held).any():
            gone = (slots >= wanted[..., None]) & (slots < table.held[..., None])
            for number, group in enumerate(self.groups):
                mine = self.group_of == number
                group.drop(table.pages[mine][gone[mine]])
        table.held[:], table.kept[:] = np.minimum(wanted, table.held), kept
        for layer in self.own_layers:
            if self.group(layer).poison:
                self._poison(table, layer)

    def forget(self, table: Table, kept: np.ndarray, seen_len: int) -> None:
        """Undo the last append, whose tokens were counted; nothing else may have happened since."""
        table.seen_len = seen_len
        self.retract(table, kept)

    def note_peak(self, table: Table) -> None:
        """Record the bytes that a table, and all tables together, hold now."""
        self.note_overhead(table)
        table.peak_bytes = max(table.peak_bytes, self.bytes(table) + table.noted_bytes)
        self.peak_bytes = max(self.peak_bytes, self.budget_used + self._overhead)

    def note_overhead(self, table: Table) -> None:
        """Record the bytes that a table holds outside its pages (they may have shrunk)."""
        extra = table.extra_bytes
        self._overhead += extra - table.noted_bytes
        table.noted_bytes = extra

    # --- reading ------------------------------------------------------------------------------

    def group(self, layer: int) -> Group:
        return self.groups[int(self.group_of[layer])]

    def lens(self, table: Table) -> np.ndarray:
        """Entries of every head that this rank holds, ``[layers, own]``."""
        return table.kept[:, self.own_heads]

    def runs(self, table: Table, layer: int) -> Iterator[slice]:
        """A layer's heads in runs of neighbours of equal length."""
        kept, first = self.lens(table)[layer], 0
        for head in range(1, self.kv_heads + 1):
            if head == self.kv_heads or kept[head] != kept[first]:
                yield slice(first, head)
                first = head

    def keys(self, table: Table, layer: int, heads: slice = slice(None)) -> Tensor:
        """A copy of the keys of heads of equal length, ``[heads, kept, key_dim]``."""
        group = self.group(layer)
        return self._flat(table, layer, group.keys, heads, group.key_scales)

    def values(self, table: Table, layer: int, heads: slice = slice(None)) -> Tensor:
        """A copy of the values of heads of equal length, ``[heads, kept, value_dim]``."""
        group = self.group(layer)
        return self._flat(table, layer, group.values, heads, group.value_scales)

    def positions(self, table: Table, layer: int) -> Tensor:
        """Original positions of a layer's entries, ``[kv_heads, longest]``, slot by slot.

        Past the end of a shorter head: distinct negative numbers.
        """
        longest = int(self.lens(table)[layer].max())
        beyond = -1 - torch.arange(longest, dtype=torch.int32, device=self.device)
        return self._padded(table, layer, self.group(layer).positions, beyond).long()

    def scores(self, table: Table, layer: int) -> Tensor:
        """Running scores of a layer's entries, ``[kv_heads, longest]``, 0 past a head's end."""
        scores = self.group(layer).scores
        if scores is None:
            raise AssertionError("this pool keeps no scores")
        return self._padded(table, layer, scores, torch.zeros((), device=self.device))

    def bytes(self, table: Table) -> int:
        """Bytes of the pages that a table owns, on all ranks together."""
        return int((self.pages_for(table.kept).sum(1) * self.layout.layer_page_bytes).sum())

    @property
    def budget_used(self) -> int:
        """Bytes of all pages that have an owner."""
        sizes = zip(self.groups, self.layout.page_bytes, strict=True)
        return sum((len(group.counts) - len(group.free)) * size for group, size in sizes)

    def slots_of(self, table: Table, layer: int) -> tuple[Tensor, Tensor]:
        """Page and offset of every entry of a layer, one head after another."""
        kept = self.lens(table)[layer]
        head, entry = np.nonzero(np.arange(int(kept.max())) < kept[:, None])
        pages = table.pages[layer, head, entry // self.page_size]
        return self._upload(pages), self._upload(entry % self.page_size)

    # --- integrity ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that every page is either free or has as many owners as its count says."""
        for table in self.tables:
            layers = list(self.own_layers)
            wanted = self.pages_for(self.lens(table))
            assert (table.held[layers] == wanted[layers]).all(), "lengths"
        for number, group in enumerate(self.groups):
            owners = np.zeros_like(group.counts)
            for table in self.tables:
                for layer in np.nonzero(self.group_of == number)[0].tolist():
                    np.add.at(owners, self.owned(table, layer), 1)
            assert (owners == group.counts).all(), "a page's count differs from its owners"
            free = np.zeros(len(owners), dtype=bool)
            free[group.free] = True
            assert len(group.free) == int(free.sum()), "a page is free twice"
            assert (free == (owners == 0)).all(), "a page is lost, or free while owned"

    # --- inside -------------------------------------------------------------------------------

    def owned(self, table: Table, layer: int) -> np.ndarray:
        """The pages that a table owns in a layer, of all heads."""
        pages = table.pages[layer]
        owned: np.ndarray = pages[np.arange(pages.shape[1]) < table.held[layer][:, None]]
        return owned

    def _entries_at(self, table: Table, layer: int, places: Tensor) -> Tensor:
        """Entry numbers of ``places`` ``[n]`` in a layer whose heads all hold the same tokens."""
        held, order = self.positions(table, layer)[0].sort()
        at = torch.searchsorted(held, places.to(self.device))
        assert bool((held[at.clamp(max=len(held) - 1)] == places.to(self.device)).all()), "not held"
        return order[at]

    def _flat(
        self,
        table: Table,
        layer: int,
        storage: Tensor,
        heads: slice,
        scales: Tensor | None = None,
    ) -> Tensor:
        """``[heads, kept, ...]`` of one tensor of a group, of heads of equal length."""
        lengths = self.lens(table)[layer, heads]
        kept = int(lengths[0])
        assert (lengths == kept).all(), "heads differ in length: read them in runs"
        pages = table.pages[layer, heads]
        if scales is not None:
            return self.mover.decode(self.group(layer), storage, scales, pages, kept)
        return self.mover.gather(storage, pages, kept)

    def _padded(self, table: Table, layer: int, storage: Tensor, beyond: Tensor) -> Tensor:
        """``[kv_heads, longest]`` of one tensor of a group, ``beyond`` past the end of shorter
        heads."""
        runs = list(self.runs(table, layer))
        if len(runs) == 1:
            return self._flat(table, layer, storage, runs[0])
        out = beyond.expand(self.kv_heads, int(self.lens(table)[layer].max())).clone()
        for heads in runs:
            found = self._flat(table, layer, storage, heads)
            out[heads, : found.shape[1]] = found
        return out

    def claim(self, table: Table, layer: int, first: np.ndarray, end: np.ndarray) -> None:
        """Make the table the only owner of the pages of every head's entries ``first..end``."""
        held, wanted = table.held[layer], self.pages_for(end)
        if wanted.max() > table.pages.shape[2]:
            table.grow(int(wanted.max()))
        for head in np.nonzero((first % self.page_size > 0) & (held > 0))[0].tolist():
            self._own(table, layer, head, [int(first[head]) // self.page_size])
        new = np.maximum(wanted - held, 0)
        taken = np.array(self.group(layer).take(int(new.sum())), dtype=np.int32)
        for row, at, pages in zip(
            table.pages[layer], held.tolist(), np.split(taken, np.cumsum(new)[:-1]), strict=True
        ):
            row[at : at + len(pages)] = pages
        table.held[layer] = held + new

    def own_front(self, table: Table, layer: int, entries: np.ndarray) -> None:
        """Copy those of every head's first pages that are shared, because their entries (this many
        per head) will be overwritten."""
        most = self.pages_for(entries)
        if (self.group(layer).counts[table.pages[layer, :, : most.max()]] > 1).any():
            for head, count in enumerate(most.tolist()):
                self._own(table, layer, head, list(range(count)))

    def own_fronts(self, table: Table, entries: np.ndarray) -> None:
        """``own_front`` for all layers, ``entries`` ``[layers, kv_heads]``."""
        width = int(self.pages_for(entries).max())
        for number, group in enumerate(self.groups):
            mine = np.nonzero((self.group_of == number) & self._is_own)[0]
            shared = (group.counts[table.pages[mine, :, :width]] > 1).any((1, 2))
            for layer in mine[shared].tolist():
                self.own_front(table, layer, entries[layer])

    def _own(self, table: Table, layer: int, head: int, indices: list[int]) -> None:
        """Copy those of a head's pages that are shared."""
        group, row = self.group(layer), table.pages[layer, head]
        for index in indices:
            page = int(row[index])
            if group.counts[page] > 1:
                (copy,) = group.take(1)
                for tensor in group.tensors():
                    tensor[copy] = tensor[page]
                group.counts[page] -= 1
                row[index] = copy

    def shrink(self, table: Table, layer: int, kept: np.ndarray | int) -> None:
        """Free the pages beyond the first ``kept`` entries of every head of a layer."""
        kept = np.broadcast_to(kept, self.layout.kv_heads)
        group, wanted = self.group(layer), self.pages_for(kept[self.own_heads])
        held, slots = table.held[layer], np.arange(table.pages.shape[2])
        if (wanted < held).any():
            gone = (slots >= wanted[:, None]) & (slots < held[:, None])
            group.drop(table.pages[layer][gone])
        table.held[layer], table.kept[layer] = wanted, kept
        if group.poison:
            self._poison(table, layer)

    def _poison(self, table: Table, layer: int) -> None:
        """Poison the slots after the last entry of every head."""
        group = self.group(layer)
        for head, kept in enumerate(self.lens(table)[layer].tolist()):
            if kept % self.page_size:
                page = int(table.pages[layer, head, kept // self.page_size])
                if group.counts[page] == 1:
                    group.spoil(page, slice(kept % self.page_size, None))

    def _upload(self, array: np.ndarray) -> Tensor:
        return upload(array, self.device)


def copy_ring(ring: Ring | None, device: torch.device) -> Ring | None:
    """A ring with its own tensors on a device."""
    if ring is None:
        return None
    return Ring(
        ring.queries.to(device, copy=True),
        ring.lse.to(device, copy=True),
        ring.positions.to(device, copy=True),
        ring.written,
        ring.oldest,
    )
