"""The implementations of a model's device: chosen once, by the backend's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyramidinfer.attention import Backend, select_backend
from pyramidinfer.attention.cpu import CPUBackend
from pyramidinfer.cache.mover import Mover
from pyramidinfer.cache.native import KernelMover
from pyramidinfer.models.ops import KernelOps, Ops, TorchOps

__all__ = ["Device", "choose_device"]


@dataclass(frozen=True)
class Device:
    """The implementations of a model's device, shared by all parts that work on it.

    attention : over pages and prompts;  ops : arithmetic of plain layers, None if the model's own
    modules are as fast;  mover : writes and moves entries of the cache, and provides
    the kernels that select them;  replays : whether decode steps run on fixed buffers, which a GPU
    replays;  coding : how quantized weights are stored: ``"packed"`` as codes, ``"rounded"`` to the
    values of the codes, or None if neither is supported;  every_row : the last layer also attends
    from tokens whose output the head does not read, for an ``attention`` that watches its queries.
    """

    attention: Backend
    ops: Ops | None
    mover: Mover
    replays: bool = False
    coding: str | None = None
    every_row: bool = False


def choose_device(
    backend: str, place: torch.device, dtype: torch.dtype, weights: str = "auto"
) -> Device:
    """Choose by a backend's name (errors as in ``select_backend``), for a model of this dtype at
    ``place`` with linears stored as ``weights``."""
    attention, on_gpu = select_backend(backend, place), place.type == "cuda"
    if isinstance(attention, CPUBackend):
        made = attention.kernels
        ops = KernelOps(made, dtype, weights) if made.multiplies(dtype) else None
        return Device(attention, ops, KernelMover(made), coding="packed")
    if attention.name == "triton" and on_gpu:
        from pyramidinfer.cache.triton_compact import TritonMover
        from pyramidinfer.models.triton_ops import TritonOps

        return Device(attention, TritonOps(), TritonMover(), replays=True)
    if attention.name == "triton":  # interpreted
        return Device(attention, TorchOps(), Mover(), replays=True)
    return Device(attention, TorchOps() if on_gpu else None, Mover(), coding="rounded")
