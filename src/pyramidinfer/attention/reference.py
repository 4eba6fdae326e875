"""Attention in plain torch: the reference for all other backends.

Weights are computed in float32 (float64 for float64 models).  Entries that a query must not see
are masked, and masked values are set to zero before weighting, because a freed entry may hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.attention.base import Attended, DecodePlan, Pages, Scale, Scored
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.types import Reduce

__all__ = ["ReferenceBackend"]

#: Maximum logits per block (elements): no full matrix, and passes over a block hit the CPU caches.
BLOCK = 1 << 20


class ReferenceBackend:
    """See :class:`pyramidinfer.attention.base.Backend` for shapes."""

    name = "reference"
    prefill_scored: Any = None

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
        requests, heads, _ = queries.shape
        kv_heads, size = plan.tables.shape[2], pages.keys.shape[1]
        high, longest = accumulate_dtype(queries.dtype), plan.longest[layer]
        rows = plan.tables[layer, :, :, : -(-longest // size)].long()

        def gather(storage: Tensor) -> Tensor:  # → [R, K, entries, ...]
            return storage[rows].flatten(2, 3)[:, :, :longest]

        entry = torch.arange(longest, device=queries.device)
        seen = entry < plan.lengths[layer, :, :, None]  # [R, K, entries]
        if scale.window is not None:
            oldest = plan.positions - scale.window
            seen = seen & (gather(pages.positions) > oldest[:, None, None])

        def numbers(storage: Tensor, scales: Tensor | None) -> Tensor:
            if pages.codec is None or scales is None:
                return gather(storage).to(high)
            return pages.codec.decode(gather(storage), gather(scales), high)

        keys = numbers(pages.keys, pages.key_scales)
        values = numbers(pages.values, pages.value_scales).masked_fill_(~seen[..., None], 0.0)
        grouped = queries.to(high).view(requests, kv_heads, heads // kv_heads, -1)
        logits = _logits(grouped, keys, scale).masked_fill_(~seen[:, :, None], float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse[..., None])
        out = torch.matmul(weights, values).flatten(1, 2).to(queries.dtype)
        return Attended(out, lse.flatten(1), weights.sum(2) if probs else None)

    def prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        new, entries = queries.shape[0], keys.shape[1]
        far = scale.window is not None and int(q_pos[-1] - k_pos.min()) >= scale.window
        if scale.softcap is None and not far:
            mask = None
            if entries > new:
                entry = torch.arange(entries, device=keys.device)
                mask = entry <= torch.arange(entries - new, entries, device=keys.device)[:, None]
            group = queries.shape[1] // keys.shape[0]
            wide_keys, wide_values = (
                each.repeat_interleave(group, dim=0)[None] for each in (keys, values)
            )
            out = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                wide_keys,
                wide_values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale.scale,
            )
            return out[0].transpose(0, 1)
        high = accumulate_dtype(queries.dtype)
        outs = []
        for rows in _blocks(new, queries.shape[1] * entries):
            weights = self._weights(queries[rows], keys, q_pos[rows], k_pos, scale, None)[0]
            out = torch.matmul(weights, values.to(high)[:, None])  # [K, G, rows, V]
            outs.append(out.flatten(0, 1).transpose(0, 1).to(queries.dtype))
        return torch.cat(outs)

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
        window, heads, _ = queries.shape
        kv_heads, entries = keys.shape[0], keys.shape[1]
        high = accumulate_dtype(queries.dtype)
        ramp = torch.linspace(1.0, reduce.newest_weight, rows, dtype=high, device=queries.device)
        ramp = ramp[rows - window :]
        wide = kv_heads if reduce.heads.startswith("kv") else 1
        total = torch.zeros(wide, entries, dtype=high, device=queries.device)
        lses = []
        for part in _blocks(window, heads * entries):
            given = None if lse is None else lse[part]
            weights, found = self._weights(
                queries[part], keys, q_pos[part], k_pos, scale, given
            )  # [K, G, rows, m]
            lses.append(found)
            weights = weights.flatten(0, 1)[None] if wide == 1 else weights
            linear = reduce.heads.endswith("mean") and reduce.rows in ("mean", "sum")
            if linear:  # one pass: a product
                total += torch.matmul(ramp[part], weights).mean(1)
                continue
            over_heads = weights.amax(1) if reduce.heads.endswith("max") else weights.mean(1)
            if reduce.rows == "below":  # visible to the query, with hardly any weight
                seen = k_pos[:, None] <= q_pos[part, None]
                # Slightly below the even weight: a query that sees one entry gives it 1, up to
                # rounding.
                even = (1 - 1e-5) / (q_pos[part, None] + 1).to(high)
                total += ((over_heads < even) & seen).sum(1)
                continue
            over_heads *= ramp[part, None]
            if reduce.rows == "max":
                total = torch.maximum(total, over_heads.amax(1))
            else:
                total += over_heads.sum(1)
        if reduce.rows == "mean":
            total /= rows
        return Scored(total, torch.cat(lses))

    def column_sums(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        high = accumulate_dtype(queries.dtype)
        total = torch.zeros(keys.shape[:2], dtype=high, device=keys.device)
        old = keys.shape[1] - len(queries)  # the rest are the queries' own, in order
        for part in _blocks(len(queries), queries.shape[1] * keys.shape[1]):
            end = old + part.stop  # entries that the newest query of this block can see
            logits = self._masked(queries[part], keys[:, :end], q_pos[part], k_pos[:, :end], scale)
            total[:, :end] += torch.softmax(logits, dim=-1).sum((1, 2))
        return total

    def _weights(
        self,
        queries: Tensor,
        keys: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        lse: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention weights ``[K, G, n, m]`` and their log-sum-exps ``[n, H]``."""
        logits = self._masked(queries, keys, q_pos, k_pos, scale)
        if lse is None:
            weights = torch.softmax(logits, dim=-1)
            norm = logits.amax(-1) - weights.amax(-1).log()  # the largest is exp(top - norm)
        else:
            norm = lse.to(logits.dtype).T.reshape(logits.shape[:3])
            weights = logits.sub_(norm[..., None]).exp_()
        return weights, norm.flatten(0, 1).T

    def _masked(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        """Logits ``[K, G, n, m]``, -inf for entries that a query does not see."""
        new, heads, _ = queries.shape
        kv_heads, high = keys.shape[0], accumulate_dtype(queries.dtype)
        grouped = queries.to(high).transpose(0, 1).reshape(kv_heads, heads // kv_heads, new, -1)
        logits = _logits(grouped, keys.to(high)[:, None], scale)
        # Entries older than every query need no mask; usually these are all but the last few.
        old = 0 if scale.window is not None else max(0, keys.shape[1] - new)
        if old and int(k_pos[:, :old].max()) > int(q_pos.min()):
            old = 0
        hidden = k_pos[:, None, old:] > q_pos[:, None]  # [K, n, m - old]
        if scale.window is not None:
            hidden |= k_pos[:, None] <= q_pos[:, None] - scale.window
        logits[..., old:].masked_fill_(hidden[:, None], float("-inf"))
        return logits


def _logits(queries: Tensor, keys: Tensor, scale: Scale) -> Tensor:
    logits = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale.scale)
    if scale.softcap is not None:
        logits.div_(scale.softcap).tanh_().mul_(scale.softcap)
    return logits


def _blocks(rows: int, row_size: int) -> Iterator[slice]:
    """Slices of ``rows`` rows whose logits stay below ``BLOCK`` elements."""
    step = max(1, BLOCK // max(1, row_size))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
