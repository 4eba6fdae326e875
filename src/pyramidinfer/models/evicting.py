"""Evictions during decode: the policy selects the entries of each layer that stay."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pyramidinfer.attention import ragged
from pyramidinfer.cache import Pool, Table, evict_best
from pyramidinfer.models.batch import Sequence
from pyramidinfer.models.routing import runs_of
from pyramidinfer.models.selecting import joined, retain
from pyramidinfer.models.stack import Stack
from pyramidinfer.types import Best, Needs, View

__all__ = ["evict"]

FOREVER = 1 << 40  # tokens


def evict(stack: Stack, pool: Pool, sequence: Sequence, at_once: bool = False) -> None:
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
            stack.ranks.check(needs)
            scores = _ring_scores(stack, pool, table, layer, needs)
            scores = joined(scores, view.kept_len, len(view.head_lens), needs, stack.ranks)
        retain(stack, pool, sequence, view, needs, scores)
    if rules:
        evict_best(
            pool, table, rules, [stack.scales[layer] for layer, *_ in rules], sequence.protected
        )
    sequence.idle = max(0, int(_room(sequence, pool.own_layers).min()))


def _room(sequence: Sequence, own: range) -> np.ndarray:
    """Number of further entries, ``[layers]``, until an eviction of a layer in ``own`` is due
    (below 0)."""
    kept, layers, policy = sequence.table.kept, sequence.layers, sequence.policy
    room = policy.ceiling(kept, sequence.table.state, layers) + policy.slack - kept
    asked = np.array(layers.governed)
    asked[: own.start] = asked[own.stop :] = False
    return np.where(asked, room.min(1), FOREVER)


def _ring_scores(
    stack: Stack,
    pool: Pool,
    table: Table,
    layer: int,
    needs: Needs,
) -> Tensor:
    """Attention weights of the ring's newest queries, ``[1 or K, longest]``; 0 if not needed."""
    assert table.ring is not None
    queries, lse, positions = table.ring.newest(layer, needs.window)
    queries, lse = (stack.ranks.all_readers(each, table.kept.shape[1]) for each in (queries, lse))
    runs, wanted = runs_of(pool, table, layer, values=False), None
    if needs.among is not None:
        assert len(runs) == 1, "entries by rank of age are the same tokens in every head"
        (run,) = runs
        wanted = run.positions[0].argsort()[slice(*needs.among)]
        runs = [run._replace(keys=run.keys[:, wanted], positions=run.positions[:, wanted])]
    scores = ragged.window_scores(
        stack.backend,
        runs,
        queries,
        positions,
        stack.scale(layer),
        needs.reduce,
        rows=needs.window,
        lse=lse,
    ).scores
    if wanted is None:
        return scores
    kept = int(pool.lens(table)[layer].max())
    return scores.new_zeros(len(scores), kept).index_copy_(1, wanted, scores)
