"""The pool's moves on the C++ kernels."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.native.library import (
    DTYPES,
    Keeping,
    Kernels,
    StorageData,
    WriteCall,
    pointer,
)

__all__ = ["Slots", "Stays", "native_gather", "native_keep", "native_write"]


class Slots(NamedTuple):
    """Where new entries go: ``pages`` and ``offsets``, each ``[n, kv_heads]`` (one group)."""

    pages: Tensor
    offsets: Tensor


class Stays(NamedTuple):
    """A layer's pages ``[kv_heads, P]``, indices ``[1 or kv_heads, k]``, how many of them count and
    how many entries there are, both ``[kv_heads]``."""

    pages: np.ndarray
    indices: Tensor
    kept: np.ndarray
    lengths: np.ndarray


def native_write(
    kernels: Kernels, group: Group, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
) -> None:
    """``Pool.write``; each head of a row of keys and values is contiguous."""
    keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (keys, values))
    held = (keys, values, positions.long().contiguous(), *(each.contiguous() for each in slots))
    storage = (group.keys, group.values, group.positions, group.scores)
    count, kv_heads, key_dim = keys.shape
    call = WriteCall(
        *map(pointer, held),
        *map(pointer, storage),
        keys.stride(0),
        values.stride(0),
        keys.stride(1),
        values.stride(1),
        count,
        kv_heads,
        key_dim,
        values.shape[2],
        group.keys.shape[1],
    )
    kernels.write_entries(DTYPES[keys.dtype], ctypes.byref(call))


def native_keep(kernels: Kernels, group: Group, layers: list[Stays]) -> None:
    """Of every layer move the entries that stay to the front of each head."""
    tensors, page = group.tensors(), group.keys.shape[1]
    data = (StorageData * len(tensors))(*(_storage(each) for each in tensors))
    address, count = ctypes.addressof(data), len(tensors)
    calls, held = [], []  # what the calls point to
    for pages, indices, kept, lengths in layers:
        indices = indices.long().contiguous()
        held.append(indices)
        at, first = indices.data_ptr(), pages.ctypes.data
        step = indices.shape[1] * 8 if indices.shape[0] > 1 else 0
        for head, (stay, length) in enumerate(zip(kept.tolist(), lengths.tolist(), strict=True)):
            row = first + head * pages.strides[0]
            calls.append(Keeping(address, row, at + head * step, count, page, stay, length))
    data_of = (Keeping * len(calls))(*calls)
    moved = kernels.keep(ctypes.addressof(data_of), len(calls))
    assert moved >= 0, "a policy returned an entry twice, or one that is not there"


def native_gather(kernels: Kernels, storage: Tensor, pages: np.ndarray, kept: int) -> Tensor:
    """``[heads, kept, ...]`` of one tensor of a group, slot by slot; pages ``[heads, P]``."""
    out = torch.empty(len(pages), kept, *storage.shape[2:], dtype=storage.dtype)
    data, row = _storage(storage), pages.strides[0] // pages.itemsize
    kernels.gather_pages(
        ctypes.byref(data), pages.ctypes.data, row, len(pages), storage.shape[1], kept, pointer(out)
    )
    return out


def _storage(tensor: Tensor) -> ctypes.Structure:
    return StorageData(tensor.data_ptr(), tensor[0, 0].nbytes)
