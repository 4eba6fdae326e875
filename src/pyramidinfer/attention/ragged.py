"""Attention over KV heads that hold different numbers of entries: in runs of heads of equal length.

If all heads have the same length, there is one run, and nothing is copied or split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyramidinfer.attention.base import Backend, Scale, Scored, ScoredPrefill
from pyramidinfer.types import Reduce

__all__ = ["Run", "attend", "attend_scored", "column_sums", "window_scores"]


class Run(NamedTuple):
    """KV heads ``heads`` of equal length: keys ``[k, m, D]``, values ``[k, m, V]`` (None
    if only scores are needed), positions ``[k, m]``."""

    heads: slice
    keys: Tensor
    values: Tensor | None
    positions: Tensor

    def of(self, queries: Tensor, kv_heads: int) -> Tensor:
        """The queries ``[n, H, ...]`` of these heads' groups."""
        group = queries.shape[1] // kv_heads
        return queries[:, self.heads.start * group : self.heads.stop * group]


def attend(
    backend: Backend, runs: list[Run], queries: Tensor, q_pos: Tensor, scale: Scale
) -> Tensor:
    """``Backend.prefill``: ``[n, H, V]``."""
    total, outs = runs[-1].heads.stop, []
    for run in runs:
        assert run.values is not None
        mine = run.of(queries, total)
        outs.append(backend.prefill(mine, run.keys, run.values, q_pos, run.positions, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def attend_scored(
    prefill: ScoredPrefill,
    runs: list[Run],
    queries: Tensor,
    q_pos: Tensor,
    scale: Scale,
    reduce: Reduce,
    ramp: Tensor,
) -> tuple[Tensor, Scored]:
    """``Backend.prefill_scored``; scores are 0 past the end of a shorter head."""
    _check(runs, reduce)
    total, found = runs[-1].heads.stop, []
    for run in runs:
        assert run.values is not None
        mine = run.of(queries, total)
        found.append(prefill(mine, run.keys, run.values, q_pos, run.positions, scale, reduce, ramp))
    if len(found) == 1:
        return found[0]
    out = torch.cat([each for each, _ in found], dim=1)
    return out, _joined([scored for _, scored in found])


def window_scores(
    backend: Backend,
    runs: list[Run],
    queries: Tensor,
    q_pos: Tensor,
    scale: Scale,
    reduce: Reduce,
    *,
    rows: int,
    lse: Tensor | None = None,
) -> Scored:
    """``Backend.window_scores``; scores are 0 past the end of a shorter head."""
    _check(runs, reduce)
    total, found = runs[-1].heads.stop, []
    for run in runs:
        mine, norms = run.of(queries, total), None if lse is None else run.of(lse, total)
        found.append(
            backend.window_scores(
                mine, run.keys, q_pos, run.positions, scale, reduce, rows=rows, lse=norms
            )
        )
    return found[0] if len(found) == 1 else _joined(found)


def column_sums(
    backend: Backend, runs: list[Run], queries: Tensor, q_pos: Tensor, scale: Scale
) -> Tensor:
    """``Backend.column_sums``: ``[K, longest]``, 0 past the end of a shorter head."""
    total = runs[-1].heads.stop
    return _stacked(
        [
            backend.column_sums(run.of(queries, total), run.keys, q_pos, run.positions, scale)
            for run in runs
        ]
    )


def _check(runs: list[Run], reduce: Reduce) -> None:
    """``ValueError`` if one row of scores is requested but the heads hold different tokens."""
    if len(runs) > 1 and not reduce.heads.startswith("kv"):
        raise ValueError(
            f"Reduce(heads={reduce.heads!r}) gives one score per token for all heads, but these "
            f"heads hold different numbers of tokens: ask for 'kv_mean' or 'kv_max'"
        )


def _joined(found: list[Scored]) -> Scored:
    return Scored(
        _stacked([each.scores for each in found]), torch.cat([each.lse for each in found], dim=1)
    )


def _stacked(rows: list[Tensor]) -> Tensor:
    """Stack the rows of several runs, padded with 0."""
    if len(rows) == 1:
        return rows[0]
    longest = max(each.shape[1] for each in rows)
    out = rows[0].new_zeros(sum(map(len, rows)), longest)
    at = 0
    for each in rows:
        out[at : at + len(each), : each.shape[1]] = each
        at += len(each)
    return out
