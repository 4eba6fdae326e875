"""Writing, compacting and gathering a group's entries, in plain torch.

Versions with kernels: ``native.py`` (C++) and ``triton_compact.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.native import Kernels

__all__ = ["Mover", "Moves", "Slots", "Stays", "plan_moves", "put", "upload"]


class Slots(NamedTuple):
    """Where new entries go: ``pages`` and ``offsets``, each ``[n, kv_heads]`` (one group)."""

    pages: Tensor
    offsets: Tensor


class Stays(NamedTuple):
    """A layer's pages ``[kv_heads, P]``, indices ``[1 or kv_heads, k]``, the number of valid
    indices and the number of entries, both ``[kv_heads]``."""

    pages: np.ndarray
    indices: Tensor
    kept: np.ndarray
    lengths: np.ndarray


class Moves(NamedTuple):
    """``source`` → ``target`` entry of ``head``, each ``[moves]``."""

    head: Tensor
    source: Tensor
    target: Tensor


class Mover:
    """Operations on entries in a pool's storage.

    kernels : C++ kernels that also select entries and carry out whole evictions, or None.
    """

    kernels: Kernels | None = None

    def write(
        self, group: Group, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
    ) -> None:
        """Store keys ``[n, kv_heads, key_dim]``, values and positions ``[n]`` in slots."""
        put(group, group.keys, group.key_scales, slots, keys)
        put(group, group.values, group.value_scales, slots, values)
        group.positions[slots] = positions.to(torch.int32)[:, None]
        if group.scores is not None:
            group.scores[slots] = 0.0

    def keep(self, group: Group, layers: list[Stays]) -> None:
        """In every layer, move the entries that stay to the first slots of each head."""
        device, page = group.keys.device, group.keys.shape[1]
        for pages, indices, kept, lengths in layers:
            indices = indices.expand(len(pages), -1).to(device)
            moves = plan_moves(indices, upload(kept, device), upload(lengths, device))
            if len(moves.head):
                self.move(group.tensors(), upload(pages, device), *moves, page)

    def move(
        self,
        tensors: list[Tensor],
        rows: Tensor,
        head: Tensor,
        source: Tensor,
        target: Tensor,
        page_size: int,
    ) -> None:
        """Copy entry ``source`` over entry ``target`` of ``head`` in every tensor of a group, for
        ``Moves``.  rows : ``[heads, P]`` pages of the layer's entries."""
        source_at = (rows[head, source // page_size], source % page_size)
        target_at = (rows[head, target // page_size], target % page_size)
        for tensor in tensors:
            tensor[target_at] = tensor[source_at]

    def gather(self, storage: Tensor, pages: np.ndarray, kept: int) -> Tensor:
        """``[heads, kept, ...]`` of one tensor of a group, slot by slot; pages ``[heads, P]``."""
        held = -(-kept // storage.shape[1])
        return storage[upload(pages[:, :held], storage.device)].flatten(1, 2)[:, :kept]

    def decode(
        self, group: Group, storage: Tensor, scales: Tensor, pages: np.ndarray, kept: int
    ) -> Tensor:
        """``gather`` for keys or values that are stored by a codec."""
        codes, steps = (self.gather(each, pages, kept) for each in (storage, scales))
        assert group.spec.codec is not None
        return group.spec.codec.decode(codes, steps, group.spec.dtype)


def put(group: Group, storage: Tensor, scales: Tensor | None, at: Any, numbers: Tensor) -> None:
    """Store a group's keys or values in the slots of an index."""
    if scales is None:
        storage[at] = numbers
    else:
        assert group.spec.codec is not None
        storage[at], scales[at] = group.spec.codec.encode(numbers)


def plan_moves(indices: Tensor, kept: Tensor, lengths: Tensor) -> Moves:
    """Moves after which every head's first slots hold the first ``kept`` ``[heads]`` of its entries
    ``indices`` ``[heads, k]``; heads have ``lengths`` ``[heads]`` entries.

    Only entries at or beyond a head's ``kept`` move; earlier entries stay in their slots.
    """
    heads, most = indices.shape
    counts = torch.arange(most, device=indices.device) < kept[:, None]
    entry = torch.arange(int(lengths.max()), device=indices.device)
    stays = torch.zeros(heads, len(entry) + 1, dtype=torch.bool, device=indices.device)
    stays.scatter_(1, torch.where(counts, indices, len(entry)), True)  # last: padding
    stays = stays[:, :-1] & (entry < lengths[:, None])
    if bool((stays.sum(1) != kept).any()):
        raise AssertionError("a policy returned an entry twice, or an entry that does not exist")
    in_front = entry < kept[:, None]
    head, target = (~stays & in_front).nonzero(as_tuple=True)
    _, source = (stays & ~in_front).nonzero(as_tuple=True)  # per head, as many sources as holes
    return Moves(head, source, target)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of integers as a tensor of int64."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
