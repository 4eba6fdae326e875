"""The pool's moves on the C++ kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.native.library import DTYPES, Kernels, StorageData, WriteCall, pointer

if TYPE_CHECKING:
    from pyramidinfer.cache.pool import Slots

__all__ = ["native_gather", "native_keep", "native_write"]


def native_write(kernels: Kernels, group: Group, slots: Slots, keys: Tensor, values: Tensor,
                 positions: Tensor) -> None:  # fmt: skip
    """``Pool.write``; each head of a row of keys and values is contiguous."""
    keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (keys, values))
    held = (keys, values, positions.long().contiguous(), *(each.contiguous() for each in slots))
    storage = (group.keys, group.values, group.positions, group.scores)
    count, kv_heads, key_dim = keys.shape
    call = WriteCall(
        *map(pointer, held), *map(pointer, storage), keys.stride(0), values.stride(0),
        keys.stride(1), values.stride(1), count, kv_heads, key_dim, values.shape[2],
        group.keys.shape[2],
    )  # fmt: skip
    kernels.write_entries(DTYPES[keys.dtype], ctypes.byref(call))


def native_keep(kernels: Kernels, group: Group, pages: np.ndarray, indices: Tensor, length: int
                ) -> None:  # fmt: skip
    """Move the entries ``indices`` ``[1 or kv_heads, k]`` of ``length`` to the front."""
    tensors = group.tensors()
    data = (StorageData * len(tensors))(*(_storage(each) for each in tensors))
    indices = indices.long().contiguous()
    row = indices.shape[1] if indices.shape[0] > 1 else 0
    moved = kernels.keep(
        data, len(tensors), pages.ctypes.data, group.spec.kv_heads, group.keys.shape[2],
        pointer(indices), row, indices.shape[1], length,
    )  # fmt: skip
    assert moved >= 0, "a policy returned an entry twice, or one that is not there"


def native_gather(kernels: Kernels, storage: Tensor, pages: np.ndarray, kept: int) -> Tensor:
    """``[kv_heads, kept, ...]`` of one tensor of a group, slot by slot."""
    heads, page = storage.shape[1:3]
    out = torch.empty(heads, kept, *storage.shape[3:], dtype=storage.dtype)
    data = _storage(storage)
    kernels.gather_pages(ctypes.byref(data), pages.ctypes.data, heads, page, kept, pointer(out))
    return out


def _storage(tensor: Tensor) -> ctypes.Structure:
    return StorageData(tensor.data_ptr(), tensor[0, 0, 0].nbytes)
