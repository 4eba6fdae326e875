"""Norm, rotation and gating as one Triton kernel each, where torch needs several.

Rounding is bit for bit that of ``TorchOps``: 16-bit models round after the norm and before
its weight, after SiLU, and after each product of a rotation.  Importing this module needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.models.adapters import Low
from pyramidinfer.models.ops import GATED, Heads, TorchOps

__all__ = ["TritonOps"]

#: Columns of a gated output per program.
BLOCK = 1024


class TritonOps(TorchOps):
    """``TorchOps`` in few launches; float64 uses torch."""

    def linear(
        self,
        x: Tensor,
        weights: Any,
        how: int,
        residual: Tensor | None = None,
        low: Low | None = None,
    ) -> Tensor:
        if how != GATED or x.dtype == torch.float64 or low is not None:
            return super().linear(x, weights, how, residual, low)
        both = F.linear(x, *weights)
        rows, inner = len(both), both.shape[1] // 2
        out = both.new_empty(rows, inner)
        if rows:
            with _device(x):
                _gate[rows, triton.cdiv(inner, BLOCK)](both, out, inner, block=BLOCK)
        return out

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if x.dtype == torch.float64 or x.ndim != 2 or weight.dtype != x.dtype:
            return super().norm(x, weight, epsilon)
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if len(x):
            size = x.shape[1]
            with _device(x):
                _norm[(len(x),)](
                    x,
                    weight,
                    out,
                    x.stride(0),
                    epsilon,
                    size=size,
                    pad=triton.next_power_of_2(size),
                    num_warps=8 if size > 2048 else 4,
                )
        return out

    def rotate(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        if qkv.dtype == torch.float64 or heads.rotated % 2 or not qkv.is_contiguous():
            return super().rotate(qkv, heads, cos, sin)
        normed = heads.query_norm is not None and heads.key_norm is not None
        if not len(qkv) or not (heads.rotated or normed):
            return None
        if (heads.query_norm is None) != (heads.key_norm is None):
            return super().rotate(qkv, heads, cos, sin)
        rest = heads.size - heads.rotated
        with _device(qkv):
            _rotate[len(qkv), heads.heads + heads.kv_heads](
                qkv,
                cos.contiguous(),
                sin.contiguous(),
                heads.query_norm if normed else qkv,
                heads.key_norm if normed else qkv,
                heads.epsilon,
                heads=heads.heads,
                width=heads.heads + 2 * heads.kv_heads,
                size=heads.size,
                size_pad=triton.next_power_of_2(heads.size),
                rotated=heads.rotated,
                half_pad=triton.next_power_of_2(max(1, heads.rotated // 2)),
                rest_pad=triton.next_power_of_2(max(1, rest)),
                normed=normed,
                num_warps=1,
            )
        return None


@triton.jit(do_not_specialize=["inner"])
def _gate(both, out, inner, block: tl.constexpr):
    """silu(gate) · up.  both ``[n, 2 · inner]`` → ``[n, inner]``.  Grid ``[n, blocks]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    there = column < inner
    gate = tl.load(both + row * 2 * inner + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + column, mask=there, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + column, gate * up, mask=there)


@triton.jit(do_not_specialize=["stride"])
def _norm(x, weight, out, stride, epsilon, size: tl.constexpr, pad: tl.constexpr):
    """Root mean square norm of a row.  Grid ``[n]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, pad)
    there = column < size
    wide = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    by = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
    rounded = (wide * by).to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, rounded * scale, mask=there)


@triton.jit
def _part(qkv, scale, at, first, by, there, normed: tl.constexpr):
    """Normalized channels of a head from ``first`` on; ``at`` counts from there."""
    number = tl.load(qkv + first + at, mask=there, other=0.0).to(tl.float32)
    if normed:
        weight = tl.load(scale + first + at, mask=there, other=0.0).to(tl.float32)
        number = (number * by).to(qkv.dtype.element_ty).to(tl.float32) * weight
        number = number.to(qkv.dtype.element_ty).to(tl.float32)
    return number


@triton.jit
def _rotate(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    epsilon,
    heads: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    size_pad: tl.constexpr,
    rotated: tl.constexpr,
    half_pad: tl.constexpr,
    rest_pad: tl.constexpr,
    normed: tl.constexpr,
):
    """One head's norm and rotation, in place.  Grid ``[n, heads + kv_heads]``."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qkv += (row * width + head) * size
    kind = qkv.dtype.element_ty
    by, scale = 1.0, query_norm
    if normed:
        column = tl.arange(0, size_pad)
        wide = tl.load(qkv + column, mask=column < size, other=0.0).to(tl.float32)
        by = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
        if head >= heads:
            scale = key_norm
    half: tl.constexpr = rotated // 2
    at = tl.arange(0, half_pad)
    there = at < half
    low = _part(qkv, scale, at, 0, by, there, normed)
    high = _part(qkv, scale, at, half, by, there, normed)
    beyond = tl.arange(0, rest_pad)
    rest = _part(qkv, scale, beyond, rotated, by, beyond < size - rotated, normed)
    angle = row * rotated + at
    cos_low = tl.load(cos + angle, mask=there, other=0.0).to(kind).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=there, other=0.0).to(kind).to(tl.float32)
    cos_high = tl.load(cos + angle + half, mask=there, other=0.0).to(kind).to(tl.float32)
    sin_high = tl.load(sin + angle + half, mask=there, other=0.0).to(kind).to(tl.float32)
    new_low = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    new_high = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    tl.debug_barrier()  # all threads have loaded the values that are now overwritten
    tl.store(qkv + at, new_low, mask=there)
    tl.store(qkv + half + at, new_high, mask=there)
    if normed:
        tl.store(qkv + rotated + beyond, rest, mask=beyond < size - rotated)


def _device(tensor: Tensor) -> AbstractContextManager[None]:
    """Kernels start on the current device: make the tensor's device current (no effect on the
    CPU)."""
    of: AbstractContextManager[None] = torch.cuda.device_of(tensor)
    return of
