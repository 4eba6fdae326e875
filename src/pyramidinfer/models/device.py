"""What does the work where a model is: chosen once, by the backend's name."""

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
    """What does the work where a model is, handed to all that work there.

    attention : over pages and prompts;  ops : arithmetic of plain layers, None where nothing is
    gained over the model's own modules;  mover : writes and moves entries of the cache, and has the
    kernels that select them;  replays : whether decode steps run on fixed buffers, which a GPU
    replays;  coding : what becomes of weights that are asked for in few bits: ``"packed"`` as
    codes, ``"rounded"`` to what codes stand for, or None where there is neither.
    """

    attention: Backend
    ops: Ops | None
    mover: Mover
    replays: bool = False
    coding: str | None = None


def choose_device(
    backend: str, place: torch.device, dtype: torch.dtype, weights: str = "auto"
) -> Device:
    """By a backend's name (``select_backend``, whose errors these are), for a model of this dtype
    at ``place``, its linears' ``weights`` stored so."""
    attention, on_gpu = select_backend(backend, place), place.type == "cuda"
    if isinstance(attention, CPUBackend):
        made = attention.kernels
        ops = KernelOps(made, dtype, weights) if made.multiplies(dtype, weights) else None
        return Device(attention, ops, KernelMover(made), coding="packed")
    if attention.name == "triton" and on_gpu:
        from pyramidinfer.cache.triton_compact import TritonMover
        from pyramidinfer.models.triton_ops import TritonOps

        return Device(attention, TritonOps(), TritonMover(), replays=True)
    if attention.name == "triton":  # interpreted
        return Device(attention, TorchOps(), Mover(), replays=True)
    return Device(attention, TorchOps() if on_gpu else None, Mover(), coding="rounded")
