"""Causal attention of one sequence with torch's fused kernels.

For layers with neither a soft cap nor a window.  Fused kernels need no mask: older entries come
first, so that causality is aligned to the lower right corner.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

__all__ = ["attend_causal"]


def attend_causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """queries ``[n, H, D]``, keys ``[K, m, D]``, values ``[K, m, V]`` → ``[n, H, V]``.

    The last n entries are the queries' own, in order; the others are older.
    """
    if _fits_flash(queries, values) and (varlen := _find_varlen()) is not None:
        return _attend_varlen(varlen, queries, keys, values, scale)
    new, entries = queries.shape[0], keys.shape[1]
    grouped = queries.shape[1] != keys.shape[0]
    if grouped and not _fits_flash(queries, values):  # only flash reads a key once per group
        group, grouped = queries.shape[1] // keys.shape[0], False
        keys, values = (each.repeat_interleave(group, dim=0) for each in (keys, values))
    mask: Any = causal_lower_right(new, entries) if 1 < new < entries else None
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=1 < new == entries,
        scale=scale,
        enable_gqa=grouped,
    )
    return out[0].transpose(0, 1)


def _fits_flash(queries: Tensor, values: Tensor) -> bool:
    """Whether torch's flash kernel accepts these tensors on this device (Ampere or newer, 16
    bits)."""
    size = queries.shape[-1]
    return (
        queries.is_cuda
        and queries.dtype in (torch.float16, torch.bfloat16)
        and values.shape[-1] == size
        and size % 8 == 0
        and size <= 256
        and _is_ampere(queries.get_device())
    )


@cache
def _is_ampere(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _find_varlen() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen``, or None if torch lacks it or its options needed here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    wanted = ("scale", "window_size", "enable_gqa")
    return varlen_attn if all(name in known for name in wanted) else None


def _attend_varlen(
    varlen: Callable[..., Any], queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """One sequence in varlen's layout: ``[tokens, heads, D]`` and the bounds of the sequence."""
    new, entries = queries.shape[0], keys.shape[1]
    ends = [
        torch.arange(0, 2 * count, count, dtype=torch.int32, device=queries.device)
        for count in (new, entries)
    ]  # [0, count] each, created on the device
    out: Tensor = varlen(
        queries,
        keys.transpose(0, 1),
        values.transpose(0, 1),
        *ends,
        new,
        entries,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=queries.shape[1] != keys.shape[0],
    )
    return out
