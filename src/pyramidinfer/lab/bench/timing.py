"""Timing of alternatives in turns, and statistics of the samples."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

__all__ = ["PeakMemory", "Spread", "ratios", "side_by_side", "spread", "synchronize"]

#: One sample of a short piece of work repeats it until this many seconds have passed.
SAMPLE_SECONDS = 0.02
MOST_CALLS = 1000

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def ratios(mine: Sequence[float], others: Sequence[float]) -> Spread:
    """Spread of ``mine / others``, per repeat (neighbours in time)."""
    return spread([a / b for a, b in zip(mine, others, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(
    works: dict[str, Callable[[int], object]],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds per call of each work, with ``repeats`` samples each, in turns: A B A B.

    A work is called with a running number, so that it can read different memory every time.
    """
    calls: dict[str, int] = {}
    for name, work in works.items():
        for index in range(max(1, warmup)):
            work(index)
        once = _sample(work, device, 0, 1)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name, work in works.items():
            count = calls[name]
            found[name].append(_sample(work, device, repeat * count, count))
    return found


def _sample(work: Callable[[int], object], device: torch.device, first: int, count: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for index in range(first, first + count):
        work(index)
    synchronize(device)
    return (time.perf_counter() - start) / count


class PeakMemory:
    """The peak memory since its creation: of the process on a CPU, of the device on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # reset the peak
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
