"""A prefilled text is read again after itself, and its cache is cut at the end of the readings.

All layers hold the whole text until then.  A reading goes through them like any further text, but
its entries in a layer are dropped as soon as the policy has seen the attention of its queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidinfer.cache import Pool
from pyramidinfer.models.batch import Prefill
from pyramidinfer.models.selecting import joined_scores, retain
from pyramidinfer.models.stack import Stack

__all__ = ["cut", "end_layer"]


def end_layer(stack: Stack, pool: Pool, prefill: Prefill) -> None:
    """Give the policy a reading's scores of a layer's entries, and remove the reading's own
    entries."""
    sequence, needs, layer = prefill.sequence, prefill.needs, prefill.layer
    table = sequence.table
    before = table.kept[layer] - prefill.length
    found = joined_scores(stack.ranks, prefill)
    pool.shrink(table, layer, before)
    lengths = torch.from_numpy(before).to(pool.device)
    scores, columns = (_fronts(each, lengths) for each in found)
    if needs.retain is not None:
        retain(stack, pool, sequence, prefill.view(), needs, scores, columns)


def cut(stack: Stack, pool: Pool, prefill: Prefill) -> None:
    """After all readings, let the policy select the entries that stay, layer by layer."""
    sequence = prefill.sequence
    table, policy = sequence.table, sequence.policy
    pool.note_peak(table)
    for layer in stack.stages.own:
        view = prefill.view(layer)
        needs = policy.needs(view)
        if needs.retain is not None:
            retain(stack, pool, sequence, view, needs)
        table.state = policy.prefilled(prefill.view(layer))


def _fronts(rows: Tensor | None, lengths: Tensor) -> Tensor | None:
    """Rows ``[heads, n]`` cut to the first ``lengths`` of each: ``[heads, longest]``, padded with
    0."""
    if rows is None:
        return None
    rows = rows[:, : int(lengths.max())]
    there = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return torch.where(there, rows, 0)
