"""Messages from rank to rank with torch.distributed: bytes in frames, and tensors."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidinfer.models.stages import FLIGHTS, TALK

__all__ = ["Mail", "framed", "unframed"]

#: Bytes that are sent together with their length.
SHORT = 4096


class Mail:
    """Messages between the ranks of a model's stages (``models/stages.py``).

    ranks : by stage, the rank to communicate with;  ahead : maximum messages of a lane in flight.
    """

    def __init__(self, ranks: list[int], device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.ahead = 2 * len(ranks) ** 2
        self._going: dict[int, deque[list[tuple[Any, Tensor]]]] = {
            lane: deque() for lane in (FLIGHTS, TALK)
        }

    def send(self, stage: int, lane: int, what: Any, tensors: list[Tensor]) -> None:
        import torch.distributed as dist

        shapes = [(tuple(each.shape), each.dtype, each.device.type) for each in tensors]
        parts = [*framed(pickle.dumps((what, shapes))), *(each.contiguous() for each in tensors)]
        sent = [(dist.isend(part, self.ranks[stage], tag=lane), part) for part in parts]
        self._going[lane].append(sent)
        self.wait(lane, self.ahead)

    def wait(self, lane: int, left: int) -> None:
        """Wait until at most ``left`` messages are in flight, and release the others."""
        going = self._going[lane]
        while len(going) > left:
            for work, _ in going.popleft():
                work.wait()

    def receive(self, stage: int, lane: int) -> tuple[Any, list[Tensor]]:
        import torch.distributed as dist

        def take(part: Tensor) -> None:
            dist.recv(part, self.ranks[stage], tag=lane)

        what, shapes = pickle.loads(unframed(take))
        tensors = []
        for shape, dtype, kind in shapes:
            place = self.device if kind == self.device.type else torch.device(kind)
            tensors.append(torch.empty(shape, dtype=dtype, device=place))
            take(tensors[-1])
        return what, tensors


def framed(data: bytes) -> list[Tensor]:
    """Bytes as one tensor of a fixed size, or two."""
    head = torch.zeros(8 + SHORT, dtype=torch.uint8)
    head[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    head[8 : 8 + min(SHORT, len(data))] = whole[:SHORT]
    return [head, whole] if len(data) > SHORT else [head]


def unframed(take: Callable[[Tensor], Any]) -> bytes:
    """The bytes of ``framed``; ``take`` receives a tensor."""
    head = torch.zeros(8 + SHORT, dtype=torch.uint8)
    take(head)
    size = int.from_bytes(bytes(head[:8].tolist()), "little")
    if size <= SHORT:
        return bytes(head[8 : 8 + size].numpy())
    whole = torch.empty(size, dtype=torch.uint8)
    take(whole)
    return bytes(whole.numpy())
