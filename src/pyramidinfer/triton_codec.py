"""What Triton kernels do with keys and values that a codec stores; see ``codec.py``.

Numbers of ``n`` entries are ``[n, pad]``: a head's numbers and zeros up to a power of two.  Two
codes of 4 bits that share a byte stand side by side here, which joins and splits bytes within a
thread: *stored order* is 0, g/2, 1, g/2 + 1, … of every group of g, and a rotation by a Hadamard
matrix, whose rows and columns may come in any order, goes there and back.  Importing this module
needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from pyramidinfer.codec import CODECS

__all__ = ["load_rotated", "rotate", "store_rotated"]

INT4 = tl.constexpr(CODECS["int4"].kernel)
FP8 = tl.constexpr(CODECS["fp8"].kernel)
#: Adding and subtracting it rounds small float32 numbers, halves to even.
ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def rotate(
    x, group: tl.constexpr, codec: tl.constexpr, back: tl.constexpr, precision: tl.constexpr
):
    """``[n, pad]`` into stored order, or ``back``; n is 16 at least, as products want it."""
    count: tl.constexpr = x.shape[0]
    pad: tl.constexpr = x.shape[1]
    wide: tl.constexpr = group if group > 16 else 16  # groups that are smaller share a product
    row, column = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    same = row // group == column // group
    row, column = row % group, column % group
    if codec == INT4:
        if back:
            row = row % 2 * (group // 2) + row // 2
        else:
            column = column % 2 * (group // 2) + column // 2
    odd = row & column  # the parity of its bits (six of them at most) is the sign
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    signs = tl.where(same, 1.0 - 2.0 * odd.to(tl.float32), 0.0)
    x = tl.reshape(x, [count * pad // wide, wide])
    x = tl.dot(x, signs, input_precision=precision) * (group**-0.5)
    return tl.reshape(x, [count, pad])


@triton.jit
def load_rotated(
    codes,
    scales,
    at,
    seen,
    size: tl.constexpr,
    pad: tl.constexpr,
    group: tl.constexpr,
    codec: tl.constexpr,
):
    """Entries ``at`` ``[n]`` → float32 ``[n, pad]`` in stored order, 0 where not seen."""
    count: tl.constexpr = at.shape[0]
    if codec == INT4:
        byte = tl.arange(0, pad // 2)
        mask = seen[:, None] & (byte < size // 2)[None, :]
        code = tl.load(codes + at[:, None] * (size // 2) + byte[None, :], mask=mask, other=0)
        code = tl.reshape(tl.join(code & 15, code >> 4), [count, pad])
        number = code.to(tl.float32) - 7.5
    else:
        byte = tl.arange(0, pad)
        mask = seen[:, None] & (byte < size)[None, :]
        code = tl.load(codes + at[:, None] * size + byte[None, :], mask=mask, other=0)
        if codec == FP8:  # the bits of e4m3 in a float16 mean 2^-8 of it, subnormal ones, too
            code = code.to(tl.uint16)
            half = (code & 128) << 8 | (code & 127) << 7
            number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:
            number = code.to(tl.float32) - 127.5
    place = tl.arange(0, pad // group)
    mask = seen[:, None] & (place < size // group)[None, :]
    scale = tl.load(scales + at[:, None] * (size // group) + place[None, :], mask=mask, other=0.0)
    number = tl.reshape(number, [count, pad // group, group])
    return tl.reshape(number * scale.to(tl.float32)[:, :, None], [count, pad])


@triton.jit
def store_rotated(
    codes,
    scales,
    at,
    live,
    number,
    size: tl.constexpr,
    pad: tl.constexpr,
    group: tl.constexpr,
    codec: tl.constexpr,
):
    """Encode float32 ``[n, pad]`` in stored order as entries ``at`` ``[n]``, where live."""
    count: tl.constexpr = at.shape[0]
    top: tl.constexpr = 7.5 if codec == INT4 else 448.0 if codec == FP8 else 127.5
    number = tl.reshape(number, [count, pad // group, group])
    scale = (tl.max(tl.abs(number), 2) / top).to(tl.float16)
    place = tl.arange(0, pad // group)
    mask = live[:, None] & (place < size // group)[None, :]
    tl.store(scales + at[:, None] * (size // group) + place[None, :], scale, mask=mask)
    step = scale.to(tl.float32)
    number = number * tl.where(step > 0.0, 1.0 / tl.where(step > 0.0, step, 1.0), 0.0)[:, :, None]
    number = tl.reshape(number, [count, pad])
    if codec == FP8:
        code = _e4m3(tl.minimum(tl.maximum(number, -top), top))
    else:
        code = _round(number + top)
        code = tl.minimum(tl.maximum(code, 0.0), 2.0 * top).to(tl.int32)
    code = code.to(tl.uint8)
    if codec == INT4:
        low, high = tl.split(tl.reshape(code, [count, pad // 2, 2]))
        byte = tl.arange(0, pad // 2)
        mask = live[:, None] & (byte < size // 2)[None, :]
        tl.store(codes + at[:, None] * (size // 2) + byte[None, :], low | high << 4, mask=mask)
    else:
        byte = tl.arange(0, pad)
        mask = live[:, None] & (byte < size)[None, :]
        tl.store(codes + at[:, None] * size + byte[None, :], code, mask=mask)


@triton.jit
def _round(x):
    """To the nearest integer, halves to the even one."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _e4m3(x):
    """The bits of float8_e4m3fn of numbers within ±448, by integers: older GPUs lack the type."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 128, bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = _round(tl.abs(x) * 512.0).to(tl.int32)
    return sign | tl.where(size < (121 << 23), small, normal)
