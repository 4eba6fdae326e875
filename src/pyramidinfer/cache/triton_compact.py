"""Compaction on a GPU: entries of all of a group's tensors move in one launch.

Importing this module needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidinfer.cache.mover import Mover

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

    tensors : keys ``[pages, page, D]``, values ``[…, V]``, positions ``[pages, page]`` and, where
    there are any, scores (``Group.tensors()``);  rows : ``[K, P]`` pages of the layer's entries;
    head, source, target : ``[moves]``.  No entry may be a source and a target.
    """
    keys, values, positions = tensors[:3]
    scores = tensors[3] if len(tensors) == 4 else positions
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
            block=BLOCK,
            scored=len(tensors) == 4,
        )


class TritonMover(Mover):
    """``Mover`` with compaction in one launch."""

    move = staticmethod(move_entries)


@triton.jit(do_not_specialize=["moves", "width"])
def _move(
    keys,
    values,
    positions,
    scores,
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
    block: tl.constexpr,
    scored: tl.constexpr,
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


@triton.jit
def _copy(storage, there, here, live, size: tl.constexpr, pad: tl.constexpr):
    """Rows of ``size`` numbers from entries ``there`` to entries ``here``, bit by bit."""
    column = tl.arange(0, pad)
    mask = live[:, None] & (column < size)[None, :]
    number = tl.load(storage + there[:, None] * size + column[None, :], mask=mask)
    tl.store(storage + here[:, None] * size + column[None, :], number, mask=mask)


#: Whether the kernel runs in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton came in).
INTERPRETED = not any(isinstance(each, triton.runtime.JITFunction) for each in (_copy, tl.sum))
