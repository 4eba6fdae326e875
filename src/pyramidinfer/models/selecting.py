"""Applies a policy in one layer: selects tokens for deeper layers, and entries to keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache import Pool, Table, send_away
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.models.batch import Prefill, Sequence
from pyramidinfer.models.draft_view import DraftView
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.stack import Stack
from pyramidinfer.types import Keep, Needs, Observation, Queries, View

__all__ = ["cut_layer", "joined", "joined_positions", "joined_scores", "retain", "trim"]


def cut_layer(stack: Stack, pool: Pool, prefill: Prefill) -> Tensor | None:
    """Drop entries of a layer after the whole text has passed it; returns the rows that go to
    deeper layers (None: all)."""
    sequence, needs, layer = prefill.sequence, prefill.needs, prefill.layer
    table, policy, view = sequence.table, sequence.policy, prefill.view()
    if policy.uses_scores and prefill.columns is not None:
        pool.add_scores(table, layer, prefill.columns)
    scores, columns = joined_scores(stack.ranks, prefill)
    going = None
    if needs.propagate is not None and layer < stack.depth - 1:
        seen = Observation(
            view,
            prefill.positions[None],
            sequence.is_protected(prefill.positions)[None],
            _newest(scores, prefill.length, table.lens(layer)),
            _newest(columns, prefill.length, table.lens(layer)),
            rule=needs.propagate,
            kernels=pool.kernels,
        )
        keep, table.state = policy.propagate(seen, table.state)
        going = None if keep.indices is None else keep.indices[0]
        assert going is None or int(going[-1]) == prefill.length - 1, "the last token must stay"
        assert going is None or not prefill.all_rows or len(going) == prefill.length, "scored"
    if needs.retain is not None:
        queries = None
        if prefill.moments is not None:
            own = prefill.moments.queries(stack.scale(layer).scale)
            queries = Queries(*map(stack.ranks.join_queries, own))
        retain(stack, pool, sequence, view, needs, scores, columns, queries)
    trim(stack, pool, sequence, layer, prefill.end, slack=0)
    table.state = policy.prefilled(prefill.view())
    sequence.idle = 0
    if table.away is not None:
        _send_away(pool, sequence, layer)
    if going is not None:
        prefill.positions = prefill.positions[going]
    return going


def retain(
    stack: Stack,
    pool: Pool,
    sequence: Sequence,
    view: View,
    needs: Needs,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    queries: Queries | None = None,
) -> None:
    """Show the policy a layer's entries of all ranks' heads, and keep those that it selects.
    The arguments cover all heads already."""
    table, layer, ranks = sequence.table, view.layer, stack.ranks

    def together(own: Tensor) -> Tensor:
        return ranks.join(_widened(own, view.kept_len), len(view.head_lens))

    positions = joined_positions(pool, table, layer, ranks)
    running = together(pool.scores(table, layer)) if sequence.policy.uses_scores else None
    keys = together(_wide(pool, table, layer, pool.keys)) if needs.keys else None
    values = together(_wide(pool, table, layer, pool.values)) if needs.values else None
    rotation = None
    if needs.ahead:
        spec = pool.group(layer).spec
        like = torch.empty(0, spec.key_dim, dtype=accumulate_dtype(spec.dtype), device=pool.device)
        rotation = stack.streaming.mean_rotation(like, needs.ahead, layer, sequence, view.seen_len)
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


def _send_away(pool: Pool, sequence: Sequence, layer: int) -> None:
    """Move the pages of a prompt's layer that drafts do not read to host memory, and further pages
    if more than ``Away.most`` would stay."""
    table, view, away = sequence.table, sequence.draft_view, sequence.table.away
    assert away is not None
    if not sequence.layers.governed[layer]:
        return
    whole = int(table.kept[layer].min()) // pool.page_size
    stays = np.zeros((pool.kv_heads, whole), dtype=bool)
    for head, most in enumerate(away.most[layer].tolist()):
        picks = np.arange(whole)
        if view is not None and view.later[layer, head]:
            picks = view.picks[layer, head, : view.counts[layer, head]]
        if len(picks) > most:  # the policy would keep more than its forecast
            picks = np.concatenate([picks[:1], picks[len(picks) - most + 1 :]])
        stays[head, picks] = True
    send_away(pool, table, layer, stays)


def trim(
    stack: Stack, pool: Pool, sequence: Sequence, layer: int, position: int, slack: int
) -> None:
    """Drop entries that a sliding layer cannot see from ``position`` on (if they are more than
    ``slack``)."""
    window, kept = stack.shapes[layer].window, int(sequence.table.longest[layer])
    if window is None or sequence.layers.governed[layer] or kept < window + slack:
        return
    visible = pool.positions(sequence.table, layer) > position - window
    indices = visible.nonzero(as_tuple=True)[1].view(visible.shape[0], -1)
    pool.keep(sequence.table, layer, Keep(indices))


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


def joined_scores(ranks: Ranks, prefill: Prefill) -> tuple[Tensor | None, Tensor | None]:
    """A prefill's scores and column sums of the layer it is at, of all ranks' heads."""
    table, needs = prefill.sequence.table, prefill.needs
    longest, kv_heads = int(table.longest[prefill.layer]), table.kept.shape[1]
    scores, columns = prefill.scores, prefill.columns
    if scores is not None:
        scores = joined(scores, longest, kv_heads, needs, ranks)
    if columns is not None and (needs.retain or needs.propagate):
        columns = ranks.join(_widened(columns, longest), kv_heads)
    return scores, columns


def joined(own: Tensor, longest: int, kv_heads: int, needs: Needs, ranks: Ranks) -> Tensor:
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


def _newest(tensor: Tensor | None, count: int, lens: tuple[int, ...]) -> Tensor | None:
    """Columns of each head's newest ``count`` entries, of a tensor ``[1 or kv_heads, longest]``."""
    if tensor is None or len(set(lens)) == 1:
        return None if tensor is None else tensor[:, -count:]
    ends = torch.tensor(lens, device=tensor.device)[:, None]
    return tensor.gather(1, ends - count + torch.arange(count, device=tensor.device))
