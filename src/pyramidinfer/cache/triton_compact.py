"""Compaction on a GPU: entries of all of a group's tensors move in one launch.

With a codec, entries are also written in one launch and read in one (``triton_entries.py``).

Importing this module needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.cache.mover import Mover, Slots, upload
from pyramidinfer.cache.triton_entries import read_entries, write_entries

__all__ = ["INTERPRETED", "TritonMover", "move_entries"]

#: Moves of one program.
BLOCK = 8


def move_entries(
    tensors: list[Tensor],
    rows: Tensor,
    head: Tensor,
    source: Tensor,
    target: Tensor,
    page_size: int,
) -> None:
    """Copy entry ``source`` over entry ``target`` of ``head``, in place, for every move.

    tensors : keys ``[pages, page, D]``, values ``[…, V]``, positions ``[pages, page]`` and, if
    there are any, scores, and scales of keys and of values ``[pages, page, groups]``
    (``Group.tensors()``);  rows : ``[K, P]`` pages of the layer's entries;  head, source, target :
    ``[moves]``.  No entry may be both a source and a target.
    """
    keys, values, positions = tensors[:3]
    scored, coded = len(tensors) in (4, 6), len(tensors) >= 5
    scores = tensors[3] if scored else positions
    key_scales, value_scales = tensors[-2:] if coded else (keys, values)
    moves = target.shape[0]
    if not moves:
        return
    assert all(each.is_contiguous() for each in (*tensors, rows, head, source, target))
    widest = max(keys.shape[-1], values.shape[-1])
    with torch.cuda.device_of(keys):
        _move[(triton.cdiv(moves, BLOCK),)](
            keys,
            values,
            positions,
            scores,
            key_scales,
            value_scales,
            rows,
            head,
            source,
            target,
            moves,
            rows.shape[1],
            page_size=page_size,
            key_dim=keys.shape[-1],
            value_dim=values.shape[-1],
            pad=triton.next_power_of_2(widest),
            key_groups=key_scales.shape[-1],
            value_groups=value_scales.shape[-1],
            block=BLOCK,
            scored=scored,
            coded=coded,
        )


class TritonMover(Mover):
    """``Mover`` that compacts in one launch and, with a codec, writes and reads in one launch each;
    torch encodes and decodes float64."""

    move = staticmethod(move_entries)

    def write(
        self, group: Group, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
    ) -> None:
        if group.spec.codec is None or keys.dtype == torch.float64:
            return super().write(group, slots, keys, values, positions)
        write_entries(group, slots, keys, values, positions)

    def decode(
        self, group: Group, storage: Tensor, scales: Tensor, pages: np.ndarray, kept: int
    ) -> Tensor:
        codec, dtype = group.spec.codec, group.spec.dtype
        if codec is None or dtype == torch.float64:
            return super().decode(group, storage, scales, pages, kept)
        return read_entries(codec, storage, scales, upload(pages, storage.device), kept, dtype)


@triton.jit(do_not_specialize=["moves", "width"])
def _move(
    keys,
    values,
    positions,
    scores,
    key_scales,
    value_scales,
    rows,
    head,
    source,
    target,
    moves,
    width,
    page_size: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    pad: tl.constexpr,
    key_groups: tl.constexpr,
    value_groups: tl.constexpr,
    block: tl.constexpr,
    scored: tl.constexpr,
    coded: tl.constexpr,
):
    move = tl.program_id(0) * block + tl.arange(0, block)
    live = move < moves
    kv = tl.load(head + move, mask=live, other=0).to(tl.int64)
    entry = tl.load(source + move, mask=live, other=0)
    hole = tl.load(target + move, mask=live, other=0)
    row = rows + kv * width
    page = tl.load(row + entry // page_size, mask=live, other=0).to(tl.int64)
    there = page * page_size + entry % page_size
    page = tl.load(row + hole // page_size, mask=live, other=0).to(tl.int64)
    here = page * page_size + hole % page_size
    _copy(keys, there, here, live, key_dim, pad)
    _copy(values, there, here, live, value_dim, pad)
    tl.store(positions + here, tl.load(positions + there, mask=live, other=0), mask=live)
    if scored:
        tl.store(scores + here, tl.load(scores + there, mask=live, other=0.0), mask=live)
    if coded:
        _copy(key_scales, there, here, live, key_groups, pad)
        _copy(value_scales, there, here, live, value_groups, pad)


@triton.jit
def _copy(storage, there, here, live, size: tl.constexpr, pad: tl.constexpr):
    """Copy rows of ``size`` numbers from entries ``there`` to entries ``here``, bit for bit."""
    column = tl.arange(0, pad)
    mask = live[:, None] & (column < size)[None, :]
    number = tl.load(storage + there[:, None] * size + column[None, :], mask=mask)
    tl.store(storage + here[:, None] * size + column[None, :], number, mask=mask)


#: Whether the kernel runs in Triton's interpreter (``TRITON_INTERPRET=1`` was set before Triton was
#: imported).
INTERPRETED = not any(isinstance(each, triton.runtime.JITFunction) for each in (_copy, tl.sum))
