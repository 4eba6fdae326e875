"""Which entries move when some are dropped: holes in front are filled from the tail."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moves", "plan_moves"]


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
