"""Asking a policy, while a request decodes, which entries of its layers stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.attention import Backend, Scale, ragged
from pyramidinfer.cache import Pool, Table, evict_best
from pyramidinfer.models.batch import Sequence
from pyramidinfer.models.routing import runs_of
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.types import Best, Needs, Observation, Queries, View

__all__ = ["evict", "retain"]

FOREVER = 1 << 40  # tokens


def evict(
    pool: Pool,
    sequence: Sequence,
    backend: Backend,
    scales: list[Scale | None],
    streaming: Streaming,
    at_once: bool = False,
) -> None:
    """Every layer whose eviction is due; rules that the kernels know are carried out together.

    ``at_once``: no head may gather entries beyond what it is held to.
    """
    table, policy = sequence.table, sequence.policy
    first = int(table.kept[sequence.layers.first].max())
    rules: list[tuple[int, Best, Needs]] = []
    due = _room(sequence) < (policy.slack if at_once else 0)
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
            scores = _ring_scores(pool, table, layer, needs, backend, scale)
        retain(pool, sequence, view, needs, streaming, scores)
    if rules:
        evict_best(pool, table, rules, [scales[layer] for layer, *_ in rules], sequence.protected)
    sequence.idle = max(0, int(_room(sequence).min()))


def _room(sequence: Sequence) -> np.ndarray:
    """Entries that may still come, ``[layers]``, until a layer's eviction is due (below 0)."""
    kept, layers, policy = sequence.table.kept, sequence.layers, sequence.policy
    room = policy.ceiling(kept, sequence.table.state, layers) + policy.slack - kept
    return np.where(layers.governed, room.min(1), FOREVER)


def retain(
    pool: Pool,
    sequence: Sequence,
    view: View,
    needs: Needs,
    streaming: Streaming,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    queries: Queries | None = None,
) -> None:
    """Show the policy a layer's entries, ask it what stays, and keep that."""
    table, layer = sequence.table, view.layer
    positions = pool.positions(table, layer)
    running = pool.scores(table, layer) if sequence.policy.uses_scores else None
    keys = _wide(pool, table, layer, pool.keys) if needs.keys else None
    values = _wide(pool, table, layer, pool.values) if needs.values else None
    rotation = None
    if needs.ahead:
        spec = pool.group(layer).spec
        like = torch.empty(0, spec.key_dim, dtype=_widest(spec.dtype), device=pool.device)
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
    pool.keep(table, layer, keep)


def _widest(dtype: torch.dtype) -> torch.dtype:
    """float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def _wide(
    pool: Pool, table: Table, layer: int, read: Callable[[Table, int, slice], Tensor]
) -> Tensor:
    """Keys or values ``[kv_heads, longest, dim]`` in float32 or wider, 0 behind a shorter head."""
    parts = [(heads, read(table, layer, heads)) for heads in pool.runs(table, layer)]
    first, longest = parts[0][1], int(table.longest[layer])
    out = first.new_zeros(pool.kv_heads, longest, first.shape[-1], dtype=_widest(first.dtype))
    for heads, part in parts:
        out[heads, : part.shape[1]] = part
    return out


def _ring_scores(
    pool: Pool, table: Table, layer: int, needs: Needs, backend: Backend, scale: Scale
) -> Tensor:
    """Weights that the ring's newest queries gave, ``[1 or K, longest]``; 0 where not wanted."""
    assert table.ring is not None
    queries, lse, positions = table.ring.newest(layer, needs.window)
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
    kept = int(table.longest[layer])
    return scores.new_zeros(len(scores), kept).index_copy_(1, wanted, scores)
