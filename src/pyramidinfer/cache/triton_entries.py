"""Entries stored by a codec on a GPU: one launch writes them, one launch reads them.

Importing this module needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.cache.mover import Slots
from pyramidinfer.codec import Codec
from pyramidinfer.triton_codec import load_rotated, rotate, store_rotated

__all__ = ["read_entries", "write_entries"]

#: Entries per program; matrix products need at least 16 rows.
BLOCK = 16
#: Rotations keep the precision of float32.
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def write_entries(
    group: Group, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
) -> None:
    """``Mover.write`` for a group with a codec; keys and values must not be float64."""
    count, kv_heads = keys.shape[:2]
    if not count:
        return
    assert group.spec.codec is not None
    keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
    pages, offsets, positions = (each.contiguous() for each in (*slots, positions))
    scores = group.positions if group.scores is None else group.scores
    with torch.cuda.device_of(keys):
        _write[(triton.cdiv(count * kv_heads, BLOCK),)](
            keys,
            values,
            positions,
            pages,
            offsets,
            group.keys,
            group.values,
            group.key_scales,
            group.value_scales,
            group.positions,
            scores,
            count * kv_heads,
            *keys.stride()[:2],
            *values.stride()[:2],
            kv_heads=kv_heads,
            page_size=group.keys.shape[1],
            **_sizes("key", keys.shape[2], group.spec.codec),
            **_sizes("value", values.shape[2], group.spec.codec),
            block=BLOCK,
            scored=group.scores is not None,
            codec=group.spec.codec.kernel,
            precision=PRECISION,
        )


def read_entries(
    codec: Codec, storage: Tensor, scales: Tensor, pages: Tensor, kept: int, dtype: torch.dtype
) -> Tensor:
    """``Mover.decode``: ``[heads, kept, size]`` of keys or values; pages ``[heads, P]``.

    ``dtype`` must not be float64.
    """
    size = storage.shape[2] * 8 // codec.bits
    out = torch.empty(len(pages), kept, size, dtype=dtype, device=storage.device)
    if kept:
        pages = pages.contiguous()
        with torch.cuda.device_of(storage):
            _read[triton.cdiv(kept, BLOCK), len(pages)](
                storage,
                scales,
                pages,
                out,
                kept,
                pages.shape[1],
                page_size=storage.shape[1],
                **_sizes("", size, codec),
                block=BLOCK,
                codec=codec.kernel,
                precision=PRECISION,
            )
    return out


def _sizes(name: str, size: int, codec: Codec) -> dict[str, Any]:
    """Compile-time sizes of a kernel: a head's size, padded to a power of two, and its groups'."""
    pad, ahead = max(16, triton.next_power_of_2(size)), f"{name}_" if name else ""
    return {f"{ahead}size": size, f"{ahead}pad": pad, f"{ahead}group": codec.group(size)}


@triton.jit(do_not_specialize=["count", "key_step", "key_head", "value_step", "value_head"])
def _write(
    keys,
    values,
    positions,
    pages,
    offsets,
    key_codes,
    value_codes,
    key_scales,
    value_scales,
    held_positions,
    scores,
    count,
    key_step,
    key_head,
    value_step,
    value_head,
    kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    key_size: tl.constexpr,
    key_pad: tl.constexpr,
    key_group: tl.constexpr,
    value_size: tl.constexpr,
    value_pad: tl.constexpr,
    value_group: tl.constexpr,
    block: tl.constexpr,
    scored: tl.constexpr,
    codec: tl.constexpr,
    precision: tl.constexpr,
):
    """keys ``[n, K, D]`` and values by strides, slots ``[n, K]``.  Grid ``[blocks of n · K]``."""
    number = tl.program_id(0) * block + tl.arange(0, block)
    live = number < count
    step, head = (number // kv_heads).to(tl.int64), number % kv_heads
    page = tl.load(pages + number, mask=live, other=0).to(tl.int64)
    slot = page * page_size + tl.load(offsets + number, mask=live, other=0)
    key = _load(keys, step * key_step + head * key_head, live, key_size, key_pad)
    key = rotate(key, key_group, codec, False, precision)
    store_rotated(key_codes, key_scales, slot, live, key, key_size, key_pad, key_group, codec)
    value = _load(values, step * value_step + head * value_head, live, value_size, value_pad)
    value = rotate(value, value_group, codec, False, precision)
    store_rotated(
        value_codes, value_scales, slot, live, value, value_size, value_pad, value_group, codec
    )
    position = tl.load(positions + step, mask=live, other=0).to(tl.int32)
    tl.store(held_positions + slot, position, mask=live)
    if scored:
        tl.store(scores + slot, tl.zeros([block], tl.float32), mask=live)


@triton.jit(do_not_specialize=["kept", "width"])
def _read(
    codes,
    scales,
    pages,
    out,
    kept,
    width,
    page_size: tl.constexpr,
    size: tl.constexpr,
    pad: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
    codec: tl.constexpr,
    precision: tl.constexpr,
):
    """pages ``[heads, width]`` → out ``[heads, kept, size]``.  Grid ``[blocks of kept, heads]``."""
    head = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * block + tl.arange(0, block)
    live = entry < kept
    page = tl.load(pages + head * width + entry // page_size, mask=live, other=0).to(tl.int64)
    slot = page * page_size + entry % page_size
    number = load_rotated(codes, scales, slot, live, size, pad, group, codec)
    number = rotate(number, group, codec, True, precision)
    column = tl.arange(0, pad)
    at = (head * kept + entry)[:, None] * size + column[None, :]
    tl.store(out + at, number, mask=live[:, None] & (column < size)[None, :])


@triton.jit
def _load(pointer, at, live, size: tl.constexpr, pad: tl.constexpr):
    """Rows of ``size`` numbers that begin at ``at`` ``[n]`` → ``[n, pad]``, 0 elsewhere."""
    column = tl.arange(0, pad)
    mask = live[:, None] & (column < size)[None, :]
    return tl.load(pointer + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
