"""The Triton backend against the reference: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidinfer.attention.base import Attended, DecodePlan, Pages, Scale
from pyramidinfer.attention.reference import ReferenceBackend
from pyramidinfer.codec import CODECS, Codec
from pyramidinfer.types import Reduce

pytest.importorskip("triton")

from pyramidinfer.attention import torch_flash, triton_kernels
from pyramidinfer.attention.triton_backend import TritonBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_kernels.INTERPRETED:
    assert os.environ.get("TRITON_INTERPRET") != "1", "set too late: Triton was imported before"
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
if triton_kernels.INTERPRETED and triton_kernels.VERSION < (3, 7, 1):
    pytest.skip("before 3.7.1 loops are not interpreted with NumPy 2.4", allow_module_level=True)
REFERENCE = ReferenceBackend()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: One rounding of an output in its dtype; weights and sums are float32 whatever the dtype.
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Layout(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page_size: int


LAYOUTS = {
    "mha": Layout(3, 3, 16, 16, 16),
    "four": Layout(8, 2, 64, 64, 16),
    "three": Layout(6, 2, 80, 80, 5),
    "values": Layout(2, 1, 16, 6, 4),
    "many": Layout(20, 1, 16, 16, 32),
}
SCALES = {
    "plain": Scale(0.2),
    "cap": Scale(0.2, softcap=1.5),
    "window": Scale(0.2, window=9),
    "both": Scale(0.2, 1.5, 30),
}
#: Every layout and scale in float32, every layout in 16 bits.
CASES = {
    f"{name}-{kind}-{dtype}": (layout, scale, dtype)
    for name, layout in LAYOUTS.items()
    for kind, scale in SCALES.items()
    for dtype in DTYPES
    if dtype == torch.float32 or kind == "both"
}
#: What a codec stores: heads of one group of channels, of two, of many, of small ones.
NARROW = Layout(4, 2, 16, 12, 4)
CODED_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("mha", "four", "three")},
    "wide": Layout(4, 2, 128, 64, 8),
    "narrow": NARROW,
}
#: Every layout in every dtype, every scale once.
CODED = {
    f"{name}-{kind}-{dtype}": (layout, SCALES[kind], dtype)
    for name, layout in CODED_LAYOUTS.items()
    for kind in SCALES
    for dtype in DTYPES
    if kind == "both" or (dtype == torch.float32 and name == "narrow")
}
cases = pytest.mark.parametrize("layout,scale,dtype", CASES.values(), ids=CASES)
coded_cases = pytest.mark.parametrize("layout,scale,dtype", CODED.values(), ids=CODED)
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def close(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    assert got is not None and expected is not None
    assert got.dtype == expected.dtype and got.device == expected.device
    limit = ROUNDING[dtype]
    torch.testing.assert_close(got, expected, atol=limit, rtol=limit)


# --- decoding ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One decode step over pages in which all but the entries is NaN."""

    plan: DecodePlan
    queries: Tensor
    pages: Pages


