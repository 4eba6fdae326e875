"""Which entries move when some are dropped: holes in front are filled from the tail."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moves", "move_entries", "plan_moves"]


class Moves(NamedTuple):
    """``source`` → ``target`` entry of ``head``, each ``[moves]``."""

    head: Tensor
    source: Tensor
    target: Tensor


def plan_moves(indices: Tensor, kept: Tensor, lengths: Tensor) -> Moves:
    """Moves that leave of every head its entries ``indices`` ``[heads, k]``, the first ``kept``
    ``[heads]`` of them, in its first slots; heads have ``lengths`` ``[heads]`` entries.

    Only entries at or beyond a head's ``kept`` move; those already in front stay where they are.
    """
    heads, most = indices.shape
    counts = torch.arange(most, device=indices.device) < kept[:, None]
    entry = torch.arange(int(lengths.max()), device=indices.device)
    stays = torch.zeros(heads, len(entry) + 1, dtype=torch.bool, device=indices.device)
    stays.scatter_(1, torch.where(counts, indices, len(entry)), True)  # the last column: nothing
    stays = stays[:, :-1] & (entry < lengths[:, None])
    if bool((stays.sum(1) != kept).any()):
        raise AssertionError("a policy returned an entry twice, or one that is not there")
    in_front = entry < kept[:, None]
    head, target = (~stays & in_front).nonzero(as_tuple=True)
    _, source = (stays & ~in_front).nonzero(as_tuple=True)  # as many per head as there are holes
    return Moves(head, source, target)


def move_entries(
    tensors: list[Tensor],
    rows: Tensor,
    head: Tensor,
    source: Tensor,
    target: Tensor,
    page_size: int,
) -> None:
    """Copy entry ``source`` over entry ``target`` of ``head`` in every tensor of a group.

    ``rows``: ``[heads, P]`` pages of the layer's entries; the moves are those of ``plan_moves``.
    """
    if tensors[0].is_cuda and find_spec("triton"):
        from pyramidinfer.cache import triton_compact

        return triton_compact.move_entries(tensors, rows, head, source, target, page_size)
    source_at = (rows[head, source // page_size], source % page_size)
    target_at = (rows[head, target // page_size], target % page_size)
    for tensor in tensors:
        tensor[target_at] = tensor[source_at]
    return None
