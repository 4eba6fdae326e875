"""The decode step on fixed buffers, which a GPU replays as one CUDA graph.

A step's inputs go into buffers of a *size*: requests and pages are rounded up, so that few sizes
are needed.  The first steps of a size run kernel by kernel as a warm-up; then the same calls are
captured, and each later step is one upload and one replay.  Without a GPU, nothing is captured: the
same calls run on the same buffers.

Changes of the cache's shape (claiming pages, evicting) stay outside the graph.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidinfer.cache import Pool
from pyramidinfer.models.decode import Decoding, Size

__all__ = ["DecodeGraphs", "round_pages", "round_rows"]

#: Steps of a size that run kernel by kernel before it is captured.
WARM_UP = 2
#: Maximum number of sizes; the least recently used one is removed.
MOST = 24
#: Minimum number of pages per request.
LEAST_PAGES = 16


def round_rows(count: int) -> int:
    """1, 2, 4, 8, then in steps that stay below a quarter of the rows: 16, 24, … 64, 80, …"""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def round_pages(count: int) -> int:
    """The next power of two."""
    return max(LEAST_PAGES, 1 << (count - 1).bit_length())


class Step:
    """One size: its buffers, and its graph if captured."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding, self.used = decoding, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None  # output of the graph


class DecodeGraphs:
    """Decode steps over one pool.  A step's outputs are valid until the next step."""

    def __init__(self, pool: Pool) -> None:
        self.steps: OrderedDict[Size, Step] = OrderedDict()
        self.captures = pool.on_gpu
        cuda: Any = torch.cuda
        self._side = cuda.Stream(pool.device) if self.captures else None
        self._memory: Any = None  # shared by all graphs: one of them runs at a time

    @property
    def captured(self) -> int:
        """Number of captured sizes."""
        return sum(step.graph is not None for step in self.steps.values())

    def step(self, size: Size, make: Callable[[Size], Decoding]) -> Decoding:
        """The buffers of a step with room for ``size``, created if missing."""
        size = size._replace(rows=round_rows(size.rows), pages=round_pages(size.pages))
        if size not in self.steps:
            self.steps[size] = Step(make(size))
            if len(self.steps) > MOST:
                self.steps.popitem(last=False)
        self.steps.move_to_end(size)
        return self.steps[size].decoding

    def run(self, decoding: Decoding, work: Callable[[], Tensor]) -> Tensor:
        """Logits ``[rows, vocab]`` of ``work`` on these buffers; ``work`` must not wait for the
        device or depend on the buffers' contents."""
        step = self.steps[decoding.size]
        step.used += 1
        if self.captures and step.graph is None and step.used > WARM_UP:
            self._capture(step, work)
        if step.graph is not None and step.out is not None:
            step.graph.replay()
            return step.out
        if self._side is None:
            return work()
        here = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            out = work()
        here.wait_stream(self._side)
        return out

    def _capture(self, step: Step, work: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._side, capture_error_mode="thread_local"
            ):
                out = work()
        except RuntimeError as error:
            self.captures = False
            warnings.warn(
                f"decoding runs without CUDA graphs: {error}", RuntimeWarning, stacklevel=2
            )
            return
        step.graph, step.out = graph, out
