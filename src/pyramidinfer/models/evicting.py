"""Evictions during decode: the policy selects the entries of each layer that stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.attention import Backend, Scale, ragged
from pyramidinfer.cache import Pool, Table, evict_best
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.models.batch import Prefill, Sequence
from pyramidinfer.models.draft_view import DraftView
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.routing import runs_of
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.types import Best, Needs, Observation, Queries, View

__all__ = ["evict", "joined_positions", "joined_scores", "retain"]

FOREVER = 1 << 40  # tokens


def evict(
    pool: Pool,
    sequence: Sequence,
    backend: Backend,
    scales: list[Scale | None],
    streaming: Streaming,
    ranks: Ranks,
    at_once: bool = False,
) -> None:
    """Evict in every layer that is due; rules that the kernels support are carried out together.

    ``at_once``: no head may exceed its budget in the meantime.
    """
    table, policy = sequence.table, sequence.policy
    first = int(table.kept[sequence.layers.first].max())
    rules: list[tuple[int, Best, Needs]] = []
    due = _room(sequence, pool.own_layers) < (policy.slack if at_once else 0)
    for layer in due.nonzero()[0].tolist():
        view = View(
            "decode",
            layer,
            sequence.layers,
            sequence.prompt_len,
            1,
            table.lens(layer),
            first,
            table.seen_len,
            table.state,
        )
        needs = policy.needs(view)
        if needs.retain is None:
            continue
        if needs.retain is not True and pool.evicts_best(needs, pool.group(layer).spec.dtype):
            rules.append((layer, needs.retain, needs))
            continue
        scores = None
        if needs.window:
            scale = scales[layer]
            assert scale is not None
            ranks.check(needs)
            scores = _ring_scores(pool, table, layer, needs, backend, scale, ranks)
            scores = _joined(scores, view.kept_len, len(view.head_lens), needs, ranks)
        retain(pool, sequence, view, needs, streaming, ranks, scores)
    if rules:
        evict_best(pool, table, rules, [scales[layer] for layer, *_ in rules], sequence.protected)
    sequence.idle = max(0, int(_room(sequence, pool.own_layers).min()))


def _room(sequence: Sequence, own: range) -> np.ndarray:
    """Number of further entries, ``[layers]``, until an eviction of a layer in ``own`` is due
    (below 0)."""
    kept, layers, policy = sequence.table.kept, sequence.layers, sequence.policy
    room = policy.ceiling(kept, sequence.table.state, layers) + policy.slack - kept
    asked = np.array(layers.governed)
    asked[: own.start] = asked[own.stop :] = False
    return np.where(asked, room.min(1), FOREVER)


def retain(
    pool: Pool,
    sequence: Sequence,
    view: View,
    needs: Needs,
    streaming: Streaming,
    ranks: Ranks,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    queries: Queries | None = None,
) -> None:
    """Show the policy a layer's entries of all ranks' heads, and keep those that it selects.
    The arguments cover all heads already."""
    table, layer = sequence.table, view.layer

    def joined(own: Tensor) -> Tensor:
        return ranks.join(_widened(own, view.kept_len), len(view.head_lens))

    positions = joined_positions(pool, table, layer, ranks)
    running = joined(pool.scores(table, layer)) if sequence.policy.uses_scores else None
    keys = joined(_wide(pool, table, layer, pool.keys)) if needs.keys else None
    values = joined(_wide(pool, table, layer, pool.values)) if needs.values else None
    rotation = None
    if needs.ahead:
        spec = pool.group(layer).spec
        like = torch.empty(0, spec.key_dim, dtype=accumulate_dtype(spec.dtype), device=pool.device)
        rotation = streaming.mean_rotation(like, needs.ahead, layer, sequence, view.seen_len)
    seen = Observation(
        view,
        positions,
        sequence.is_protected(positions),
        scores,
        columns,
        running,
        keys,
        values,
        queries,
        rotation,
        needs.retain,
        pool.kernels,
    )
    keep, table.state = sequence.policy.retain(seen, table.state)
    if keep.for_drafts:
        view_of = sequence.draft_view = sequence.draft_view or DraftView(*table.kept.shape)
        view_of.note(layer, keep, table.kept[layer], pool.page_size, view.seen_len)
        return
    pool.keep(table, layer, keep)


def joined_positions(pool: Pool, table: Table, layer: int, ranks: Ranks) -> Tensor:
    """``Pool.positions`` of all ranks' heads, ``[kv_heads, longest]``."""
    own = pool.positions(table, layer)
    if ranks.size == 1:
        return own
    longest = int(table.longest[layer])
    wide = -1 - torch.arange(longest, dtype=torch.int32, device=own.device)
    wide = wide.expand(len(own), -1).clone()
    wide[:, : own.shape[1]] = own
    return ranks.join(wide, table.kept.shape[1]).long()


