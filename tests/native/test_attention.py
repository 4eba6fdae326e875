"""The C++ kernels of every instruction set against the reference in float32.

Inputs are rounded to the dtype first and the reference gets them widened, so what differs is the
kernels' own rounding alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyramidinfer.attention.base import DecodePlan, Pages, Scale
from pyramidinfer.attention.reference import ReferenceBackend
from pyramidinfer.codec import CODECS, Codec
from pyramidinfer.types import Reduce
from tests.native.isas import DTYPES, EXACT, ISAS, ROUNDING, backend, close, random

REFERENCE = ReferenceBackend()


class Layout(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int


#: Groups of 1, 2, 3, 4, 5 and 8, every head size with several of them, every page size.
LAYOUTS = [
    Layout(4, 4, 8, 8, 4),
    Layout(2, 2, 64, 64, 16),
    Layout(2, 2, 128, 128, 32),
    Layout(4, 2, 96, 96, 32),
    Layout(8, 4, 128, 128, 16),
    Layout(3, 1, 80, 80, 4),
    Layout(6, 2, 64, 64, 32),
    Layout(8, 2, 128, 128, 4),
    Layout(4, 1, 8, 8, 16),
    Layout(5, 1, 96, 96, 16),
    Layout(10, 2, 80, 80, 32),
    Layout(8, 1, 64, 64, 4),
    Layout(8, 1, 96, 96, 4),
    Layout(2, 1, 16, 6, 5),  # sizes of keys and values differ, and pages are no power of two
]
FEW = [LAYOUTS[0], LAYOUTS[5], LAYOUTS[7], LAYOUTS[9], LAYOUTS[13]]
SCALES = {
    "plain": Scale(0.2),
    "softcap": Scale(0.2, softcap=1.5),
    "window": Scale(0.2, window=20),
    "both": Scale(0.2, 1.5, 150),
}


def cases(layouts: list[Layout]) -> Any:
    """Every layout with two of the scales, every scale with half of the layouts."""
    names = list(SCALES)
    found = {
        f"{'-'.join(map(str, layout))}-{name}": (layout, SCALES[name])
        for index, layout in enumerate(layouts)
        for name in (names[index % 4], names[(index // 2 + 1 + index % 2) % 4])
    }
    return pytest.mark.parametrize("layout,scale", found.values(), ids=found)


isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [each.float() for each in tensors]


# --- decoding ------------------------------------------------------------------------------------


def paged(
    layout: Layout, lengths: list[int], dtype: torch.dtype, seed: int = 0
) -> tuple[DecodePlan, Tensor, Pages]:
    """Requests of these lengths in scattered pages, each head with tokens of its own, and in every
    second request fewer of them the later the head; everything outside their entries is NaN, and
    so is the page that unused places of the table name."""
    size, generator, heads = layout.page, torch.Generator().manual_seed(seed), layout.kv_heads
    lens = torch.tensor(
        [
            [max(1, length // (1 + head * (row % 2))) for head in range(heads)]
            for row, length in enumerate(lengths)
        ]
    )
    held = -(-lens // size)
    shape = (int(held.sum()) + 2, size)
    pages = Pages(
        torch.full((*shape, layout.key_dim), math.nan, dtype=dtype),
        torch.full((*shape, layout.value_dim), math.nan, dtype=dtype),
        torch.zeros(shape, dtype=torch.int32),
    )
    order = torch.randperm(shape[0], generator=generator)
    table = torch.full((*held.shape, int(held.max()) + 1), int(order[-1]), dtype=torch.int32)
    at = torch.tensor([length + 30 for length in lengths])
    for row, head in itertools.product(range(len(lengths)), range(heads)):
        length, count = int(lens[row, head]), int(held[row, head])
        mine, order = order[:count], order[count:]
        table[row, head, :count] = mine
        entry, own = torch.arange(length), seed + 100 * row + 3 * head
        slots = mine[entry // size], entry % size
        pages.keys[slots] = random(own, length, layout.key_dim, dtype=dtype)
        pages.values[slots] = random(own + 1, length, layout.value_dim, dtype=dtype)
        older = torch.randperm(int(at[row]), generator=generator)[: length - 1]
        newest = torch.cat([older, at[row, None]])
        pages.positions[slots] = newest[torch.randperm(length, generator=generator)].int()
    queries = random(seed + 7, len(lengths), layout.heads, layout.key_dim, dtype=dtype)
    return DecodePlan(table[None], lens[None], [max(lengths)], at), queries, pages


@isas
@dtypes
@cases(LAYOUTS)
def test_decode(isa: str, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    """Ragged requests and heads, one of a single token, one longer than a span of work."""
    plan, queries, pages = paged(layout, [1, 333, 37, 256], dtype)
    cpu = backend(isa)
    got = cpu.run(plan, 0, queries, pages, scale, probs=True)
    keys, values = wide(pages.keys, pages.values)
    exact = REFERENCE.run(
        plan, 0, queries.float(), Pages(keys, values, pages.positions), scale, probs=True
    )
    assert got.out.dtype == dtype
    close(got.out, exact.out, ROUNDING[dtype] * float(values.nan_to_num().abs().max()), "out ")
    close(got.lse, exact.lse, EXACT, "lse ")
    close(got.probs, exact.probs, EXACT, "probs ")
    bare = cpu.run(plan, 0, queries, pages, scale)
    assert bare.probs is None and bare.out.equal(got.out)


@isas
@dtypes
@pytest.mark.parametrize(
    "codec", [None, *CODECS.values()], ids=lambda codec: getattr(codec, "name", "plain")
)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_rows_that_share_pages(isa: str, codec: Codec | None, dtype: torch.dtype, dim: int) -> None:
    """Tokens of one request fed together, more than are read together, then two requests that part
    in the middle of what they share: the bits of each are those it has alone."""
    size, cpu = 16, backend(isa)
    entries = [*range(290, 310), 3, 290, 300, 310]
    kv_heads, heads, pages = 2, 6, -(-310 // size)
    count = (len(entries) + 1) * kv_heads * pages
    keys, values = (random(each, count, size, dim, dtype=dtype) for each in (1, 2))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).int()
    table = order[: kv_heads * pages].view(1, kv_heads, pages).repeat(len(entries), 1, 1)
    other = order[kv_heads * pages :].view(-1, kv_heads, pages)
    table[21:, 0, 17:], table[22, 1, 3:] = other[0, 0, 17:], other[1, 1, 3:]
    at = torch.tensor(entries)
    lens = at[:, None].repeat(1, kv_heads)
    held = Pages(keys, values, torch.zeros(count, size, dtype=torch.int32))
    if codec is not None:
        (codes, scales), (value_codes, value_scales) = codec.encode(keys), codec.encode(values)
        held = Pages(codes, value_codes, held.positions, scales, value_scales, codec)
    queries = random(4, len(entries), heads, dim, dtype=dtype)
    scale = Scale(0.2)
    plan = DecodePlan(table[None], lens[None], [310], at)
    together = cpu.run(plan, 0, queries, held, scale, probs=True)
    for row in range(len(entries)):
        own = slice(row, row + 1)
        alone = DecodePlan(table[None, own], lens[None, own], [310], at[own])
        expected = cpu.run(alone, 0, queries[own], held, scale, probs=True)
        for mine, theirs in zip(together, expected, strict=True):
            assert mine is not None and theirs is not None and mine[own].equal(theirs)


# --- prefill and scores --------------------------------------------------------------------------


class Dense(NamedTuple):
    queries: Tensor
    keys: Tensor
    values: Tensor
    q_pos: Tensor
    k_pos: Tensor

    def widened(self) -> Any:
        return self._replace(
            queries=self.queries.float(), keys=self.keys.float(), values=self.values.float()
        )


def dense(layout: Layout, new: int, entries: int, dtype: torch.dtype, seed: int = 0) -> Dense:
    """``new`` tokens with gaps between them on older entries in any order, other ones a head."""
    generator, old = torch.Generator().manual_seed(seed), entries - new
    older = torch.stack(
        [torch.randperm(2 * old + 3, generator=generator)[:old] for _ in range(layout.kv_heads)]
    )
    q_pos = 2 * old + 3 + torch.arange(new) * 3 // 2
    return Dense(
        random(seed, new, layout.heads, layout.key_dim, dtype=dtype),
        random(seed + 1, entries, layout.kv_heads, layout.key_dim, dtype=dtype).transpose(0, 1),
        random(seed + 2, entries, layout.kv_heads, layout.value_dim, dtype=dtype).transpose(0, 1),
        q_pos,
        torch.cat([older, q_pos.expand(layout.kv_heads, -1)], dim=1),
    )


SIZES = [(1, 1), (7, 7), (100, 100), (50, 301), (1, 130)]  # whole, on older entries, single row


@isas
@dtypes
@cases(LAYOUTS)
def test_prefill(isa: str, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    for new, entries in SIZES:
        case = dense(layout, new, entries, dtype)
        got = backend(isa).prefill(*case, scale)
        exact = REFERENCE.prefill(*case.widened(), scale)
        assert got.dtype == dtype
        limit = ROUNDING[dtype] * float(case.values.abs().max())
        close(got, exact, limit, f"{new} of {entries} ")


@isas
@dtypes
@cases(FEW)
def test_prefill_scored(isa: str, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    """The newest queries' weights, summed on the way: those that window_scores would sum."""
    for new, entries, watched in ((1, 1, 1), (7, 7, 7), (130, 130, 41), (65, 400, 65)):
        case, ramp = dense(layout, new, entries, dtype), torch.linspace(1.0, 1.4, watched)
        exact_out = REFERENCE.prefill(*case.widened(), scale)
        exact = case.widened()
        for heads in ("mean", "kv_mean"):
            out, scored = backend(isa).prefill_scored(*case, scale, Reduce(heads, "sum", 1.4), ramp)
            limit = ROUNDING[dtype] * float(case.values.abs().max())
            close(out, exact_out, limit, f"out {new} of {entries} ")
            expected = REFERENCE.window_scores(
                exact.queries[-watched:],
                exact.keys,
                exact.q_pos[-watched:],
                exact.k_pos,
                scale,
                Reduce(heads, "sum", 1.4),
                rows=watched,
            )
            # Weights wait for their row's sum in the dtype they are multiplied in.
            close(scored.scores, expected.scores, ROUNDING[dtype], f"scores {new} of {entries} ")
            close(scored.lse, expected.lse, EXACT, "lse ")


