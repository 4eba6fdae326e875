"""Timing ``Pool.keep``: half of a layer's entries stay, and the last entries fill the holes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from pyramidinfer.cache import GroupSpec, Layout, Pool
from pyramidinfer.cache.mover import Mover, Stays, plan_moves
from pyramidinfer.lab.bench.timing import synchronize

__all__ = ["time_keep"]

LAYERS = 8


def time_keep(
    kv_heads: int,
    dim: int,
    page: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    warmup: int,
    mover: Mover,
) -> tuple[list[float], list[float], int]:
    """Seconds per layer of ``keep`` and of a copy of the same size, and the bytes moved (reads plus
    writes)."""
    spec = GroupSpec(tuple(range(LAYERS)), kv_heads, dim, dim, dtype)
    pages = LAYERS * kv_heads * (-(-context // page) + 1)
    pool = Pool(Layout([spec], pages * spec.page_bytes(page, False), page), device, mover=mover)
    table = pool.new_table(context)
    generator = torch.Generator().manual_seed(0)
    kept = context // 2
    indices = [_half(kv_heads, context, kept, generator).to(device) for _ in range(LAYERS)]
    entry = 2 * dim * dtype.itemsize + 4  # keys, values, position
    stay, whole = torch.full((kv_heads,), kept), torch.full((kv_heads,), context)
    moved = entry * sum(
        len(plan_moves(each, stay.to(device), whole.to(device)).head) for each in indices
    )
    source = torch.ones(max(1, moved), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    keep: list[float] = []
    copy: list[float] = []
    for repeat in range(max(1, warmup) + repeats):
        for layer in range(LAYERS):
            pool.append(table, layer, context - int(table.longest[layer]))
        synchronize(device)
        moves = [
            Stays(table.pages[layer], indices[layer], stay.numpy(), table.kept[layer])
            for layer in range(LAYERS)
        ]
        start = time.perf_counter()
        mover.keep(pool.groups[0], moves)  # all layers at once
        synchronize(device)
        middle = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        end = time.perf_counter()
        for layer in range(LAYERS):
            pool.shrink(table, layer, kept)
        if repeat >= max(1, warmup):
            keep.append((middle - start) / LAYERS)
            copy.append((end - middle) / LAYERS)
    pool.release(table)
    return keep, copy, 2 * moved // LAYERS


def _half(kv_heads: int, context: int, kept: int, generator: torch.Generator) -> Tensor:
    """Random entries of each head, in order: ``[kv_heads, kept]``."""
    order = torch.rand(kv_heads, context, generator=generator).argsort(dim=1)[:, :kept]
    return order.sort(dim=1).values
