"""The pool's operations on entries, with the C++ kernels."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache.group import Group
from pyramidinfer.cache.mover import Mover, Slots, Stays
from pyramidinfer.native.library import (
    DTYPES,
    Keeping,
    Kernels,
    StorageData,
    WriteCall,
    pointer,
)

__all__ = ["KernelMover", "kernel_number"]


class KernelMover(Mover):
    """``Mover`` with the C++ kernels; torch writes float64."""

    kernels: Kernels

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def write(
        self, group: Group, slots: Slots, keys: Tensor, values: Tensor, positions: Tensor
    ) -> None:
        if keys.dtype not in DTYPES:
            return super().write(group, slots, keys, values, positions)
        keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
        held = (keys, values, *(each.long().contiguous() for each in (positions, *slots)))
        beside = (group.positions, group.scores, group.key_scales, group.value_scales)
        storage = (group.keys, group.values, *beside)
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
            kernel_number(group),
        )
        self.kernels.write_entries(DTYPES[keys.dtype], ctypes.byref(call))
        return None

    def keep(self, group: Group, layers: list[Stays]) -> None:
        tensors, page = group.tensors(), group.keys.shape[1]
        data = (StorageData * len(tensors))(*(_storage(each) for each in tensors))
        address, count = ctypes.addressof(data), len(tensors)
        calls, held = [], []  # tensors that the calls point to
        for pages, indices, kept, lengths in layers:
            indices = indices.long().contiguous()
            held.append(indices)
            at, first = indices.data_ptr(), pages.ctypes.data
            step = indices.shape[1] * 8 if indices.shape[0] > 1 else 0
            for head, counts in enumerate(zip(kept.tolist(), lengths.tolist(), strict=True)):
                row = first + head * pages.strides[0]
                calls.append(Keeping(address, row, at + head * step, count, page, *counts))
        data_of = (Keeping * len(calls))(*calls)
        moved = self.kernels.keep(ctypes.addressof(data_of), len(calls))
        assert moved >= 0, "a policy returned an entry twice, or an entry that does not exist"

    def gather(self, storage: Tensor, pages: np.ndarray, kept: int) -> Tensor:
        out = torch.empty(len(pages), kept, *storage.shape[2:], dtype=storage.dtype)
        data, row, page = _storage(storage), pages.strides[0] // pages.itemsize, storage.shape[1]
        self.kernels.gather_pages(
            ctypes.byref(data), pages.ctypes.data, row, len(pages), page, kept, pointer(out)
        )
        return out

    def decode(
        self, group: Group, storage: Tensor, scales: Tensor, pages: np.ndarray, kept: int
    ) -> Tensor:
        if group.spec.dtype not in DTYPES:
            return super().decode(group, storage, scales, pages, kept)
        assert group.spec.codec is not None
        size = storage.shape[2] * 8 // group.spec.codec.bits
        out = torch.empty(len(pages), kept, size, dtype=group.spec.dtype)
        self.kernels.gather_decoded(
            DTYPES[group.spec.dtype],
            kernel_number(group),
            pointer(storage),
            pointer(scales),
            size,
            pages.ctypes.data,
            pages.strides[0] // pages.itemsize,
            len(pages),
            storage.shape[1],
            kept,
            pointer(out),
        )
        return out


def kernel_number(group: Group) -> int:
    """The kernels' number for the format in which a group stores its entries."""
    return 0 if group.spec.codec is None else group.spec.codec.kernel


def _storage(tensor: Tensor) -> ctypes.Structure:
    return StorageData(tensor.data_ptr(), tensor[0, 0].nbytes)
