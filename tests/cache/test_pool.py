"""Pool and tables under random sequences of operations, against plain Python lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyramidinfer.cache import Copier, GroupSpec, Layout, Pool, PoolExhausted, Ring, Table
from pyramidinfer.cache.pool import Slots
from pyramidinfer.types import Keep

SPECS = [
    GroupSpec((0, 2), kv_heads=2, key_dim=3, value_dim=2, dtype=torch.float32),
    GroupSpec((1,), kv_heads=2, key_dim=2, value_dim=4, dtype=torch.float32),
]
LAYERS, PAGE, KV_HEADS = 3, 4, 2


def new_pool(budget: int = 20_000, scores: bool = False) -> Pool:
    return Pool(Layout(SPECS, budget, PAGE, scores=scores))


def entry(pool: Pool, layer: int, tags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell who wrote them: ``tag + 0.01 * head``."""
    spec = pool.group(layer).spec
    heads = torch.arange(spec.kv_heads) * 0.01
    base = tags.float()[:, None, None] + heads[None, :, None]
    return base.expand(-1, -1, spec.key_dim), -base.expand(-1, -1, spec.value_dim)


def ragged(chosen: list[torch.Tensor]) -> Keep:
    """Indices of each head as a policy gives them: filled up with what must not be looked at."""
    most = max(map(len, chosen))
    rows = [torch.cat([each, torch.full((most - len(each),), 10**6)]) for each in chosen]
    return Keep(torch.stack(rows), torch.tensor([len(each) for each in chosen]))


def held_by(pool: Pool, table: Table, layer: int, head: int) -> list[tuple[int, int]]:
    """A head's (position, tag), slot by slot."""
    keys = pool.keys(table, layer, slice(head, head + 1))[0, :, 0]
    positions = pool.positions(table, layer)[head, : len(keys)]
    return list(zip(positions.tolist(), (keys - 0.01 * head).round().long().tolist(), strict=True))


