"""What the cache and the policies have the kernels do, against the same in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from pyramidinfer.cache import GroupSpec, Layout, Pool, Table, Weights
from pyramidinfer.cache.mover import Mover
from pyramidinfer.cache.native import KernelMover
from pyramidinfer.native import Kernels, kernels
from pyramidinfer.policies import rule
from pyramidinfer.types import Keep
from tests.cache import test_pool
from tests.native.isas import DTYPES, backend, random

PAGE = 4


def pool_pair(dtype: torch.dtype, heads: int = 2, scores: bool = True) -> list[Pool]:
    """The same pool twice, on the kernels and in torch; what is free is NaN."""
    spec = [GroupSpec((0, 1), heads, key_dim=6, value_dim=10, dtype=dtype)]
    return [
        Pool(Layout(spec, 60_000, PAGE, scores=scores), mover=mover)
        for mover in (KernelMover(backend("native").kernels), Mover())
    ]


def fill(pool: Pool, table: Table, layer: int, count: int, seed: int) -> None:
    group = pool.group(layer)
    heads, dtype = group.spec.kv_heads, group.spec.dtype
    rows = random(seed, count, 2 * heads, 16, dtype=dtype)  # rows wider than what is written
    first = int(table.longest[layer])
    pool.write(
        layer,
        pool.append(table, layer, count),
        rows[:, :heads, :6],
        rows[:, heads:, :10],
        torch.arange(first, first + count) * 3,
    )


def entries(pool: Pool, table: Table, layer: int) -> list[Tensor]:
    """Keys, values, positions (and scores), each head by position."""
    positions, found = pool.positions(table, layer), []
    for head, count in enumerate(table.lens(layer)):
        one, order = slice(head, head + 1), positions[head, :count].argsort()
        of_head = [
            pool.keys(table, layer, one)[0],
            pool.values(table, layer, one)[0],
            positions[head, :count],
        ]
        if pool.group(layer).scores is not None:
            of_head.append(pool.scores(table, layer)[head, :count])
        found += [each[order] for each in of_head]
    return found


def assert_same(pools: list[Pool], tables: list[Table], layer: int) -> None:
    native, plain = (entries(*pair, layer) for pair in zip(pools, tables, strict=True))
    assert tables[0].kept.tolist() == tables[1].kept.tolist()
    assert tables[0].held.tolist() == tables[1].held.tolist()
    for got, expected in zip(native, plain, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert not got.isnan().any()
        assert got.equal(expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("heads_keep", ["the same", "as many", "unlike"])
@pytest.mark.parametrize("scores", [True, False])
def test_write_keep_and_gather(dtype: torch.dtype, heads_keep: str, scores: bool) -> None:
    pools, heads = pool_pair(dtype, scores=scores), 2
    tables = [pool.new_table() for pool in pools]
    generator = torch.Generator().manual_seed(3)
    for turn, (new, kept) in enumerate([(1, 1), (20, 9), (7, 8), (30, 30), (1, 5), (2, 0), (3, 2)]):
        for pool, table in zip(pools, tables, strict=True):
            fill(pool, table, 1, new, seed=turn)
            fill(pool, table, 0, 1, seed=turn)  # its pages lie between
            if scores:
                pool.add_scores(table, 1, random(9, heads, int(table.longest[1])))
        assert_same(pools, tables, 1)
        lens, shares = tables[0].lens(1), (1.0, 0.6)
        if heads_keep == "the same":
            keep = Keep(torch.randperm(min(lens), generator=generator)[:kept][None])
        else:
            keep = test_pool.ragged(
                [
                    torch.randperm(length, generator=generator)[
                        : int(kept * (share if heads_keep == "unlike" else 1))
                    ]
                    for length, share in zip(lens, shares, strict=True)
                ]
            )
        for pool, table in zip(pools, tables, strict=True):
            pool.keep(table, 1, keep)
            pool.check()
        assert_same(pools, tables, 1)
        assert_same(pools, tables, 0)


def test_keep_leaves_a_forks_twin_alone() -> None:
    """Pages that two tables own are copied before entries are moved into them."""
    pools = pool_pair(torch.float32)
    tables = [pool.new_table() for pool in pools]
    for pool, table in zip(pools, tables, strict=True):
        fill(pool, table, 0, 4 * PAGE + 1, seed=1)
    twins = [pool.fork(table) for pool, table in zip(pools, tables, strict=True)]
    before = entries(pools[0], twins[0], 0)
    indices = torch.tensor([[0, 5, 9, 12, 16], [16, 1, 2, 3, 8]])
    for pool, table in zip(pools, tables, strict=True):
        pool.keep(table, 0, Keep(indices, torch.tensor([5, 2])))
        pool.check()
    assert_same(pools, tables, 0)
    assert_same(pools, twins, 0)
    for was, found in zip(before, entries(pools[0], twins[0], 0), strict=True):
        assert found.equal(was)
    for pool, twin in zip(pools, twins, strict=True):  # and the other way round
        pool.keep(twin, 0, Keep(indices.flip(0)[:, 1:]))
        pool.check()
    assert_same(pools, tables, 0)
    assert_same(pools, twins, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_steps_weights_go_to_the_running_scores_of_one_request(dtype: torch.dtype) -> None:
    """Heads and layers of unequal lengths, a fork's pages left alone, as ``add_scores`` has it."""
    pools, found = pool_pair(torch.float32), []
    for pool in pools:
        table = pool.new_table()
        for layer, count in enumerate([3 * PAGE, 2 * PAGE + 1]):
            fill(pool, table, layer, count, seed=layer)
        pool.keep(
            table, 1, Keep(torch.tensor([[0, 1, 2, 3, 6], [5, 1, 0, 0, 0]]), torch.tensor([5, 2]))
        )
        twin, weights = pool.fork(table), Weights(pool)
        weights.by_layer = {layer: random(layer, 3, 2, 20, dtype=dtype) for layer in (0, 1)}
        for row in (2, 0):
            weights.add(table, row)
        pool.check()
        assert not any(bool(pool.scores(twin, layer).any()) for layer in (0, 1))
        found.append([pool.scores(table, layer) for layer in (0, 1)])
        for layer, kept in ((0, [12, 12]), (1, [5, 2])):
            rows = weights.by_layer[layer].float()
            for head, count in enumerate(kept):
                expected = rows[2, head, :count] + rows[0, head, :count]
                assert found[-1][layer][head, :count].equal(expected)
    for native, plain in zip(*found, strict=True):
        assert native.equal(plain)


