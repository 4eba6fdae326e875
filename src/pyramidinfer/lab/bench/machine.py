"""The machine's bandwidth and matrix rate, measured in the same run: the roof that shares refer
to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.lab.bench.timing import side_by_side
from pyramidinfer.native import kernels, why_not

__all__ = ["Roof", "measure_roof", "plain_read"]

#: Bytes read or copied at once: well above the size of CPU caches.
BYTES = 512 * 2**20
ROWS, WIDTH, OUT = 2048, 2048, 8192


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes read per second, bytes copied per second (reads plus writes), and floating point
    operations per second of a matrix product in the model's dtype."""

    read: float
    copy: float
    matrix: float

    def figures(self) -> dict[str, float]:
        return asdict(self)

    def best(self, other: Roof) -> Roof:
        """The maximum of two measurements, figure by figure."""
        return Roof(*(max(a, b) for a, b in zip(self.tuple, other.tuple, strict=True)))

    @property
    def tuple(self) -> tuple[float, float, float]:
        return self.read, self.copy, self.matrix


def plain_read(tensor: Tensor) -> object:
    """Read every byte of a contiguous tensor, as fast as possible."""
    native = _kernels() if tensor.device.type == "cpu" else None
    if native is not None and tensor.nbytes % 8 == 0:
        return native.read_words(tensor.data_ptr(), tensor.nbytes // 8)
    flat = tensor.view(-1)
    if flat.nbytes % 4 == 0:
        return flat.view(torch.float32).sum()
    return flat.view(torch.uint8).sum()


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """The C++ kernels, None if they cannot be built."""
    return None if why_not() else kernels()


@torch.inference_mode()
def measure_roof(
    dtype: torch.dtype, device: torch.device, repeats: int = 5, size: int | None = None
) -> Roof:
    """The best of several repeats of each, one after another."""
    size = BYTES if size is None else size
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    scale = max(1, 2**29 // size)  # a small size is a trial run, with small matrices
    left = torch.ones(ROWS // min(scale, 16), WIDTH, dtype=dtype, device=device)
    right = torch.ones(OUT // min(scale, 16), WIDTH, dtype=dtype, device=device)
    seconds = side_by_side(
        {
            "read": lambda _: plain_read(source),
            "copy": lambda _: target.copy_(source),
            "matrix": lambda _: F.linear(left, right),
        },
        device,
        repeats,
    )
    least = {name: min(values) for name, values in seconds.items()}
    work = 2.0 * left.shape[0] * right.shape[0] * WIDTH
    return Roof(
        source.nbytes / least["read"], 2 * source.nbytes / least["copy"], work / least["matrix"]
    )
