"""``bench kernels``: attention and compaction alone, compared with simple work of the same size.

Every kernel is timed in turns with its reference: decode and window scores with a read of the same
bytes, compaction with a copy of the same size, prefill and column sums with torch's fused
attention. ``share`` is the reference's time divided by the kernel's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.attention.base import DecodePlan, Pages
from pyramidinfer.attention.cpu import CPUBackend
from pyramidinfer.cache.mover import Mover
from pyramidinfer.config import parse_device, parse_dtype
from pyramidinfer.lab.bench.compaction import time_keep
from pyramidinfer.lab.bench.machine import Roof, measure_roof, plain_read
from pyramidinfer.lab.bench.plans import KernelPlan
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.bench.timing import side_by_side, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.device import choose_device
from pyramidinfer.native.library import DTYPES
from pyramidinfer.types import Reduce

__all__ = ["KernelPlan", "all_heads_alike", "decode_work", "run_kernels"]

HEADS = ((16, 16), (16, 4))  # query heads, KV heads
DIM = 64
WINDOW = 32  # queries that a policy scores
UNEQUAL, SHORT = 0.2, 64  # mean share of a context in heads; maximum of short heads
LAYERS = 1024  # maximum number of layers read in turns, so that CPU caches do not hold them


class Work(NamedTuple):
    """A kernel and its reference; ``size`` in bytes, ``flops`` if they are the limit."""

    head: dict[str, Any]
    against: str
    kernel: Callable[[int], object]
    other: Callable[[int], object]
    size: int
    flops: float | None = None
    layers: int = 1  # layers per call; size and flops are those of one layer


def run_kernels(plan: KernelPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    device, dtype = parse_device(plan.device), parse_dtype(plan.dtype, None)
    chosen = choose_device(plan.backend, device, dtype)
    backend = chosen.attention
    roof = measure_roof(dtype, device, size=2 * plan.storage)
    rows: list[dict[str, Any]] = []
    total = len(HEADS) * len(plan.contexts) * (2 * len(plan.batches) + 4)
    with progress("kernels", total) as done, torch.inference_mode():
        for heads in HEADS:
            for work in _works(plan, backend, heads, device, dtype):
                rows.append(_measure(work, plan, device, roof))
                done(" ".join(str(value) for value in work.head.values()))
            for context in plan.contexts:
                rows.append(_keep_row(plan, chosen.mover, heads, context, device, dtype))
                done(f"keep {context}")
    result = {"backend": backend.name, "roof": roof.figures(), "rows": rows}
    write_result(out, asdict(plan), result)
    return result


def _measure(work: Work, plan: KernelPlan, device: torch.device, roof: Roof) -> dict[str, Any]:
    works = {"kernel": work.kernel, "other": work.other}
    seconds = side_by_side(works, device, plan.repeats, plan.warmup)
    mine, other = (
        spread([each / work.layers for each in seconds[name]]) for name in ("kernel", "other")
    )
    rate = None if work.flops is None else work.flops / mine["median"]
    return {
        **work.head,
        "seconds": mine,
        "against": work.against,
        "against_seconds": other,
        "share": other["median"] / mine["median"],
        "bytes": work.size,
        "bytes_per_second": work.size / mine["median"],
        "share_of_read_bandwidth": work.size / mine["median"] / roof.read,
        "flops": work.flops,
        "share_of_matrix_rate": None if rate is None else rate / roof.matrix,
    }


def _works(
    plan: KernelPlan,
    backend: Backend,
    heads: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Work]:
    _, kv_heads = heads
    entry = 2 * kv_heads * DIM * dtype.itemsize
    page = plan.page_size
    pages = max(max(plan.batches) * -(-max(plan.contexts) // page), plan.storage // entry // page)
    shape = (pages * kv_heads, page, DIM)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    positions = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    storage = Pages(keys, values, positions)
    for context in plan.contexts:
        for batch in plan.batches:
            yield decode_work(backend, heads, storage, batch, context)
            yield unequal_work(backend, heads, storage, batch, context)
        yield from _prompt_works(backend, heads, context, device, dtype)


def decode_work(
    backend: Backend,
    heads: tuple[int, int],
    storage: Pages,
    batch: int,
    context: int,
    like: Tensor | None = None,
) -> Work:
    """One token of each request over its pages, layer after layer, as in a decode step.

    like : of the queries' size and dtype, by default the keys; required for quantized entries.
    """
    lens = [context] * heads[1]
    layers = _layers_in(storage, batch, lens)
    run, used = _decode(backend, heads, storage, batch, lens, layers, like)

    def read() -> object:
        return plain_read(storage.keys[:used]), plain_read(storage.values[:used])

    return Work(
        _head("decode", heads, batch, context),
        "read",
        lambda _: run(),
        lambda _: read(),
        _bytes(storage, batch, lens),
        layers=layers,
    )


def unequal_work(
    backend: Backend, heads: tuple[int, int], storage: Pages, batch: int, context: int
) -> Work:
    """Decode attention with heads that hold a fifth of the context on average (some all of it, the
    others only the newest), compared with heads that hold a fifth each."""
    kv_heads, few = heads[1], min(SHORT, context // 10)
    left, lens = round(UNEQUAL * context * kv_heads) - few * kv_heads, []
    for _ in range(kv_heads):
        lens.append(few + min(left, context - few))
        left -= lens[-1] - few
    even = [sum(lens) // kv_heads] * kv_heads
    layers = min(_layers_in(storage, batch, each) for each in (lens, even))
    run, _ = _decode(backend, heads, storage, batch, lens, layers)
    other, _ = _decode(backend, heads, storage, batch, even, layers)
    return Work(
        _head("decode, unequal heads", heads, batch, context),
        "equal heads",
        lambda _: run(),
        lambda _: other(),
        _bytes(storage, batch, lens),
        layers=layers,
    )


def all_heads_alike(
    backend: Backend, heads: tuple[int, int], storage: Pages, batch: int, context: int, like: Tensor
) -> Callable[[], object]:
    """One token of each request over its pages, in every layer that fits in the storage.

    like : of the queries' size and dtype.
    """
    lens = [context] * heads[1]
    layers = _layers_in(storage, batch, lens)
    return _decode(backend, heads, storage, batch, lens, layers, like)[0]


def _bytes(storage: Pages, batch: int, lens: list[int]) -> int:
    """Bytes of keys and values of one layer, including scales of quantized entries."""
    parts = storage.keys, storage.values, storage.key_scales, storage.value_scales
    entry = sum(each.shape[2] * each.dtype.itemsize for each in parts if each is not None)
    return batch * sum(lens) * entry


def _layers_in(storage: Pages, batch: int, lens: list[int]) -> int:
    """Layers that the storage holds, so that each one is read from memory."""
    pages = sum(-(-length // storage.keys.shape[1]) for length in lens)
    return max(1, min(LAYERS, len(storage.keys) // (batch * pages)))


def _decode(
    backend: Backend,
    heads: tuple[int, int],
    storage: Pages,
    batch: int,
    lens: list[int],
    layers: int,
    like: Tensor | None = None,
) -> tuple[Callable[[], object], int]:
    """Decode attention of all layers, for requests whose KV heads have these lengths, and the pages
    that they hold.  like : of the queries' size and dtype, by default the keys."""
    like = storage.keys if like is None else like
    page, size = storage.keys.shape[1], like.shape[-1]
    device, longest = storage.keys.device, max(lens)
    held = torch.tensor([-(-length // page) for length in lens])
    used = layers * batch * int(held.sum())
    owned = torch.arange(int(held.max())) < held[:, None]
    tables = torch.zeros(layers, batch, *owned.shape, dtype=torch.int32)
    tables[owned.expand_as(tables)] = torch.arange(used, dtype=torch.int32)
    lengths = torch.tensor(lens).expand(layers, batch, -1).contiguous()
    newest = torch.full((batch,), longest - 1, dtype=torch.int64, device=device)
    plan = DecodePlan(tables.to(device), lengths.to(device), [longest] * layers, newest)
    queries = torch.randn(batch, heads[0], size, device=device).to(like.dtype)
    return _all_layers(backend, plan, layers, queries, storage, Scale(size**-0.5)), used


def _all_layers(
    backend: Backend, plan: DecodePlan, layers: int, queries: Tensor, storage: Pages, scale: Scale
) -> Callable[[], object]:
    """Decode attention of all layers; in C++ with one call, as in the engine's decode step."""
    if not isinstance(backend, CPUBackend) or queries.dtype not in DTYPES:
        return lambda: [
            backend.run(plan, layer, queries, storage, scale) for layer in range(layers)
        ]
    made = [backend.call(plan, layer, queries, storage, scale) for layer in range(layers)]
    calls = (type(made[0][1]) * layers)(*(call for _, call in made))
    kind, address = DTYPES[queries.dtype], ctypes.addressof(calls)
    held = made, calls, plan, queries  # tensors that the calls point to
    return lambda: (held, backend.kernels.decode_attention(kind, address, layers))


def _prompt_works(
    backend: Backend, heads: tuple[int, int], context: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Work]:
    """Window scores, column sums and prefill attention of one prompt."""
    queries = torch.randn(context, heads[0], DIM, device=device).to(dtype)
    keys, values = (torch.randn(heads[1], context, DIM, device=device).to(dtype) for _ in range(2))
    place = torch.arange(context, device=device)
    k_pos, scale = place.expand(heads[1], -1), Scale(DIM**-0.5)
    window = min(WINDOW, context)
    reduce = Reduce(heads="kv_mean")
    yield Work(
        _head("window scores", heads, 1, context),
        "read",
        lambda _: backend.window_scores(
            queries[-window:], keys, place[-window:], k_pos, scale, reduce, rows=window
        ),
        lambda _: plain_read(keys),
        keys.nbytes,
        2.0 * window * heads[0] * DIM * context,
    )
    pairs = heads[0] * context * (context + 1) / 2

    def fused(_: int) -> Tensor:
        return F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            is_causal=True,
            enable_gqa=heads[0] != heads[1],
        )

    size = queries.nbytes + keys.nbytes
    yield Work(
        _head("column sums", heads, 1, context),
        "fused attention",
        lambda _: backend.column_sums(queries, keys, place, k_pos, scale),
        fused,
        size,
        2.0 * DIM * pairs,
    )
    yield Work(
        _head("prefill", heads, 1, context),
        "fused attention",
        lambda _: backend.prefill(queries, keys, values, place, k_pos, scale),
        fused,
        size + values.nbytes + queries.nbytes,
        4.0 * DIM * pairs,
    )


def _keep_row(
    plan: KernelPlan,
    mover: Mover,
    heads: tuple[int, int],
    context: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    keep, copy, size = time_keep(
        heads[1],
        DIM,
        plan.page_size,
        context,
        device,
        dtype,
        plan.repeats,
        plan.warmup,
        mover,
    )
    mine, other = spread(keep), spread(copy)
    return {
        **_head("keep half", heads, 1, context),
        "seconds": mine,
        "against": "copy",
        "against_seconds": other,
        "share": other["median"] / mine["median"],
        "bytes": size,
        "bytes_per_second": size / mine["median"],
        "share_of_read_bandwidth": None,
        "flops": None,
        "share_of_matrix_rate": None,
    }


def _head(kernel: str, heads: tuple[int, int], batch: int, context: int) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "heads": heads[0],
        "kv_heads": heads[1],
        "batch": batch,
        "context": context,
    }
