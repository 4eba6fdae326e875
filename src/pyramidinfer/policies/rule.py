"""Rules (``types.Best``) in torch, or with kernels where the backend has them.

The reference for ``native/evict.h``, which does the same for all layers of a request at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.native.library import Kernels, pointer
from pyramidinfer.types import Best, Keep, Observation

__all__ = ["best_entries", "choose", "pool_neighbours"]


def choose(
    seen: Observation, own: Callable[[Observation], Tensor], goes_deeper: bool = False
) -> Keep:
    """The entries of a layer that ``seen.rule`` keeps; ``own`` computes the policy's own scores.

    ``goes_deeper``: the tokens that enter the next layer instead, by the largest score of any head.
    """
    rule, seen_len = seen.rule, seen.view.seen_len
    assert isinstance(rule, Best), "the policy asks to be called and does not override the method"
    found = {"window": seen.scores, "running": seen.slot_scores}.get(rule.by)
    if rule.by == "own":
        found = own(seen)
    elif rule.by == "new":
        found = (seen.positions - seen_len).float()
    assert found is not None, f"a rule by {rule.by!r} needs these scores to be observed"
    if goes_deeper:
        found = found.amax(0, keepdim=True)
    found = pool_neighbours(found, seen.positions, rule.kernel, rule.pool, seen.kernels)
    rows, size = found.shape
    positions, lens = seen.positions[:rows], seen.view.head_lens[:rows]
    if goes_deeper:
        lens = (size,)
    always = (positions < rule.sinks) | (positions > seen_len - 1 - rule.recent)
    always &= positions >= 0
    counts = torch.as_tensor(rule.count).expand(rows)
    if rule.safeguard is not None:
        counts = _own_counts(found, always, lens, int(counts[0]), rule.safeguard)
    forced = always | seen.protected[:rows]
    indices, counts = _best(
        found, counts, forced, positions, torch.tensor(lens), seen.kernels, rule.room
    )
    same = bool((counts == indices.shape[1]).all())
    return Keep(indices, None if same else counts)


def _own_counts(
    scores: Tensor,
    always: Tensor,
    lens: Sequence[int],
    count: int,
    safeguard: float,
) -> Tensor:
    """Entries per head, ``[kv_heads]``: those that always stay, plus the head's part of the
    layer's best, but at least the safeguard's share of the rest."""
    heads, fixed = len(scores), int(always[0].sum())
    even = count - fixed
    lengths = torch.tensor(lens, device=scores.device)
    there = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    context = torch.where(there & ~always, scores, -torch.inf)
    best = context.flatten().topk(min(heads * even, int(there.sum()))).indices
    won = torch.bincount(best // scores.shape[1], minlength=heads).cpu()
    own = (1 - safeguard) * won + safeguard * even
    return fixed + own.round().long()


def best_entries(
    scores: Tensor,
    count: int,
    forced: Tensor,
    positions: Tensor | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Indices ``[heads, max(count, forced)]`` of the highest scores, ascending.

    ``scores`` and ``forced`` (entries that always stay) are ``[heads, n]``.  Of equal scores the
    earlier entry wins: by ``positions`` in the text, if the cache is not in order.
    ``kernels``: as in an observation.
    """
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    lengths = torch.full((heads,), size)
    return _best(scores, torch.full((heads,), count), forced, positions, lengths, kernels)[0]


def _best(
    scores: Tensor,
    counts: Tensor,
    forced: Tensor,
    positions: Tensor | None,
    lengths: Tensor,
    kernels: Kernels | None = None,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices ``[heads, k]``, and the number of valid ones per head (``[heads]``, on the host)."""
    if kernels is not None and scores.dtype == torch.float32:
        return _best_native(kernels, scores, counts, forced, positions, lengths, room)
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    there = torch.arange(size) < lengths[:, None]
    forced = forced.expand(heads, size) & there.to(forced.device)
    must = torch.where(counts < lengths, forced.sum(-1).cpu() + room, 0)
    counts = torch.minimum(counts.clamp(min=int(must.max())), lengths)
    ranked = torch.where(forced, torch.inf, scores)
    ranked = torch.where(there.to(ranked.device), ranked, -torch.inf)
    places = -torch.arange(size, device=ranked.device)[None] if positions is None else -positions
    places = torch.where(there.to(ranked.device), places, -(2**62))  # missing entries come last
    by_age = places.expand_as(ranked).argsort(dim=-1, descending=True, stable=True)
    best = ranked.gather(1, by_age).argsort(dim=-1, descending=True, stable=True)
    best = by_age.gather(1, best)[:, : int(counts.max())]
    beyond = (torch.arange(best.shape[1]) >= counts[:, None]).to(best.device)
    best = torch.where(beyond, size, best).sort(-1).values
    return torch.where(beyond, 0, best), counts


def _best_native(
    kernels: Kernels,
    scores: Tensor,
    counts: Tensor,
    forced: Tensor,
    positions: Tensor | None,
    lengths: Tensor,
    room: int,
) -> tuple[Tensor, Tensor]:
    heads, size = max(scores.shape[0], forced.shape[0]), scores.shape[1]
    scores, forced = (each.expand(heads, size).contiguous() for each in (scores, forced))
    places = None if positions is None else positions.expand(heads, size).long().contiguous()
    out, counts = torch.empty(heads * size, dtype=torch.int64), counts.long().clone()
    found = kernels.best_entries(
        pointer(scores),
        pointer(forced),
        pointer(places),
        pointer(lengths),
        heads,
        size,
        pointer(counts),
        room,
        pointer(out),
    )
    return out[: heads * found].view(heads, found), counts


def pool_neighbours(
    scores: Tensor, positions: Tensor, kernel: int, how: str, kernels: Kernels | None = None
) -> Tensor:
    """Each score replaced by the ``"mean"`` or ``"max"`` of it and its neighbours in the text.

    scores ``[heads, n]``, positions ``[heads, n]`` or ``[1, n]`` in any order; ``kernel`` is odd.
    Neighbours are the nearest entries in the cache; beyond both ends a mean counts zeros.
    ``kernels``: as in an observation.
    """
    if kernel == 1 or scores.shape[1] < 2:
        return scores
    if kernels is not None and scores.dtype == torch.float32:
        scores, places = scores.contiguous(), positions.long().contiguous()
        out, row = torch.empty_like(scores), places.shape[1] if places.shape[0] > 1 else 0
        kernels.pool_neighbours(
            pointer(scores), pointer(places), row, *scores.shape, kernel, how == "max", pointer(out)
        )
        return out
    order = positions.expand(scores.shape[0], -1).argsort(1)
    sorted_scores = scores.gather(1, order)[:, None]
    if how == "max":
        pooled = F.max_pool1d(sorted_scores, kernel, 1, kernel // 2)
    else:
        pooled = F.avg_pool1d(sorted_scores, kernel, 1, kernel // 2)
    return torch.empty_like(scores).scatter_(1, order, pooled[:, 0])
