"""A text that is in is read again behind itself, and its cache is cut when that is over.

All layers hold the whole text meanwhile.  A reading goes through them like any further text, but
what it leaves in a layer is dropped as soon as the policy has seen what its queries looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidinfer.cache import Pool
from pyramidinfer.models.batch import Prefill
from pyramidinfer.models.evicting import joined_scores, retain
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.streaming import Streaming

__all__ = ["cut", "end_layer"]


def end_layer(pool: Pool, prefill: Prefill, streaming: Streaming, ranks: Ranks) -> None:
    """Tell the policy what a reading gave the entries of a layer, and forget the reading's own."""
    sequence, needs, layer = prefill.sequence, prefill.needs, prefill.layer
    table = sequence.table
    before = table.kept[layer] - prefill.length
    found = joined_scores(pool, table, layer, needs, ranks, prefill)
    pool.shrink(table, layer, before)
    lengths = torch.from_numpy(before).to(pool.device)
    scores, columns = (_fronts(each, lengths) for each in found)
    if needs.retain is not None:
        retain(pool, sequence, prefill.view(), needs, streaming, ranks, scores, columns)


def cut(pool: Pool, prefill: Prefill, streaming: Streaming, ranks: Ranks, layers: range) -> None:
    """Once all was read, ask the policy layer by layer what stays."""
    sequence = prefill.sequence
    table, policy = sequence.table, sequence.policy
    pool.note_peak(table)
    for layer in layers:
        view = prefill.view(layer)
        needs = policy.needs(view)
        if needs.retain is not None:
            retain(pool, sequence, view, needs, streaming, ranks)
        table.state = policy.prefilled(prefill.view(layer))


def _fronts(rows: Tensor | None, lengths: Tensor) -> Tensor | None:
    """Rows ``[heads, n]`` without what is behind the first ``lengths`` of each: ``[heads,
    longest]``, 0 behind the shorter."""
    if rows is None:
        return None
    rows = rows[:, : int(lengths.max())]
    there = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return torch.where(there, rows, 0)
