"""Asking a policy, while a request decodes, which entries of its layers stay."""

from __future__ import annotations

from torch import Tensor

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.cache import Pool, Table, evict_best
from pyramidinfer.models.intake import Sequence
from pyramidinfer.types import Needs, Observation, View

__all__ = ["evict", "observe"]


def evict(pool: Pool, sequence: Sequence, backend: Backend, scales: list[Scale | None]) -> None:
    """Every layer whose eviction is due; rules said beforehand are carried out together."""
    table, policy = sequence.table, sequence.policy
    first = int(table.kept[sequence.layers.first])
    rules: list[tuple[int, Needs]] = []
    for layer in range(sequence.layers.count):
        view = View(
            "decode", layer, sequence.layers, sequence.prompt_len, 1, int(table.kept[layer]), first,
            table.seen_len, table.state,
        )  # fmt: skip
        needs = policy.needs(view)
        if not needs.evict:
            continue
        if needs.best is not None and pool.evicts_best(needs, pool.group(layer).spec.dtype):
            rules.append((layer, needs))
            continue
        scores = None
        if needs.window:
            scale = scales[layer]
            assert scale is not None
            scores = _ring_scores(pool, table, layer, needs, backend, scale)
        keep, table.state = policy.evict(observe(pool, sequence, view, scores, None), table.state)
        if keep.indices is not None:
            pool.keep(table, layer, keep.indices)
    if rules:
        evict_best(pool, table, rules, [scales[layer] for layer, _ in rules], sequence.protected)
    sequence.idle = policy.idle_steps(
        table.kept.tolist(), sequence.prompt_len, sequence.layers, table.state
    )


def observe(pool: Pool, sequence: Sequence, view: View, scores: Tensor | None,
            columns: Tensor | None) -> Observation:  # fmt: skip
    """A layer's entries as its policy sees them."""
    positions = pool.positions(sequence.table, view.layer)
    running = None
    if sequence.policy.uses_scores:
        running = pool.scores(sequence.table, view.layer)
    return Observation(
        view, positions, sequence.is_protected(positions), scores, columns, running
    )  # fmt: skip


def _ring_scores(pool: Pool, table: Table, layer: int, needs: Needs, backend: Backend,
                 scale: Scale) -> Tensor:  # fmt: skip
    """Weights that the ring's newest queries gave, ``[1 or K, kept]``; 0 where not wanted."""
    assert table.ring is not None
    queries, lse, positions = table.ring.newest(layer, needs.window)
    keys, k_pos = pool.keys(table, layer), pool.positions(table, layer)
    kept, wanted = keys.shape[1], None
    if needs.among is not None:
        wanted = k_pos[0].argsort()[slice(*needs.among)]
        keys, k_pos = keys[:, wanted], k_pos[:, wanted]
    scores = backend.window_scores(
        queries, keys, positions, k_pos, scale, needs.reduce, rows=needs.window, lse=lse
    ).scores
    if wanted is None:
        return scores
    return scores.new_zeros(len(scores), kept).index_copy_(1, wanted, scores)
