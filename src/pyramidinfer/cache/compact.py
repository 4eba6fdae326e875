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


def plan_moves(indices: Tensor, length: int) -> Moves:
    """Moves that leave the entries ``indices`` ``[heads, k]`` of ``length`` in the first k slots.

    Only entries at or beyond k move; those already in front stay where they are.
    """
    heads, kept = indices.shape
    stays = torch.zeros(heads, length, dtype=torch.bool, device=indices.device)
    stays.scatter_(1, indices, True)
    if int(stays.sum()) != heads * kept:
        raise AssertionError("a policy returned the same entry twice")
    head, target = (~stays[:, :kept]).nonzero(as_tuple=True)
    _, source = stays[:, kept:].nonzero(as_tuple=True)  # as many per head as there are holes
    return Moves(head, source + kept, target)


def move_entries(tensors: list[Tensor], row: Tensor, head: Tensor, source: Tensor, target: Tensor,
                 page_size: int) -> None:  # fmt: skip
    """Copy entry ``source`` over entry ``target`` of ``head`` in every tensor of a group.

    ``row``: ``[P]`` pages of the layer's entries; the moves are those of ``plan_moves``.
    """
    if tensors[0].is_cuda and find_spec("triton"):
        from pyramidinfer.cache import triton_compact

        return triton_compact.move_entries(tensors, row, head, source, target, page_size)
    source_at = (row[source // page_size], head, source % page_size)
    target_at = (row[target // page_size], head, target % page_size)
    for tensor in tensors:
        tensor[target_at] = tensor[source_at]
    return None