@isas
@dtypes
@cases(FEW)
def test_window_scores(isa: str, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    """All reductions, a log-sum-exp given or not, rows missing in front of the window."""
    for new, entries in ((1, 1), (9, 40), (60, 301)):
        case = dense(layout, new, entries, dtype)
        exact = case.widened()
        given = (
            REFERENCE.window_scores(
                exact.queries, exact.keys, exact.q_pos, exact.k_pos, scale, Reduce(), rows=new
            ).lse
            + 0.5
        )  # what it was then, with more entries
        for heads, rows, lse in itertools.product(
            ("mean", "max", "kv_mean", "kv_max"), ("mean", "sum", "max", "below"), (None, given)
        ):
            if rows == "below" and not heads.startswith("kv"):
                continue  # what a query can see is each head's own
            reduce = Reduce(heads, rows, 1.3)
            got, expected = (
                each.window_scores(
                    data.queries,
                    data.keys,
                    data.q_pos,
                    data.k_pos,
                    scale,
                    reduce,
                    rows=new + 2,
                    lse=lse,
                )
                for each, data in ((backend(isa), case), (REFERENCE, exact))
            )
            what = f"{heads} {rows} {new} of {entries} lse {lse is not None} "
            close(got.lse, expected.lse, EXACT, what)
            if rows == "below":  # a weight that is even but for rounding may count or not
                far = (got.scores - expected.scores).abs()
                assert float(far.max()) <= 1 and float(far.mean()) < 0.01, what
            else:
                close(got.scores, expected.scores, EXACT, what)


@isas
@dtypes
@cases(FEW)
def test_column_sums(isa: str, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    for new, entries in SIZES:
        case = dense(layout, new, entries, dtype)
        exact = case.widened()
        got, expected = (
            each.column_sums(data.queries, data.keys, data.q_pos, data.k_pos, scale)
            for each, data in ((backend(isa), case), (REFERENCE, exact))
        )
        close(got, expected, EXACT, f"{new} of {entries} ")


@isas
def test_it_is_what_was_asked_for(isa: str) -> None:
    """A test of one instruction set does not run another."""
    found = backend(isa).kernels.instructions
    assert found == isa if isa != "native" else found in ("avx512", "avx2", "portable")


# --- invariance ----------------------------------------------------------------------------------


@isas
@dtypes
@pytest.mark.parametrize("layout", FEW, ids=str)
def test_decode_does_not_depend_on_company_or_threads(
    isa: str, dtype: torch.dtype, layout: Layout
) -> None:
    """Bit for bit: work is cut by a head's own length, whoever else is there."""
    cpu, scale = backend(isa), Scale(0.2, window=200)
    plan, queries, pages = paged(layout, [1, 700, 37, 256], dtype)

    def run(rows: list[int]) -> Any:
        lengths = plan.lengths[:, rows]
        mine = DecodePlan(plan.tables[:, rows], lengths, [int(lengths.max())], plan.positions[rows])
        return cpu.run(mine, 0, queries[rows], pages, scale, probs=True)

    together = run([0, 1, 2, 3])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in ([0, 1, 2, 3], [3, 1], [0], [1], [2], [3]):
                found = run(rows)
                longest = found.probs.shape[2]
                assert found.out.equal(together.out[rows])
                assert found.lse.equal(together.lse[rows])
                assert found.probs.equal(together.probs[rows, :, :longest])
    finally:
        torch.set_num_threads(1)


@isas
@dtypes
def test_prefill_does_not_depend_on_chunks_or_threads(isa: str, dtype: torch.dtype) -> None:
    """Outputs bit for bit; scores for any number of threads (chunks add them up otherwise)."""
    cpu, scale, ramp = backend(isa), Scale(0.2, window=90), torch.linspace(1, 1.4, 150)
    case = dense(LAYOUTS[7], 260, 260, dtype)
    whole, scored = cpu.prefill_scored(*case, scale, Reduce("kv_mean", "sum", 1.4), ramp)
    assert whole.equal(cpu.prefill(*case, scale))
    parts = [
        cpu.prefill(
            case.queries[a:b],
            case.keys[:, :b],
            case.values[:, :b],
            case.q_pos[a:b],
            case.k_pos[:, :b],
            scale,
        )
        for a, b in ((0, 1), (1, 77), (77, 200), (200, 259), (259, 260))
    ]
    assert torch.cat(parts).equal(whole)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again, found = cpu.prefill_scored(*case, scale, Reduce("kv_mean", "sum", 1.4), ramp)
            assert again.equal(whole)
            assert found.scores.equal(scored.scores) and found.lse.equal(scored.lse)
    finally:
        torch.set_num_threads(1)