def joined_scores(
    pool: Pool, table: Table, layer: int, needs: Needs, ranks: Ranks, prefill: Prefill
) -> tuple[Tensor | None, Tensor | None]:
    """A prefill's scores and column sums of the layer it is at, of all ranks' heads."""
    longest, kv_heads = int(table.longest[layer]), table.kept.shape[1]
    scores, columns = prefill.scores, prefill.columns
    if scores is not None:
        scores = _joined(scores, longest, kv_heads, needs, ranks)
    if columns is not None and (needs.retain or needs.propagate):
        columns = ranks.join(_widened(columns, longest), kv_heads)
    return scores, columns


def _joined(own: Tensor, longest: int, kv_heads: int, needs: Needs, ranks: Ranks) -> Tensor:
    """Window scores of this rank's heads → of all of them, ``[1 or kv_heads, longest]``."""
    if needs.reduce.heads.startswith("kv"):
        return ranks.join(_widened(own, longest), kv_heads)
    return ranks.over_heads(own, needs.reduce.heads)


def _widened(rows: Tensor, longest: int) -> Tensor:
    """Rows ``[heads, n, ...]`` padded with 0, ``[heads, longest, ...]``."""
    if rows.shape[1] == longest:
        return rows
    out = rows.new_zeros(len(rows), longest, *rows.shape[2:])
    out[:, : rows.shape[1]] = rows
    return out


def _wide(
    pool: Pool, table: Table, layer: int, read: Callable[[Table, int, slice], Tensor]
) -> Tensor:
    """Keys or values ``[kv_heads, longest, dim]`` in float32 or wider, 0 past the end of a shorter
    head."""
    parts = [(heads, read(table, layer, heads)) for heads in pool.runs(table, layer)]
    first, longest = parts[0][1], int(pool.lens(table)[layer].max())
    out = first.new_zeros(
        pool.kv_heads, longest, first.shape[-1], dtype=accumulate_dtype(first.dtype)
    )
    for heads, part in parts:
        out[heads, : part.shape[1]] = part
    return out


def _ring_scores(
    pool: Pool,
    table: Table,
    layer: int,
    needs: Needs,
    backend: Backend,
    scale: Scale,
    ranks: Ranks,
) -> Tensor:
    """Attention weights of the ring's newest queries, ``[1 or K, longest]``; 0 if not needed."""
    assert table.ring is not None
    queries, lse, positions = table.ring.newest(layer, needs.window)
    queries, lse = (ranks.all_readers(each, table.kept.shape[1]) for each in (queries, lse))
    runs, wanted = runs_of(pool, table, layer, values=False), None
    if needs.among is not None:
        assert len(runs) == 1, "entries by rank of age are the same tokens in every head"
        (run,) = runs
        wanted = run.positions[0].argsort()[slice(*needs.among)]
        runs = [run._replace(keys=run.keys[:, wanted], positions=run.positions[:, wanted])]
    scores = ragged.window_scores(
        backend, runs, queries, positions, scale, needs.reduce, rows=needs.window, lse=lse
    ).scores
    if wanted is None:
        return scores
    kept = int(pool.lens(table)[layer].max())
    return scores.new_zeros(len(scores), kept).index_copy_(1, wanted, scores)