@pytest.mark.parametrize("indices", [[3, 3], [0, 9], [-1, 2], [5, 0, 5]])
def test_an_entry_twice_or_not_there_is_a_policys_mistake(indices: list[int]) -> None:
    pool = pool_pair(torch.float32)[0]
    table = pool.new_table()
    fill(pool, table, 0, 9, seed=1)
    before = entries(pool, table, 0)
    with pytest.raises(AssertionError, match="a policy returned an entry twice"):
        pool.keep(table, 0, Keep(torch.tensor([indices])))
    for was, found in zip(before, entries(pool, table, 0), strict=True):
        assert found.equal(was)


class OnKernels(test_pool.PoolMachine):
    """The pool's own machine (add, evict, fork, swap, truncate, …) with the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(
            Layout(test_pool.SPECS, 20_000, test_pool.PAGE),
            mover=KernelMover(backend("native").kernels),
        )


TestPoolOnKernels = OnKernels.TestCase
TestPoolOnKernels.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# --- choosing ------------------------------------------------------------------------------------


def both(ask: Callable[[Kernels | None], Any]) -> tuple[Any, Any]:
    """The same question to the kernels and to torch."""
    return ask(kernels()), ask(None)


def shuffled(heads: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(3 * n, generator=generator)[:n] for _ in range(heads)])


@pytest.mark.parametrize("heads,n", [(1, 1), (1, 40), (3, 40), (2, 999), (4, 5000)])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("in_order", [True, False])
def test_best_entries(heads: int, n: int, kind: str, in_order: bool) -> None:
    scores = random(n, heads, n)
    if kind == "ties":
        scores = (scores * 2).round()  # negative zeros among them
    if kind == "zeros":
        scores = torch.zeros_like(scores)
    positions = None if in_order else shuffled(heads, n, n)
    for share in (0.0, 0.05, 0.6):
        forced = random(n + 1, heads, n) > 1.5
        forced &= random(n + 2, heads, n).abs() < share * 3
        for count in {1, n // 2 + 1, n}:  # half: where positive and negative zeros meet
            native, plain = both(
                lambda k, c=count, f=forced: rule.best_entries(scores, c, f, positions, k)
            )
            assert native.dtype == plain.dtype and native.equal(plain), (count, share)


def test_best_entries_takes_one_row_for_all() -> None:
    """Scores, positions or forced entries of one row, spread over heads."""
    scores, positions = random(1, 1, 30), shuffled(1, 30, 2)
    forced = random(3, 3, 30) > 1.2
    native, plain = both(lambda k: rule.best_entries(scores.expand(3, -1), 9, forced, positions, k))
    assert native.equal(plain)
    one = forced[:1]
    native, plain = both(
        lambda k: rule.best_entries(random(4, 3, 30), 9, one.expand(3, -1), positions, k)
    )
    assert native.equal(plain)


@pytest.mark.parametrize("room", [0, 3])
def test_a_head_that_loses_nothing_makes_no_room_in_others(room: int) -> None:
    """Forced entries count where something goes: 12 of them in the second of these heads, and
    ``room`` others beside them."""
    scores, lengths = random(1, 4, 30), torch.tensor([30, 20, 14, 30])
    forced = torch.zeros(4, 30, dtype=torch.bool)
    forced[0, :25], forced[1, 3:15], forced[2, :14] = True, True, True
    counts = torch.tensor([30, 5, 99, 13])
    (native, found), (plain, expected) = both(
        lambda k: rule._best(scores, counts, forced, shuffled(4, 30, 2), lengths, k, room)
    )
    assert found.tolist() == expected.tolist() == [30, 12 + room, 14, max(13, 12 + room)]
    assert native.equal(plain)


def test_scores_that_are_no_numbers_come_first() -> None:
    """As torch sorts them: above all, the earlier first.  Infinite ones are numbers."""
    scores = random(5, 2, 50)
    scores[0, [7, 30]], scores[1, 3] = torch.nan, torch.nan
    scores[0, 11], scores[1, 40] = torch.inf, -torch.inf
    forced = torch.zeros(2, 50, dtype=torch.bool)
    for count in (1, 2, 3, 49):
        native, plain = both(lambda k, c=count: rule.best_entries(scores, c, forced, kernels=k))
        assert native.equal(plain)
        assert 7 in native[0] and 3 in native[1]


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("kernel", [3, 7, 51])
@pytest.mark.parametrize("shape", ["one", "each", "sorted"])
def test_pool_neighbours(how: str, kernel: int, shape: str) -> None:
    scores, places = random(1, 3, 200), shuffled(3, 200, 1)
    if shape == "one":
        places = places[:1]
    if shape == "sorted":
        places = places.sort(1).values
    native, plain = both(lambda k: rule.pool_neighbours(scores, places, kernel, how, k))
    torch.testing.assert_close(native, plain, rtol=1e-6, atol=1e-6)
    assert how == "mean" or native.equal(plain)
    scores[1, 60] = torch.nan
    native, plain = both(lambda k: rule.pool_neighbours(scores, places, kernel, how, k))
    assert native.isnan().equal(plain.isnan())
    torch.testing.assert_close(native, plain, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert int(native.isnan().sum()) > 1


def test_a_few_scores_are_pooled() -> None:
    """Fewer entries than the pooling kernel is wide."""
    for n in (1, 2, 4):
        scores, places = random(n, 2, n), shuffled(1, n, n)
        for how in ("max", "mean"):
            native, plain = both(
                lambda k, h=how, s=scores, p=places: rule.pool_neighbours(s, p, 7, h, k)
            )
            torch.testing.assert_close(native, plain)