def step(
    layout: Layout,
    lengths: list[int],
    dtype: torch.dtype,
    seed: int = 0,
    spare: int = 0,
    index: torch.dtype = torch.int64,
) -> Step:
    """Requests of these lengths in scattered pages, fewer entries in later heads of every second
    one; tables ``spare`` pages wider than needed."""
    size, generator = layout.page_size, torch.Generator().manual_seed(seed)
    lens = torch.tensor(
        [
            [length // (1 + head * (row % 2)) or min(1, length) for head in range(layout.kv_heads)]
            for row, length in enumerate(lengths)
        ]
    )
    held = -(-lens // size)
    shape = (int(held.sum()) + 3, size)
    keys = torch.full((*shape, layout.key_dim), math.nan)
    values = torch.full((*shape, layout.value_dim), math.nan)
    positions = torch.zeros(shape, dtype=torch.int32)
    order = torch.randperm(shape[0], generator=generator).tolist()
    table = torch.full((*held.shape, int(held.max()) + spare), order[-1], dtype=index)
    q_pos = [length + 11 for length in lengths]
    for request in range(len(lengths)):
        for head in range(layout.kv_heads):  # heads keep different tokens, the newest among them
            length = int(lens[request, head])
            mine = [order.pop(0) for _ in range(int(held[request, head]))]
            table[request, head, : len(mine)] = torch.tensor(mine, dtype=index)
            seen = torch.randperm(q_pos[request], generator=generator)[: max(0, length - 1)]
            for entry, position in enumerate([*seen.tolist(), q_pos[request]][:length]):
                slot = mine[entry // size], entry % size
                keys[slot] = torch.randn(layout.key_dim, generator=generator)
                values[slot] = torch.randn(layout.value_dim, generator=generator)
                positions[slot] = position
    queries = random(seed + 1, len(lengths), layout.heads, layout.key_dim, dtype=dtype)
    pages = Pages(keys.to(DEVICE, dtype), values.to(DEVICE, dtype), positions.to(DEVICE))
    plan = DecodePlan(
        table[None].to(DEVICE),
        lens[None].to(DEVICE),
        [max(lengths)],
        torch.tensor(q_pos, device=DEVICE),
    )
    return Step(plan, queries, pages)


def coded(at: Step, codec: Codec) -> Step:
    """The same stored by a codec; all but the entries has NaN for scales."""
    keys, key_scales = codec.encode(at.pages.keys)
    values, value_scales = codec.encode(at.pages.values)
    assert key_scales.isnan().any() and value_scales.isnan().any()
    pages = Pages(keys, values, at.pages.positions, key_scales, value_scales, codec)
    return at._replace(pages=pages)


def decode(at: Step, scale: Scale, splits: int, probs: bool = True) -> Attended:
    return TritonBackend(splits).run(at.plan, 0, at.queries, at.pages, scale, probs=probs)


def judge(at: Step, scale: Scale) -> Attended:
    return REFERENCE.run(at.plan, 0, at.queries, at.pages, scale, probs=True)


@cases
def test_decode(layout: Layout, scale: Scale, dtype: torch.dtype) -> None:
    """Ragged lengths over scattered pages; what is freed or not yet written is NaN."""
    at = step(layout, [1, 70, layout.page_size, 33], dtype)
    got, expected = decode(at, scale, 2), judge(at, scale)
    close(got.out, expected.out, dtype)
    close(got.lse, expected.lse)
    close(got.probs, expected.probs)


@codecs
@coded_cases
def test_decode_of_codes(layout: Layout, scale: Scale, dtype: torch.dtype, codec: Codec) -> None:
    at = coded(step(layout, [1, 70, layout.page_size, 33], dtype), codec)
    got, expected = decode(at, scale, 2), judge(at, scale)
    high = torch.float32 if triton_kernels.INTERPRETED else dtype  # tf32 keeps 11 bits
    close(got.out, expected.out, dtype)
    close(got.lse, expected.lse, high)
    close(got.probs, expected.probs, high)


@codecs
@pytest.mark.parametrize("splits", [1, 3, 100])
def test_splits_of_codes_and_rows_not_in_use(splits: int, codec: Codec) -> None:
    at = coded(step(NARROW, [128, 0, 65], torch.float32, spare=40), codec)
    got = decode(at, SCALES["plain"], splits, probs=False)
    used = torch.tensor([0, 2], device=DEVICE)
    plan = DecodePlan(at.plan.tables[:, used], at.plan.lengths[:, used], [128], at.plan.positions)
    expected = judge(Step(plan, at.queries[used], at.pages), SCALES["plain"])
    assert got.lse is not None and got.probs is None
    close(got.out[used], expected.out)
    close(got.lse[used], expected.lse)
    assert not got.out[1].any() and bool((got.lse[1] == -math.inf).all())


@codecs
def test_every_code_is_read(codec: Codec) -> None:
    """One entry, whose value is the output: all codes of 8 bits, all pairs of 4."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    if codec.is_float:
        every = every[(every & 127) < 127]  # the rest is NaN, which nothing is encoded to
        every = F.pad(every, (0, 2))
    size = 64
    values = every.view(-1, 1, codec.code_bytes(size))
    pages, ones = len(values), torch.ones(len(values), 1, 1, dtype=torch.float16, device=DEVICE)
    positions = torch.zeros(pages, 1, dtype=torch.int32, device=DEVICE)
    tables = torch.arange(pages, dtype=torch.int32, device=DEVICE).view(1, pages, 1, 1)
    lengths = torch.ones(1, pages, 1, dtype=torch.int64, device=DEVICE)
    plan = DecodePlan(tables, lengths, [1], torch.ones_like(lengths[0, :, 0]))
    stored = Pages(torch.zeros_like(values), values, positions, ones, ones, codec)
    at = Step(plan, random(1, pages, 1, size), stored)
    close(decode(at, SCALES["plain"], 1).out, codec.decode(values, ones, torch.float32))


@pytest.mark.parametrize("splits", [1, 3, 100])
@pytest.mark.parametrize("lengths", [[64], [65, 1], [128, 127, 129]], ids=str)
def test_splits_make_no_difference(splits: int, lengths: list[int]) -> None:
    """Whole blocks, one entry over, splits that get nothing, more splits than blocks."""
    at = step(LAYOUTS["values"], lengths, torch.float32)
    got, expected = decode(at, SCALES["window"], splits), judge(at, SCALES["window"])
    close(got.out, expected.out)
    close(got.lse, expected.lse)
    close(got.probs, expected.probs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_not_in_use_and_wide_tables(index: torch.dtype) -> None:
    """A graph's batch may have rows to spare: they read nothing and give nothing."""
    at = step(LAYOUTS["values"], [20, 0, 3], torch.float32, spare=40, index=index)
    got = decode(at, SCALES["plain"], 4)
    used = torch.tensor([0, 2], device=DEVICE)
    plan = DecodePlan(at.plan.tables[:, used], at.plan.lengths[:, used], [20], at.plan.positions)
    expected = judge(Step(plan, at.queries[used], at.pages), SCALES["plain"])
    assert got.lse is not None and got.probs is not None
    close(got.out[used], expected.out)
    close(got.lse[used], expected.lse)
    close(got.probs[used], expected.probs)
    assert not got.out[1].any() and not got.probs[1].any()
    assert bool((got.lse[1] == -math.inf).all())


class Waits(TorchDispatchMode):
    """Raises where the host would have to know what is in a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("codec", [None, CODECS["int4"]], ids=["auto", "int4"])
def test_run_waits_for_nothing(codec: Codec | None) -> None:
    at = step(LAYOUTS["four"], [5, 40], torch.float32)
    at = at if codec is None else coded(at, codec)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Waits():
        int(at.plan.lengths.max())
    with Waits():
        decode(at, SCALES["both"], 2)


def test_a_plan_reads_what_its_tensors_hold_now() -> None:
    """The same plan after other contents were written into the tensors that it was made of, as a
    replay does."""
    old, new = (
        step(LAYOUTS["values"], lengths, torch.float32, seed)
        for seed, lengths in enumerate(([30, 9], [6, 29]))
    )
    given = [old.plan.tables, old.plan.lengths, old.plan.positions]
    at = old._replace(plan=DecodePlan(*given[:2], [30], given[2]))
    before = decode(at, SCALES["window"], 2).out
    written = [*given, at.queries, *at.pages[:3]]
    for mine, theirs in zip(
        written,
        [new.plan.tables, new.plan.lengths, new.plan.positions, new.queries, *new.pages[:3]],
        strict=True,
    ):
        mine[: len(theirs)] = theirs
    got, expected = decode(at, SCALES["window"], 2), judge(new, SCALES["window"])
    close(got.out, expected.out)
    assert not torch.allclose(got.out, before)
    assert got.probs is not None and expected.probs is not None
    close(got.probs[:, :, :29], expected.probs)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
@pytest.mark.parametrize("codec", [None, *CODECS.values()], ids=["auto", *CODECS])
def test_a_graph_replays(codec: Codec | None) -> None:
    at, other = (step(LAYOUTS["four"], [30, 30], torch.float16, seed) for seed in (3, 4))
    if codec is not None:
        at, other = coded(at, codec), coded(other, codec)
    decode(at, SCALES["both"], 4)  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode(at, SCALES["both"], 4)
    for mine, new in zip(at.pages, other.pages, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    at.plan.tables.copy_(other.plan.tables)
    at.plan.lengths.copy_(other.plan.lengths - 7)
    at.plan.positions.copy_(other.plan.positions)
    at.queries.copy_(other.queries)
    graph.replay()
    plan = DecodePlan(other.plan.tables, other.plan.lengths - 7, [23], other.plan.positions)
    close(got.out, judge(other._replace(plan=plan), SCALES["both"]).out, torch.float16)


# --- one request ---------------------------------------------------------------------------------

#: Not "below" over all heads: those that hold different tokens have no count in common.
REDUCES = [
    (heads, rows)
    for heads in ("mean", "max", "kv_mean", "kv_max")
    for rows in ("mean", "sum", "max", "below")
    if rows != "below" or heads.startswith("kv")
]


class Text(NamedTuple):
    """Queries of one request and its entries, older ones in any order, head by head."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    q_pos: Tensor
    k_pos: Tensor


def text(layout: Layout, new: int, held: int, dtype: torch.dtype = torch.float32) -> Text:
    """Dropped tokens leave gaps; keys and values are strided, as views of pages are."""
    generator = torch.Generator().manual_seed(held)
    old = torch.stack(
        [torch.randperm(held + 5, generator=generator)[:held] for _ in range(layout.kv_heads)]
    )
    fresh = torch.arange(held + 5, held + 5 + 2 * new, 2)
    k_pos = torch.cat([old, fresh.expand(layout.kv_heads, -1)], dim=1)
    entries = held + new
    return Text(
        random(1, new, layout.heads, layout.key_dim, dtype=dtype),
        random(2, entries, layout.kv_heads, layout.key_dim, dtype=dtype).transpose(0, 1),
        random(3, layout.kv_heads, entries + 2, layout.value_dim, dtype=dtype)[:, :entries],
        fresh.to(DEVICE),
        k_pos.to(DEVICE),
    )


@cases
@pytest.mark.parametrize("held", [0, 45])
def test_prefill(layout: Layout, scale: Scale, dtype: torch.dtype, held: int) -> None:
    at = text(layout, 23, held, dtype)
    close(TritonBackend().prefill(*at, scale), REFERENCE.prefill(*at, scale), dtype)


@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize("new", [1, 2])
@scales
def test_prefill_of_few(new: int, held: int, scale: Scale) -> None:
    at = text(LAYOUTS["four"], new, held)
    close(TritonBackend().prefill(*at, scale), REFERENCE.prefill(*at, scale))


def brute_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    most_q: int,
    most_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What ``torch.nn.attention.varlen`` says it does, for one causal sequence."""
    assert q_ends.tolist() == [0, most_q] == [0, len(queries)] and q_ends.dtype == torch.int32
    assert k_ends.tolist() == [0, most_k] == [0, len(keys)] and window_size == (-1, 0)
    assert enable_gqa == (queries.shape[1] != keys.shape[1])
    mask = torch.ones(most_q, most_k, dtype=torch.bool, device=queries.device)
    wide = [each.repeat_interleave(queries.shape[1] // keys.shape[1], 1) for each in (keys, values)]
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1),
        *(each.transpose(0, 1) for each in wide),
        attn_mask=mask.tril(most_k - most_q),
        scale=scale,
    )
    return out.transpose(0, 1)


@pytest.mark.parametrize("has_varlen", [True, False])
@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize("name", ["mha", "four"])
def test_prefill_where_flash_kernels_fit(
    name: str, held: int, has_varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls made on a GPU: through varlen, or with grouped heads and no mask."""
    given = brute_varlen if has_varlen else None
    monkeypatch.setattr(torch_flash, "_fits_flash", lambda *_: True)
    monkeypatch.setattr(torch_flash, "_find_varlen", lambda: given)
    at = text(LAYOUTS[name], 6, held)
    close(TritonBackend().prefill(*at, Scale(0.2)), REFERENCE.prefill(*at, Scale(0.2)))


def test_varlen_is_used_where_it_has_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def older(query: Tensor, is_causal: bool = False) -> Tensor:
        return query

    found: Callable[[], Any] = torch_flash._find_varlen.__wrapped__
    for function, fits in ((brute_varlen, True), (older, False)):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        assert (found() is function) == fits


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("heads,rows", REDUCES)
@pytest.mark.parametrize("name", ["mha", "three"])
def test_window_scores(name: str, kind: str, heads: Any, rows: Any) -> None:
    at, scale = text(LAYOUTS[name], 14, 20), SCALES[kind]
    window = (at.queries, at.keys, at.q_pos, at.k_pos, scale, Reduce(heads, rows, 1.5))
    got = TritonBackend(3).window_scores(*window, rows=14)
    expected = REFERENCE.window_scores(*window, rows=14)
    close(got.scores, expected.scores)
    close(got.lse, expected.lse)


@dtypes
@layouts
def test_window_scores_in_every_layout(layout: Layout, dtype: torch.dtype) -> None:
    """The last query alone, and more of them than one block holds."""
    for new in (1, 40):
        at, reduce = text(layout, new, 3, dtype), Reduce("kv_max", "mean", 2.0)
        window = (at.queries, at.keys, at.q_pos, at.k_pos, SCALES["both"], reduce)
        got = TritonBackend(3).window_scores(*window, rows=new)
        expected = REFERENCE.window_scores(*window, rows=new)
        close(got.scores, expected.scores)
        close(got.lse, expected.lse)


@pytest.mark.parametrize("rows", ["mean", "sum", "max", "below"])
def test_stored_norms_and_missing_rows(rows: Any) -> None:
    """A ring's view: few queries of a longer window, norms of the time, entries gone since and
    others that the older queries had not seen."""
    at, scale = text(LAYOUTS["three"], 9, 40), SCALES["cap"]
    full = REFERENCE.window_scores(at.queries, at.keys, at.q_pos, at.k_pos, scale, Reduce(), rows=9)
    left = torch.tensor([48, 3, 44, 0, 17, 43, 46], device=DEVICE)
    window = (at.queries, at.keys[:, left], at.q_pos, at.k_pos[:, left], scale)
    reduce = Reduce("kv_mean", rows, 1.5)
    got = TritonBackend(2).window_scores(*window, reduce, rows=12, lse=full.lse)
    expected = REFERENCE.window_scores(*window, reduce, rows=12, lse=full.lse)
    close(got.scores, expected.scores)
    close(got.lse, full.lse)
    renewed = TritonBackend(2).window_scores(*window, reduce, rows=12)
    assert rows == "below" or not torch.allclose(renewed.scores, got.scores)


def test_counts_below_an_even_share_need_heads_apart() -> None:
    """As in the reference: KV heads that hold different tokens have no count together."""
    at = text(LAYOUTS["mha"], 3, 9)
    window = (at.queries, at.keys, at.q_pos, at.k_pos, SCALES["plain"], Reduce("mean", "below"))
    for backend in (REFERENCE, TritonBackend()):
        with pytest.raises(RuntimeError):
            backend.window_scores(*window, rows=3)


@cases
def test_column_sums(layout: Layout, scale: Scale, dtype: torch.dtype) -> None:
    at = text(layout, 34, 9, dtype)
    got = TritonBackend(2).column_sums(at.queries, at.keys, at.q_pos, at.k_pos, scale)
    expected = REFERENCE.column_sums(at.queries, at.keys, at.q_pos, at.k_pos, scale)
    close(got, expected)


def test_float64_is_the_references() -> None:
    at, backend = text(LAYOUTS["values"], 5, 4, torch.float64), TritonBackend()
    scale, reduce = SCALES["both"], Reduce("kv_max")
    seen = (at.queries, at.keys, at.q_pos, at.k_pos, scale)
    decoding = step(LAYOUTS["values"], [9, 4], torch.float64)
    pairs = [
        (backend.prefill(*at, scale), REFERENCE.prefill(*at, scale)),
        (backend.column_sums(*seen), REFERENCE.column_sums(*seen)),
        (decode(decoding, scale, 2).out, judge(decoding, scale).out),
        (
            backend.window_scores(*seen, reduce, rows=5).scores,
            REFERENCE.window_scores(*seen, reduce, rows=5).scores,
        ),
    ]
    for got, expected in pairs:
        assert got.dtype == torch.float64 and torch.equal(got, expected)


def test_huge_logits_under_a_cap() -> None:
    at = text(LAYOUTS["mha"], 5, 4)
    at = at._replace(queries=at.queries * 1e6)
    scale = Scale(1.0, softcap=3.0)
    close(TritonBackend().prefill(*at, scale), REFERENCE.prefill(*at, scale))


# --- where it does not run -----------------------------------------------------------------------


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="splits=0"):
        TritonBackend(0)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        TritonBackend()