@dataclass
class Model:
    """What a table must hold: per layer and head, a set of (position, tag)."""

    table: Table
    entries: list[list[set[tuple[int, int]]]] = field(
        default_factory=lambda: [[set() for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    )


class PoolMachine(RuleBasedStateMachine):
    """add, evict, decode, fork, swap, truncate and finish, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.live: list[Model] = []
        self.tag = 0

    def pick(self, data: st.DataObject) -> Model:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @rule()
    def begin(self) -> None:
        if len(self.live) < 4:
            self.live.append(Model(self.pool.new_table()))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 11))
    def add(self, data: st.DataObject, count: int) -> None:
        """The same new tokens in every layer, as a prefill does."""
        model = self.pick(data)
        table = model.table
        first = table.seen_len
        positions = torch.arange(first, first + count)
        for layer in range(LAYERS):
            self.tag += 1
            try:
                slots = self.pool.append(table, layer, count)
            except PoolExhausted:
                self.pool.release(table)
                self.live.remove(model)
                return
            keys, values = entry(self.pool, layer, torch.full((count,), self.tag))
            self.pool.write(layer, slots, keys, values, positions)
            for head in model.entries[layer]:
                head |= {(int(position), self.tag) for position in positions}
        table.seen_len += count

    @precondition(lambda self: self.live)
    @rule()
    def decode(self) -> None:
        """One token for every request at once."""
        tables = [model.table for model in self.live]
        worst = [len(tables) * 2 * KV_HEADS * len(group.spec.layers) for group in self.pool.groups]
        if any(n > len(g.free) for n, g in zip(worst, self.pool.groups, strict=True)):
            return
        pages, offsets = map(torch.from_numpy, self.pool.append_each(tables))
        for layer in range(LAYERS):
            self.tag += 1
            tags = torch.arange(self.tag, self.tag + len(tables))
            self.tag += len(tables)
            keys, values = entry(self.pool, layer, tags)
            positions = torch.tensor([table.seen_len for table in tables])
            slots = Slots(pages[layer], offsets[layer])
            self.pool.write(layer, slots, keys, values, positions)
            for model, tag in zip(self.live, tags.tolist(), strict=True):
                for head in model.entries[layer]:
                    head.add((model.table.seen_len, tag))
        for table in tables:
            table.seen_len += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), seed=st.integers(0, 999), shares=st.tuples(*[st.floats(0, 1)] * KV_HEADS))
    def evict(self, data: st.DataObject, seed: int, shares: tuple[float, ...]) -> None:
        """Each head keeps other entries, and as many as it likes."""
        model = self.pick(data)
        layer = data.draw(st.integers(0, LAYERS - 1))
        generator = torch.Generator().manual_seed(seed)
        lens = model.table.lens(layer)
        chosen = [
            torch.randperm(length, generator=generator)[: int(length * share)]
            for length, share in zip(lens, shares, strict=True)
        ]
        held = [held_by(self.pool, model.table, layer, head) for head in range(KV_HEADS)]
        try:
            self.pool.keep(model.table, layer, ragged(chosen))
        except PoolExhausted:
            self.pool.release(model.table)
            self.live.remove(model)
            return
        for head, stays in enumerate(chosen):
            model.entries[layer][head] = {held[head][i] for i in stays.tolist()}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        model = self.pick(data)
        if len(self.live) < 4:
            twin = Model(self.pool.fork(model.table))
            twin.entries = [[set(head) for head in layer] for layer in model.entries]
            self.live.append(twin)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        model = self.pick(data)
        exported = Copier(self.pool).export(model.table)
        self.pool.release(model.table)
        try:
            model.table = Copier(self.pool).import_(exported)
        except PoolExhausted:  # its pages may have been shared, so more are needed now
            self.live.remove(model)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cut=st.integers(0, 60))
    def truncate(self, data: st.DataObject, cut: int) -> None:
        model = self.pick(data)
        cut = min(cut, model.table.seen_len)
        left = [[{e for e in h if e[0] < cut} for h in layer] for layer in model.entries]
        try:
            self.pool.truncate(model.table, cut)
        except PoolExhausted:
            self.pool.release(model.table)
            self.live.remove(model)
            return
        model.entries = left

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        model = self.pick(data)
        self.pool.release(model.table)
        self.live.remove(model)

    @invariant()
    def nothing_is_lost_or_mixed_up(self) -> None:
        self.pool.check()
        for model in self.live:
            for layer in range(LAYERS):
                for head, expected in enumerate(model.entries[layer]):
                    found = held_by(self.pool, model.table, layer, head)
                    assert set(found) == expected and len(found) == len(expected)
                    one = slice(head, head + 1)
                    keys = self.pool.keys(model.table, layer, one)
                    values = self.pool.values(model.table, layer, one)
                    assert torch.equal(keys[..., 0], -values[..., 0])
                    beyond = self.pool.positions(model.table, layer)[head, len(found) :]
                    assert bool((beyond < 0).all()) and len(set(beyond.tolist())) == len(beyond)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def filled(pool: Pool, count: int) -> Table:
    table = pool.new_table()
    for layer in range(LAYERS):
        keys, values = entry(pool, layer, torch.arange(count))
        pool.write(layer, pool.append(table, layer, count), keys, values, torch.arange(count))
    table.seen_len = count
    return table


def test_eviction_frees_pages_at_once() -> None:
    pool = new_pool()
    table = filled(pool, 20)
    before = pool.bytes(table)
    pool.keep(
        table, 0, Keep(torch.tensor([[1, 7, 19, 3, 4], [0, 18, 2, 0, 0]]), torch.tensor([5, 3]))
    )
    assert table.held[0].tolist() == [2, 1] and table.lens(0) == (5, 3)
    assert before - pool.bytes(table) == (3 + 4) * pool.layout.page_bytes[0]
    pool.check()


def test_hole_filling_moves_only_the_tail() -> None:
    """Survivors already in front keep their slots; the others come from behind."""
    pool = new_pool()
    table = filled(pool, 10)
    pool.keep(table, 0, Keep(torch.tensor([[0, 2, 3, 8], [9, 1, 2, 3]])))
    positions = pool.positions(table, 0)
    assert positions[0].tolist() == [0, 8, 2, 3]
    assert positions[1].tolist() == [9, 1, 2, 3]


def test_freed_slots_are_poisoned() -> None:
    pool = new_pool()
    table = filled(pool, 6)
    pages = table.pages[0, :, 1].tolist()
    pool.keep(table, 0, Keep(torch.tensor([[0, 1, 2]]), torch.tensor([3, 2])))
    assert pool.groups[0].keys[pages].isnan().all()
    assert pool.groups[0].keys[table.pages[0, 0, 0], 3].isnan().all()
    assert pool.groups[0].keys[table.pages[0, 1, 0], 2:].isnan().all()


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    pool = new_pool()
    table = filled(pool, 6)
    twin = pool.fork(table)
    assert pool.bytes(twin) == pool.bytes(table)
    used = pool.budget_used
    assert used == pool.bytes(table)  # nothing was copied yet
    pool.append_each([twin])
    assert pool.budget_used > used
    assert twin.pages[0, :, 0].tolist() == table.pages[0, :, 0].tolist()
    assert (twin.pages[0, :, 1] != table.pages[0, :, 1]).all()
    pool.check()


def test_scores_and_ring_travel_with_the_request() -> None:
    pool = new_pool(scores=True)
    table = filled(pool, 6)
    for layer in range(LAYERS):
        pool.add_scores(table, layer, torch.arange(6.0).expand(KV_HEADS, -1))
    table.state = {"marker": torch.tensor([1, 2, 3])}
    table.ring = Ring.empty(LAYERS, 3, 2, 3, torch.float32, torch.device("cpu"))
    for position in range(5):
        table.ring.push(
            torch.full((LAYERS, 2, 3), float(position)), torch.zeros(LAYERS, 2), position
        )
    pool.keep(table, 0, Keep(torch.tensor([[5, 1, 4], [2, 5, 0]]), torch.tensor([3, 2])))
    assert pool.scores(table, 0).sort(1).values.tolist() == [[1, 4, 5], [0, 2, 5]]
    back = Copier(pool).import_(Copier(pool).export(table))
    assert pool.scores(back, 0).tolist() == pool.scores(table, 0).tolist()
    assert back.state["marker"].tolist() == [1, 2, 3]
    assert back.ring is not None
    assert back.ring.newest(0, 10)[2].tolist() == [2, 3, 4]


def test_check_sees_a_double_owner_and_a_leak() -> None:
    pool = new_pool()
    table, other = filled(pool, 6), filled(pool, 6)
    spare = int(other.pages[0, 1, 0])
    other.pages[0, 1, 0] = table.pages[0, 1, 0]
    with pytest.raises(AssertionError):
        pool.check()
    other.pages[0, 1, 0] = spare
    pool.check()
    lost = pool.groups[0].free.pop()
    with pytest.raises(AssertionError):
        pool.check()
    pool.groups[0].free.append(lost)


def test_ring_forgets_what_is_truncated_and_what_that_had_overwritten() -> None:
    ring = Ring.empty(1, 3, 1, 1, torch.float32, torch.device("cpu"))
    for position in range(5):
        ring.push(torch.full((1, 1, 1), float(position)), torch.zeros(1, 1), position)
    ring.truncate(4)
    assert ring.newest(0, 9)[2].tolist() == [2, 3]
    assert ring.newest(0, 9)[0].flatten().tolist() == [2.0, 3.0]
    ring.push(torch.full((1, 1, 1), 9.0), torch.zeros(1, 1), 4)
    assert ring.newest(0, 9)[0].flatten().tolist() == [2.0, 3.0, 9.0]
    ring.truncate(0)
    assert ring.newest(0, 9)[2].tolist() == []


def test_groups_of_different_sizes_decode_together() -> None:
    """A page number of one group may lie beyond the other group's last page."""
    pool = new_pool()
    small, large = sorted(pool.groups, key=lambda group: len(group.counts))
    tables = [pool.new_table()]
    while len(large.free) >= KV_HEADS * (2 * len(large.spec.layers) + 1):
        pool.append(tables[0], large.spec.layers[0], PAGE)
    tables.append(pool.new_table())
    pool.append_each(tables)
    assert max(int(table.pages.max()) for table in tables) >= len(small.counts)
    pool.check()
