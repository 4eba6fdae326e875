"""Evictions that follow a rule (``Best``), in the C++ kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from torch import Tensor

from pyramidinfer.cache.native import kernel_number
from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.table import Ring, Table
from pyramidinfer.native.library import DTYPES, Eviction, pointer
from pyramidinfer.types import Best, Needs

__all__ = ["evict_best"]


def evict_best(
    pool: Pool,
    table: Table,
    rules: list[tuple[int, Best, Needs]],
    scales: list[Any],
    protected: Tensor,
) -> None:
    """Evict in several layers of a request at once, by their rules (``Needs.retain``).

    ``scales``: how each layer turns products into logits, if it scores with a window;
    ``protected``: bool ``[text]``.
    """
    kernels, protected = pool.kernels, protected.contiguous()
    assert kernels is not None
    calls = (Eviction * len(rules))()
    pages, kept, counts = table.pages, table.kept, table.kept.copy()
    for layer, rule, _ in rules:
        counts[layer] = rule.count
    pool.own_fronts(table, np.where(counts < kept, kept, 0))
    tensors = [
        list(map(pointer, (x.keys, x.values, x.positions, x.scores, x.key_scales, x.value_scales)))
        for x in pool.groups
    ]
    lists = [(each.ctypes.data, each.strides[0]) for each in (pages, kept, counts)]
    shields = pointer(protected)
    held: dict[int, tuple[Tensor, Tensor]] = {}  # per window: tensors that the calls point to
    for index, ((layer, rule, needs), scale) in enumerate(zip(rules, scales, strict=True)):
        spec = pool.group(layer).spec
        calls[index] = Eviction(
            *tensors[pool.group_of[layer]],
            *(start + layer * step for start, step in lists),
            shields,
            None,
            None,
            None,
            None,
            pages.shape[2],
            rule.kernel,
            rule.pool == "max",
            rule.sinks,
            table.seen_len - 1 - rule.recent,
            rule.room,
            rule.by == "running",
            len(protected),
            spec.kv_heads,
            spec.key_dim,
            spec.value_dim,
            pool.page_size,
            kernel_number(pool.group(layer)),
        )
        if rule.by == "window":
            _look_back(calls[index], table.ring, layer, needs, scale, held)
    kernels.evict_entries(DTYPES[pool.groups[0].spec.dtype], ctypes.addressof(calls), len(rules))
    pool.retract(table, counts)


def _look_back(
    call: Any,
    ring: Ring | None,
    layer: int,
    needs: Needs,
    scale: Any,
    held: dict[int, tuple[Tensor, Tensor]],
) -> None:
    """Fill in the queries by which an eviction with a window scores entries."""
    assert ring is not None
    if needs.window not in held:
        rows = ring.rows(needs.window)
        held[needs.window] = rows, ring.positions[rows]
    rows, places = held[needs.window]
    heads = ring.queries.shape[2]
    call.queries = ring.queries.data_ptr() + layer * ring.queries[0].nbytes
    call.lse, call.rows, call.query_at = map(pointer, (ring.lse[layer], rows, places))
    call.window, call.heads, call.takes_max = len(rows), heads, needs.reduce.rows == "max"
    call.scale, call.softcap = scale.scale, scale.softcap or 0.0
    call.share = call.kv_heads / (heads * needs.window)
