"""The paged pool: allocated once, shared by all layers of all requests.

Layout of one group (layers with the same KV heads and sizes)::

    keys      [pages, kv_heads, page_size, key_dim]
    values    [pages, kv_heads, page_size, value_dim]
    positions [pages, kv_heads, page_size]   original position of the entry in each slot
    scores    [pages, kv_heads, page_size]   running score, where a policy asked for one

Attention only reads these tensors; this module alone writes, moves and frees.  A page's count is
the number of tables that own it; a page owned twice is copied before it is written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.compact import move_entries, plan_moves
from pyramidinfer.cache.group import Group, GroupSpec
from pyramidinfer.cache.native import native_gather, native_keep, native_write
from pyramidinfer.cache.table import Ring, Table
from pyramidinfer.native.library import DTYPES, Kernels
from pyramidinfer.types import Needs, State

__all__ = ["Exported", "Pool", "Slots"]


class Slots(NamedTuple):
    """Where new entries go: ``pages`` and ``offsets``, each ``[n]`` (one group)."""

    pages: Tensor
    offsets: Tensor


class Exported(NamedTuple):
    """A request's cache in host memory: one tuple (keys, values, positions, scores) a layer."""

    entries: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]
    seen_len: int
    state: State
    ring: Ring | None
    peak_bytes: int


