"""Quantized keys and values: codes, and a scale for each group of channels.

The channels of a head are split into groups (64, or the largest smaller power of two that divides
the head).  Each group is rotated by a Hadamard matrix, which spreads large values of a few channels
over all of them, and stored as codes times one scale.  The product of a rotated query with a
rotated key equals that of the original query and key.  Each entry has its own scales, so entries
can be evicted, moved and shared one by one.

Sources: rotation: QuaRot (2404.00456), llama.cpp #21038; scales per channel group and entry: values
in KIVI (2402.02750).  KIVI's scales of keys span several tokens, which eviction would separate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramidinfer.config import KV_DTYPES, accumulate_dtype, check_choice

__all__ = ["Codec", "find_codec"]

#: Channels that share a scale and are rotated together, at most and at least.
WIDEST, NARROWEST = 64, 4
#: The largest number of float8_e4m3fn.
FP8_TOP = 448.0


@dataclass(frozen=True, slots=True)
class Codec:
    """How a key or value ``[size]`` becomes codes and scales.

    A number is ``(code - (2^bits - 1) / 2) * scale`` with integer codes, ``code * scale`` with fp8.
    Two 4-bit codes share a byte: the first half of a group is in the low bits, the second half in
    the high bits.  kernel : the id of this codec in the C++ kernels.
    """

    name: str
    bits: int
    kernel: int

    @property
    def is_float(self) -> bool:
        return self.name == "fp8"

    @property
    def middle(self) -> float:
        """The code of zero: half of the largest code."""
        return ((1 << self.bits) - 1) / 2

    def group(self, size: int) -> int:
        """Channels that share a scale.  ``ValueError`` for a head size that cannot be split."""
        group = math.gcd(size, WIDEST)
        if group < NARROWEST:
            raise ValueError(
                f"kv_dtype={self.name!r} needs head sizes that are multiples of {NARROWEST}; this "
                f"model has {size}: use kv_dtype='auto'"
            )
        return group

    def code_bytes(self, size: int) -> int:
        return size * self.bits // 8

    def entry_bytes(self, size: int) -> int:
        """Bytes of a key or value of ``size`` numbers, its scales (float16) included."""
        return self.code_bytes(size) + 2 * (size // self.group(size))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., size]`` → codes uint8 ``[..., code_bytes]``, scales float16 ``[..., groups]``."""
        size = x.shape[-1]
        group = self.group(size)
        y = x.to(accumulate_dtype(x.dtype)).reshape(*x.shape[:-1], size // group, group)
        y = rotate(y)
        top = FP8_TOP if self.is_float else self.middle
        scales = (y.abs().amax(-1) / top).to(torch.float16)
        steps = scales.to(y.dtype)
        y = y * torch.where(steps > 0, 1 / steps, 0.0)[..., None]
        if self.is_float:
            return y.clamp(-top, top).to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2), scales
        codes = (y + self.middle).round().clamp(0, 2 * self.middle).to(torch.uint8)
        if self.bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        return codes.flatten(-2), scales

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes and scales from ``encode`` → ``[..., size]`` in ``dtype``."""
        high = accumulate_dtype(dtype)
        return rotate(self.rotated(codes, scales, high)).flatten(-2).to(dtype)

    def rotated(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The stored numbers, still rotated, ``[..., groups, group]``."""
        groups = scales.shape[-1]
        codes = codes.reshape(*scales.shape, codes.shape[-1] // groups)
        if self.is_float:
            numbers = codes.view(torch.float8_e4m3fn).to(dtype)
        else:
            if self.bits == 4:
                codes = torch.cat([codes & 15, codes >> 4], dim=-1)
            numbers = codes.to(dtype) - self.middle
        return numbers * scales.to(dtype)[..., None]


CODECS = {
    each.name: each for each in (Codec("int8", 8, 1), Codec("int4", 4, 2), Codec("fp8", 8, 3))
}


def find_codec(kv_dtype: str) -> Codec | None:
    """The codec of this name; None for ``auto``, the model's dtype."""
    check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    return CODECS.get(kv_dtype)


def rotate(x: Tensor) -> Tensor:
    """``[..., n]`` times the Hadamard matrix of ``n`` (a power of two) over √n; its own inverse."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // half // 2, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x * (1 / math.sqrt(size))
