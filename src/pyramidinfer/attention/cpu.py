"""Attention through the C++ kernels: decoding at memory bandwidth, scores without a full matrix.

There are no kernels for float64; the reference backend computes it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pyramidinfer.attention.base import Attended, DecodePlan, Pages, Scale, Scored
from pyramidinfer.attention.reference import ReferenceBackend
from pyramidinfer.native.library import (
    DTYPES,
    DecodeCall,
    DenseCall,
    WatchCall,
    kernels,
    pointer,
)
from pyramidinfer.types import Reduce

__all__ = ["CPUBackend"]

PARTS = 4  # parts of a head's watched queries

ROWS = {"mean": 0, "sum": 0, "max": 1, "below": 2}


class CPUBackend(ReferenceBackend):
    """See :class:`pyramidinfer.attention.base.Backend` for shapes.

    ``isa`` : instruction set to build for, ``"native"``; tests use others.
    ``NoCompilerError`` if the kernels cannot be built.
    """

    name = "cpu"

    def __init__(self, isa: str = "native") -> None:
        self.kernels = kernels(isa)

    def run(
        self,
        plan: DecodePlan,
        layer: int,
        queries: Tensor,
        pages: Pages,
        scale: Scale,
        *,
        probs: bool = False,
    ) -> Attended:
        if queries.dtype not in DTYPES:
            return super().run(plan, layer, queries, pages, scale, probs=probs)
        queries = queries.contiguous()
        attended, call = self.call(plan, layer, queries, pages, scale, probs)
        kind = DTYPES[queries.dtype]
        self.kernels.decode_attention(kind, ctypes.addressof(call), 1)
        return attended

    def call(
        self,
        plan: DecodePlan,
        layer: int,
        queries: Tensor,
        pages: Pages,
        scale: Scale,
        probs: bool = False,
    ) -> tuple[Attended, ctypes.Structure]:
        """The output that ``run`` fills, and the kernels' call for it (contiguous ``queries``)."""
        requests, heads, key_dim = queries.shape
        page, value_dim = pages.values.shape[1], pages.value_dim
        kv_heads, longest = plan.tables.shape[2], plan.longest[layer]
        out = queries.new_empty(requests, heads, value_dim)
        lse = queries.new_empty(requests, heads, dtype=torch.float32)
        weights = lse.new_empty(requests, kv_heads, longest) if probs else None
        table, lengths = plan.tables[layer], plan.lengths[layer]
        call = DecodeCall(
            *map(pointer, (queries, *pages[:5], table, lengths, plan.positions, out, lse, weights)),
            requests,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            page,
            table.shape[2],
            0 if pages.codec is None else pages.codec.kernel,
            longest,
            scale.window or 0,
            scale.scale,
            scale.softcap or 0.0,
        )
        return Attended(out, lse, weights), call

    def prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        if queries.dtype not in DTYPES:
            return super().prefill(queries, keys, values, q_pos, k_pos, scale)
        held, call = _dense(queries, keys, values, q_pos, k_pos, scale)
        out = queries.new_empty(*queries.shape[:2], values.shape[2])
        kind = DTYPES[queries.dtype]
        self.kernels.prefill_attention(kind, ctypes.byref(call), pointer(out), None)
        del held
        return out

    def prefill_scored(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        ramp: Tensor,
    ) -> tuple[Tensor, Scored]:
        if queries.dtype not in DTYPES:
            return self._scored_apart(queries, keys, values, q_pos, k_pos, scale, reduce, ramp)
        held, call = _dense(queries, keys, values, q_pos, k_pos, scale)
        out = queries.new_empty(*queries.shape[:2], values.shape[2])
        watched, heads, entries = len(ramp), queries.shape[1], keys.shape[1]
        ramp = ramp.float().contiguous()
        parts = min(PARTS, -(-watched // 64))  # fixed: sums must not depend on the machine
        sums, lse = ramp.new_empty(parts, heads, entries), ramp.new_empty(watched, heads)
        watch = WatchCall(len(queries) - watched, *map(pointer, (ramp, sums, lse)), parts)
        kind = DTYPES[queries.dtype]
        self.kernels.prefill_attention(kind, ctypes.byref(call), pointer(out), ctypes.byref(watch))
        del held
        wide = keys.shape[0] if reduce.heads == "kv_mean" else 1
        scores = sums.view(parts, wide, heads // wide, entries).sum((0, 2)) / (heads // wide)
        return out, Scored(scores, lse)

    def window_scores(
        self,
        queries: Tensor,
        keys: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        *,
        rows: int,
        lse: Tensor | None = None,
    ) -> Scored:
        if queries.dtype not in DTYPES:
            return super().window_scores(
                queries, keys, q_pos, k_pos, scale, reduce, rows=rows, lse=lse
            )
        window = queries.shape[0]
        ramp = torch.linspace(1.0, reduce.newest_weight, rows)[rows - window :].contiguous()
        factor = 1.0 / rows if reduce.rows == "mean" else 1.0
        per_kv_head, is_max = reduce.heads.startswith("kv"), reduce.heads.endswith("max")
        return self._score(
            queries,
            keys,
            q_pos,
            k_pos,
            scale,
            lse,
            per_kv_head,
            is_max,
            ROWS[reduce.rows],
            factor,
            ramp,
        )

    def _scored_apart(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        ramp: Tensor,
    ) -> tuple[Tensor, Scored]:
        """As in the reference: add the weights of one query after another."""
        out, each = self.prefill(queries, keys, values, q_pos, k_pos, scale), Reduce(reduce.heads)
        first, scores, lses = len(queries) - len(ramp), 0.0, []
        for row, weight in enumerate(ramp.tolist(), start=first):
            one = slice(row, row + 1)
            scored = self.window_scores(queries[one], keys, q_pos[one], k_pos, scale, each, rows=1)
            scores = scores + scored.scores * weight
            lses.append(scored.lse)
        return out, Scored(torch.as_tensor(scores), torch.cat(lses))

    def column_sums(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        if queries.dtype not in DTYPES:
            return super().column_sums(queries, keys, q_pos, k_pos, scale)
        group = queries.shape[1] / keys.shape[0]
        ramp = torch.ones(len(queries))
        scored = self._score(
            queries, keys, q_pos, k_pos, scale, None, True, False, ROWS["sum"], group, ramp
        )
        return scored.scores

    def _score(
        self,
        queries: Tensor,
        keys: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        lse: Tensor | None,
        per_kv_head: bool,
        is_max: bool,
        rows: int,
        factor: float,
        ramp: Tensor,
    ) -> Scored:
        held, call = _dense(queries, keys, keys, q_pos, k_pos, scale)
        found = ramp.new_empty(queries.shape[:2]) if lse is None else lse.float().contiguous()
        scores = ramp.new_empty(keys.shape[0] if per_kv_head else 1, keys.shape[1])
        self.kernels.score_window(
            DTYPES[queries.dtype],
            ctypes.byref(call),
            per_kv_head,
            is_max,
            rows,
            factor,
            pointer(ramp),
            lse is not None,
            pointer(found),
            pointer(scores),
        )
        del held
        return Scored(scores, found)


def _dense(
    queries: Tensor, keys: Tensor, values: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
) -> tuple[list[Tensor], ctypes.Structure]:
    """The call for one request's tensors, and the tensors that must live until it returns."""
    if queries.stride(2) != 1 or queries.stride(1) != queries.shape[2]:
        queries = queries.contiguous()
    keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (keys, values))
    q_pos = q_pos.long().contiguous()
    k_pos = k_pos.long()
    if k_pos.stride(1) != 1 and k_pos.shape[1] > 1:
        k_pos = k_pos.contiguous()
    call = DenseCall(
        *map(pointer, (queries, keys, values, q_pos, k_pos)),
        queries.stride(0),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        k_pos.stride(0) if k_pos.shape[0] > 1 else 0,
        queries.shape[0],
        keys.shape[1],
        queries.shape[1],
        keys.shape[0],
        keys.shape[2],
        values.shape[2],
        scale.window or 0,
        scale.scale,
        scale.softcap or 0.0,
    )
    return [queries, keys, values, q_pos, k_pos], call