class Pool:
    """Pages for every layer of every request, out of one byte budget.

    The budget holds at least one page a layer (``least_bytes``).
    """

    def __init__(self, specs: list[GroupSpec], budget: int, page_size: int = 16,
                 device: torch.device | str = "cpu", *, scores: bool = False,
                 poison: bool = False, kernels: Kernels | None = None) -> None:  # fmt: skip
        self.page_size, self.budget, self.device = page_size, budget, torch.device(device)
        self.kernels = kernels  # C++ for what can be had faster than in torch
        self.layers = sum(len(spec.layers) for spec in specs)
        sizes = [spec.page_bytes(page_size, scores) for spec in specs]
        least = self.least_bytes(specs, page_size, scores)
        assert budget >= least, "the budget is below one page per layer"
        self.page_bytes = sizes
        self.groups: list[Group] = []
        self.group_of = np.zeros(self.layers, dtype=np.int64)
        for index, (spec, size) in enumerate(zip(specs, sizes, strict=True)):
            share = size * len(spec.layers) / least
            pages = max(len(spec.layers), int(budget * share) // size)
            self.groups.append(Group(spec, pages, page_size, self.device, scores, poison))
            self.group_of[list(spec.layers)] = index
        self.layer_page_bytes = np.array([sizes[group] for group in self.group_of])
        self.tables: set[Table] = set()
        self.peak_bytes = 0  # the most all tables ever held together, as last noted
        self._beside = 0  # bytes outside pages of all tables, as last noted

    @staticmethod
    def least_bytes(specs: list[GroupSpec], page_size: int, scores: bool = False) -> int:
        """Bytes of one page per layer."""
        return sum(spec.page_bytes(page_size, scores) * len(spec.layers) for spec in specs)

    # --- lifetime -----------------------------------------------------------------------------

    def new_table(self, entries: int = 0) -> Table:
        """An empty table with room for ``entries`` a layer before its page list grows."""
        table = Table.empty(self.layers, self.pages_for(max(entries, 1)))
        self.tables.add(table)
        return table

    def release(self, table: Table) -> None:
        """Give back everything a table owns; the table is dead afterwards."""
        for layer in range(self.layers):
            self.shrink(table, layer, 0)
        table.ring, table.state = None, {}
        self._beside -= table.noted_bytes
        table.noted_bytes = 0
        self.tables.remove(table)

    def fork(self, table: Table) -> Table:
        """A second table on the same pages; whoever writes first to a shared page copies it."""
        twin = Table(table.pages.copy(), table.held.copy(), table.kept.copy(), table.seen_len)
        twin.state = {name: value.clone() for name, value in table.state.items()}
        twin.ring, twin.peak_bytes = _copy_ring(table.ring, self.device), table.peak_bytes
        for layer in range(self.layers):
            self.group(layer).counts[self._owned(table, layer)] += 1
        self.tables.add(twin)
        return twin

    # --- writing ------------------------------------------------------------------------------

    def append(self, table: Table, layer: int, count: int) -> Slots:
        """Claim ``count`` new entries of one layer (the caller writes them next)."""
        first = int(table.kept[layer])
        self._reserve(table, layer, first, first + count)
        entry = np.arange(first, first + count)
        pages = table.pages[layer, entry // self.page_size]
        table.kept[layer] += count
        return Slots(self._upload(pages), self._upload(entry % self.page_size))

    def append_each(self, tables: list[Table]) -> tuple[Tensor, Tensor]:
        """Claim one new entry in every layer of each table: pages and offsets ``[layers, n]``."""
        kept = np.stack([table.kept for table in tables])
        held = np.stack([table.held for table in tables])
        for row, layer in zip(*np.nonzero(kept == held * self.page_size), strict=True):
            self._reserve(tables[row], layer, kept[row, layer], kept[row, layer] + 1)
        every = np.arange(self.layers)
        index = kept // self.page_size
        pages = np.stack([t.pages[every, at] for t, at in zip(tables, index, strict=True)])
        for number, group in enumerate(self.groups):
            mine = np.nonzero(self.group_of == number)[0]
            for row, column in zip(*np.nonzero(group.counts[pages[:, mine]] > 1), strict=True):
                layer = mine[column]
                self._own(tables[row], layer, [int(index[row, layer])])
                pages[row, layer] = tables[row].pages[layer, index[row, layer]]
        for table in tables:
            table.kept += 1
        return self._upload(pages.T), self._upload((kept % self.page_size).T)

    def write(self, layer: int, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
              ) -> None:  # fmt: skip
        """Store ``keys`` ``[n, kv_heads, key_dim]``, ``values`` and ``positions`` ``[n]``."""
        group = self.group(layer)
        pages, offsets = slots
        if self.kernels is not None and keys.dtype in DTYPES:
            native_write(self.kernels, group, slots, keys, values, positions)
            return
        group.keys[pages, :, offsets] = keys
        group.values[pages, :, offsets] = values
        group.positions[pages, :, offsets] = positions.to(torch.int32)[:, None]
        if group.scores is not None:
            group.scores[pages, :, offsets] = 0.0

    def add_scores(self, table: Table, layer: int, amounts: Tensor) -> None:
        """Add ``amounts`` ``[kv_heads, kept]`` to the entries' running scores."""
        group, entry = self.group(layer), np.arange(int(table.kept[layer]))
        if group.scores is None:
            raise AssertionError("this pool keeps no scores")
        self.own_front(table, layer, len(entry))
        pages = self._upload(table.pages[layer, entry // self.page_size])
        group.scores[pages, :, self._upload(entry % self.page_size)] += amounts.T.float()

    def keep(self, table: Table, layer: int, indices: Tensor) -> None:
        """Drop every entry of a layer but ``indices`` ``[1 or kv_heads, k]``; free empty pages."""
        group, length = self.group(layer), int(table.kept[layer])
        kept = indices.shape[1]
        if kept < length and self.kernels is not None:
            self.own_front(table, layer, kept)
            native_keep(self.kernels, group, [(table.pages[layer], indices, length)])
        elif kept < length:
            head, source, target = plan_moves(
                indices.expand(group.spec.kv_heads, -1).to(self.device), length
            )
            if len(target):
                self._own(table, layer, torch.unique(target // self.page_size).tolist())
                row = self._upload(table.pages[layer])
                move_entries(group.tensors(), row, head, source, target, self.page_size)
        self.shrink(table, layer, kept)

    def evicts_best(self, needs: Needs, dtype: torch.dtype) -> bool:
        """Whether ``evict_best`` can carry this eviction out."""
        flat = (needs.reduce.heads, needs.reduce.rows) in (("kv_max", "max"), ("kv_mean", "mean"))
        plain = flat and needs.reduce.newest_weight == 1
        return self.kernels is not None and dtype in DTYPES and plain

    def rewrite_keys(self, table: Table, layer: int, places: Tensor, keys: Tensor) -> None:
        """Replace the keys ``[kv_heads, n, key_dim]`` of entries at ``places`` ``[n]``."""
        group, entry = self.group(layer), self._entries_at(table, layer, places)
        self._own(table, layer, torch.unique(entry // self.page_size).tolist())
        pages = self._upload(table.pages[layer])[entry // self.page_size]
        group.keys[pages, :, entry % self.page_size] = keys.transpose(0, 1)

    def keys_at(self, table: Table, layer: int, places: Tensor) -> Tensor:
        """A copy of the keys of entries at ``places``, ``[kv_heads, n, key_dim]``."""
        return self.keys(table, layer)[:, self._entries_at(table, layer, places)]

    def truncate(self, table: Table, seen_len: int) -> None:
        """Forget every token from position ``seen_len`` on (a rejected draft, a changed turn)."""
        if not 0 <= seen_len <= table.seen_len:
            raise ValueError(f"seen_len={seen_len} is outside 0..{table.seen_len}")
        orders = []
        for layer in range(self.layers):
            stays = self.positions(table, layer) < seen_len
            count = stays.sum(1)
            if int(count.min()) != int(count.max()):
                raise ValueError(
                    f"layer {layer}: heads keep different tokens and {seen_len} cuts them unevenly"
                )
            order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
            orders.append(order[:, : int(count[0])])
        for layer, order in enumerate(orders):
            self.keep(table, layer, order)
        table.seen_len = seen_len
        if table.ring is not None:
            table.ring.truncate(seen_len)

    def retract(self, table: Table, kept: np.ndarray) -> None:
        """Undo appends: drop every layer's newest entries down to ``kept``."""
        for layer in range(self.layers):
            self.shrink(table, layer, int(kept[layer]))

    def note_peak(self, table: Table) -> None:
        """Take down what a table, and all of them together, hold at this moment."""
        self.note_beside(table)
        table.peak_bytes = max(table.peak_bytes, self.bytes(table) + table.noted_bytes)
        self.peak_bytes = max(self.peak_bytes, self.budget_used + self._beside)

    def note_beside(self, table: Table) -> None:
        """Take down what a table holds outside its pages (it may have become less)."""
        extra = table.extra_bytes
        self._beside += extra - table.noted_bytes
        table.noted_bytes = extra

    # --- reading ------------------------------------------------------------------------------

    def group(self, layer: int) -> Group:
        return self.groups[int(self.group_of[layer])]

    def keys(self, table: Table, layer: int) -> Tensor:
        """A copy of a layer's keys, ``[kv_heads, kept, key_dim]``, slot by slot."""
        return self._flat(table, layer, self.group(layer).keys)

    def values(self, table: Table, layer: int) -> Tensor:
        """A copy of a layer's values, ``[kv_heads, kept, value_dim]``."""
        return self._flat(table, layer, self.group(layer).values)

    def positions(self, table: Table, layer: int) -> Tensor:
        """Original positions of a layer's entries, ``[kv_heads, kept]``."""
        return self._flat(table, layer, self.group(layer).positions).long()

    def scores(self, table: Table, layer: int) -> Tensor:
        """Running scores of a layer's entries, ``[kv_heads, kept]``."""
        scores = self.group(layer).scores
        if scores is None:
            raise AssertionError("this pool keeps no scores")
        return self._flat(table, layer, scores)

    def block_tables(self, tables: list[Table]) -> np.ndarray:
        """Page lists of several requests, ``[n, layers, most pages]`` int32, padded with page 0."""
        width = max(1, max(int(table.held.max()) for table in tables))
        stacked = np.zeros((len(tables), self.layers, width), dtype=np.int32)
        for row, table in enumerate(tables):
            held = int(table.held.max())
            owned = np.arange(held) < table.held[:, None]
            stacked[row, :, :held] = np.where(owned, table.pages[:, :held], 0)
        return stacked

    def bytes(self, table: Table) -> int:
        """Bytes of the pages a table owns."""
        return int((table.held * self.layer_page_bytes).sum())

    def pages_for(self, entries: int) -> int:
        return -(-entries // self.page_size)

    @property
    def budget_used(self) -> int:
        """Bytes of all pages that some table owns."""
        sizes = zip(self.groups, self.page_bytes, strict=True)
        return sum((len(group.counts) - len(group.free)) * size for group, size in sizes)

    # --- moving a request out and in ----------------------------------------------------------

    def export(self, table: Table) -> Exported:
        """Copy a request's cache to host memory; the table still owns its pages."""
        entries = []
        for layer in range(self.layers):
            scores = None if self.group(layer).scores is None else self.scores(table, layer).cpu()
            keys, values = self.keys(table, layer), self.values(table, layer)
            entries.append((keys.cpu(), values.cpu(), self.positions(table, layer).cpu(), scores))
        state = {name: value.clone() for name, value in table.state.items()}
        host = torch.device("cpu")
        ring = _copy_ring(table.ring, host)
        return Exported(entries, table.seen_len, state, ring, table.peak_bytes)

    def import_(self, exported: Exported) -> Table:
        """Bring an exported request back as a new table."""
        table = self.new_table(max(keys.shape[1] for keys, *_ in exported.entries))
        try:
            for layer, entry in enumerate(exported.entries):
                self._restore(table, layer, *entry)
        except BaseException:
            self.release(table)
            raise
        table.seen_len, table.state = exported.seen_len, dict(exported.state)
        table.ring = _copy_ring(exported.ring, self.device)
        table.peak_bytes = exported.peak_bytes
        return table

    def _restore(self, table: Table, layer: int, keys: Tensor, values: Tensor, positions: Tensor,
                 scores: Tensor | None) -> None:  # fmt: skip
        pages, offsets = self.append(table, layer, keys.shape[1])
        group = self.group(layer)
        given = [keys, values, positions.to(torch.int32), *([] if scores is None else [scores])]
        for storage, tensor in zip(group.tensors(), given, strict=True):
            storage[pages, :, offsets] = tensor.transpose(0, 1).to(self.device)

    # --- integrity ----------------------------------------------------------------------------

    def check(self) -> None:
        """Every page is free or owned, exactly as often as it is counted; none is lost."""
        for number, group in enumerate(self.groups):
            owners = np.zeros_like(group.counts)
            for table in self.tables:
                for layer in np.nonzero(self.group_of == number)[0].tolist():
                    assert table.held[layer] == self.pages_for(int(table.kept[layer])), "lengths"
                    np.add.at(owners, self._owned(table, layer), 1)
            assert (owners == group.counts).all(), "a page's count differs from its owners"
            free = np.zeros(len(owners), dtype=bool)
            free[group.free] = True
            assert len(group.free) == int(free.sum()), "a page is free twice"
            assert (free == (owners == 0)).all(), "a page is lost, or free while owned"

    # --- inside -------------------------------------------------------------------------------

    def _owned(self, table: Table, layer: int) -> np.ndarray:
        return table.pages[layer, : int(table.held[layer])]

    def _entries_at(self, table: Table, layer: int, places: Tensor) -> Tensor:
        """Entry numbers of ``places`` ``[n]`` in a layer whose heads all hold the same tokens."""
        held, order = self.positions(table, layer)[0].sort()
        at = torch.searchsorted(held, places.to(self.device))
        assert bool((held[at.clamp(max=len(held) - 1)] == places.to(self.device)).all()), "not held"
        return order[at]

    def _flat(self, table: Table, layer: int, storage: Tensor) -> Tensor:
        if self.kernels is not None:
            kept = int(table.kept[layer])
            return native_gather(self.kernels, storage, table.pages[layer], kept)
        rows = self._upload(self._owned(table, layer))
        return storage[rows].transpose(0, 1).flatten(1, 2)[:, : int(table.kept[layer])]

    def _reserve(self, table: Table, layer: int, first: int, end: int) -> None:
        """Own the pages of entries ``first..end``, none of them shared."""
        held, wanted = int(table.held[layer]), self.pages_for(int(end))
        if wanted > table.pages.shape[1]:
            table.grow(wanted)
        if first % self.page_size and held:
            self._own(table, layer, [int(first) // self.page_size])
        if wanted > held:
            table.pages[layer, held:wanted] = self.group(layer).take(wanted - held)
            table.held[layer] = wanted

    def own_front(self, table: Table, layer: int, entries: int) -> None:
        """Copy those of the first pages that others own too: their entries will be written over."""
        self._own(table, layer, list(range(self.pages_for(entries))))

    def _own(self, table: Table, layer: int, indices: list[int]) -> None:
        """Copy those of the table's pages that others own too."""
        group = self.group(layer)
        shared = group.counts[table.pages[layer, indices]] > 1
        for index in np.array(indices)[shared].tolist():
            page = int(table.pages[layer, index])
            if group.counts[page] > 1:
                (copy,) = group.take(1)
                for tensor in group.tensors():
                    tensor[copy] = tensor[page]
                group.counts[page] -= 1
                table.pages[layer, index] = copy

    def shrink(self, table: Table, layer: int, kept: int) -> None:
        """Free the pages beyond the first ``kept`` entries of a layer."""
        group, wanted = self.group(layer), self.pages_for(kept)
        group.drop(table.pages[layer, wanted : int(table.held[layer])])
        table.held[layer], table.kept[layer] = wanted, kept
        if group.poison and kept % self.page_size:
            page = int(table.pages[layer, wanted - 1])
            if group.counts[page] == 1:
                group.keys[page, :, kept % self.page_size :] = float("nan")
                group.values[page, :, kept % self.page_size :] = float("nan")

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _copy_ring(ring: Ring | None, device: torch.device) -> Ring | None:
    if ring is None:
        return None
    return Ring(
        ring.queries.to(device, copy=True),
        ring.lse.to(device, copy=True),
        ring.positions.to(device, copy=True),
        ring.written,
        ring.oldest,
    )
