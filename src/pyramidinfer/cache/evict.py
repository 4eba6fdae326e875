"""Evictions that follow a rule (``Best``), in the C++ kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.cache.native import kernel_number
from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.table import Ring, Table
from pyramidinfer.native.library import DTYPES, Eviction, pointer
from pyramidinfer.types import Best, Needs

__all__ = ["evict_best"]

CALL = np.dtype(Eviction)
#: Fields of a call that describe how a group's entries are stored.
STORAGE = (
    "keys values positions scores key_scales value_scales kv_heads key_dim value_dim codec".split()
)
#: Fields of a call that a rule sets (``recent`` is a number of tokens here, and then becomes a
#: position).
RULE = "kernel pools_max sinks recent room running".split()


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
    pages, kept, counts = table.pages, table.kept, table.kept.copy()
    for layer, rule, _ in rules:
        counts[layer] = rule.count
    pool.own_fronts(table, np.where(counts < kept, kept, 0))
    layers = np.array([layer for layer, *_ in rules])
    calls = np.zeros(len(rules), CALL)
    for name, of_group in zip(STORAGE, _storage(pool).T, strict=True):
        calls[name] = of_group[pool.group_of[layers]]
    for name, each in (("pages", pages), ("lengths", kept), ("counts", counts)):
        calls[name] = each.ctypes.data + layers * each.strides[0]
    calls["protect"], calls["text"] = pointer(protected) or 0, len(protected)
    calls["width"], calls["page"] = pages.shape[2], pool.page_size
    facts = zip(*(_facts(rule) for _, rule, _ in rules), strict=True)
    for name, of_rules in zip(RULE, facts, strict=True):
        calls[name] = of_rules
    calls["recent"] = table.seen_len - 1 - calls["recent"]
    looking = [i for i, (_, rule, _) in enumerate(rules) if rule.by == "window"]
    held = [_look_back(calls, looking, layers, rules, scales, table.ring)] if looking else []
    kernels.evict_entries(DTYPES[pool.groups[0].spec.dtype], calls.ctypes.data, len(rules))
    del held
    pool.retract(table, counts)


def _facts(rule: Best) -> tuple[int, ...]:
    """The values of the fields ``RULE`` for a rule."""
    by_running = rule.by == "running"
    return rule.kernel, rule.pool == "max", rule.sinks, rule.recent, rule.room, by_running


def _look_back(
    calls: np.ndarray,
    looking: list[int],
    layers: np.ndarray,
    rules: list[tuple[int, Best, Needs]],
    scales: list[Any],
    ring: Ring | None,
) -> list[Tensor]:
    """Fill in the queries by which the evictions ``looking`` score entries; returns tensors that
    the calls point to."""
    assert ring is not None
    held: dict[int, tuple[Tensor, Tensor]] = {}  # per window
    mine, heads = calls[looking], ring.queries.shape[2]
    needs = [rules[index][2] for index in looking]
    for window in {each.window for each in needs}:
        rows = ring.rows(window)
        held[window] = rows, ring.positions[rows]
    at = layers[looking]
    mine["queries"] = ring.queries.data_ptr() + at * ring.queries[0].nbytes
    mine["lse"] = ring.lse.data_ptr() + at * ring.lse[0].nbytes
    mine["rows"] = [held[each.window][0].data_ptr() for each in needs]
    mine["query_at"] = [held[each.window][1].data_ptr() for each in needs]
    mine["window"] = [len(held[each.window][0]) for each in needs]
    mine["heads"], mine["takes_max"] = heads, [each.reduce.rows == "max" for each in needs]
    mine["scale"] = [scales[index].scale for index in looking]
    mine["softcap"] = [scales[index].softcap or 0.0 for index in looking]
    mine["share"] = mine["kv_heads"] / (heads * np.array([each.window for each in needs]))
    calls[looking] = mine
    return [tensor for pair in held.values() for tensor in pair]


def _storage(pool: Pool) -> np.ndarray:
    """The storage of each group, as the fields ``STORAGE`` of calls: ``[groups, fields]``."""
    return np.array(
        [
            [
                *(pointer(tensor) or 0 for tensor in _tensors(group)),
                group.spec.kv_heads,
                group.spec.key_dim,
                group.spec.value_dim,
                kernel_number(group),
            ]
            for group in pool.groups
        ],
        dtype=np.int64,
    )


def _tensors(group: Group) -> tuple[Tensor | None, ...]:
    return (
        group.keys,
        group.values,
        group.positions,
        group.scores,
        group.key_scales,
        group.value_scales,
    )
