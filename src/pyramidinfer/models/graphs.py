"""The decode step on fixed buffers, which a GPU replays as one CUDA graph.

A step's inputs go into buffers of a *size*: requests and pages rounded up, so that few sizes are
ever needed.  The first steps of a size run kernel by kernel, which warms everything up; then the
same calls are captured, and from there on a step is one upload and one replay.  Without a GPU
nothing is captured: the same calls run on the same buffers.

Rows that no request needs have length 0 and write into a page that no table owns
(``Group.scratch``).  What changes the cache's shape (claiming pages, evicting) stays outside.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache import Pool, Table
from pyramidinfer.models.batch import Batch, Sequence
from pyramidinfer.models.routing import Decoding

__all__ = ["DecodeGraphs", "Frame", "Size", "round_pages", "round_rows"]

#: Steps of a size that run kernel by kernel before it is captured.
WARM_UP = 2
#: Sizes kept at once; the one not used for longest goes.
MOST = 24
#: Pages a request has room for, at least.
LEAST_PAGES = 16


class Size(NamedTuple):
    """``rows`` requests of at most ``pages`` pages a head; whether rings and scores are asked
    for."""

    rows: int
    pages: int
    rings: bool
    scores: bool


def round_rows(count: int) -> int:
    """1, 2, 4, 8, then in steps that stay below a quarter of the rows: 16, 24, … 64, 80, …"""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def round_pages(count: int) -> int:
    """The next power of two."""
    return max(LEAST_PAGES, 1 << (count - 1).bit_length())


class Frame:
    """Inputs of a step of one size: one host buffer, and its copy on the device.

    tables ``[L, R, K, P]``, lengths ``[L, R, K]``, positions and places (rotary positions) ``[R]``
    are parts of it;  tokens ``[R]``, cos and sin ``[R, rotated]`` are the device's own.
    """

    def __init__(
        self, size: Size, layers: int, kv_heads: int, rotated: int, device: torch.device
    ) -> None:
        shapes = {
            "tables": (layers, size.rows, kv_heads, size.pages),
            "lengths": (layers, size.rows, kv_heads),
            "positions": (size.rows,),
            "places": (size.rows,),
        }
        numbers = [-(-int(np.prod(shape)) // 32) * 32 for shape in shapes.values()]
        on_gpu = device.type == "cuda"
        host = torch.zeros(sum(numbers), dtype=torch.int32, pin_memory=on_gpu)
        self._host, self._device = host, host.to(device, copy=True)
        written, read, at = {}, {}, 0
        for (name, shape), count in zip(shapes.items(), numbers, strict=True):
            part = slice(at, at + int(np.prod(shape)))
            written[name] = host[part].view(shape).numpy()
            read[name] = self._device[part].view(shape)
            at += count
        self.host: dict[str, np.ndarray] = written
        self.tables, self.lengths = read["tables"], read["lengths"]
        self.positions, self.places = read["positions"], read["places"]
        self.tokens = torch.zeros(size.rows, dtype=torch.int64, device=device)
        self.cos, self.sin = (torch.zeros(size.rows, rotated, device=device) for _ in range(2))
        cuda: Any = torch.cuda
        self._sent = cuda.Event() if on_gpu else None

    def fill(self, tables: list[Table], offsets: list[int], scratch: np.ndarray) -> None:
        """Write what the requests hold and upload it.  ``scratch``: a spare page, ``[L]``."""
        if self._sent is not None:
            self._sent.synchronize()  # the last upload has read the host's side
        count, host = len(tables), self.host
        host["lengths"][:, :count] = np.stack([table.kept for table in tables], axis=1)
        host["lengths"][:, count:] = 0
        host["tables"][:, count:, :, 0] = scratch[:, None, None]
        for row, table in enumerate(tables):
            most = int(table.held.max())
            host["tables"][:, row, :, :most] = table.pages[..., :most]
        seen = [table.seen_len for table in tables]
        host["positions"][:count] = seen
        host["places"][:count] = [a - b for a, b in zip(seen, offsets, strict=True)]
        host["positions"][count:] = host["places"][count:] = 0
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Step:
    """One size: its frame, and the graph once there is one."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.used = frame, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: tuple[Tensor, Decoding] | None = None  # where the graph leaves its results


#: cos and sin ``[R, rotated]`` of sequences that feed tokens at rotary positions ``[R]``.
Angles = Callable[[Tensor, list[Sequence]], tuple[Tensor, Tensor]]
#: Logits ``[rows, vocab]`` and the decode rows of a frame's inputs.
Run = Callable[[Pool, Frame, Size], tuple[Tensor, Decoding]]


class DecodeGraphs:
    """Decode steps over one pool, ``rotated`` numbers of a head turned by angles.  What ``step``
    returns is good until the next step."""

    def __init__(self, device: torch.device, rotated: int) -> None:
        self._rotated = rotated
        self.steps: OrderedDict[Size, Step] = OrderedDict()
        self.captures = device.type == "cuda"
        cuda: Any = torch.cuda
        self._side = cuda.Stream(device) if self.captures else None
        self._memory: Any = None  # shared by all graphs: one of them runs at a time

    @property
    def captured(self) -> int:
        """Sizes that are replayed."""
        return sum(step.graph is not None for step in self.steps.values())

    def step(self, pool: Pool, batch: Batch, angles: Angles, run: Run) -> tuple[Tensor, Decoding]:
        """The newest token of each sequence through all layers: logits ``[R, vocab]``.

        ``run``: the layers over a frame's buffers; it waits for nothing and does not depend on
        what they hold.  ``angles``: of the rows in use.
        """
        tables = [each.table for each in batch.decode]
        pool.append_each(tables)
        count = len(tables)
        size = Size(
            round_rows(count),
            round_pages(max(int(table.held.max()) for table in tables)),
            any(table.ring is not None for table in tables),
            any(each.policy.uses_scores for each in batch.decode),
        )
        if size not in self.steps:
            frame = Frame(size, pool.layers, pool.kv_heads, self._rotated, pool.device)
            self.steps[size] = Step(frame)
            if len(self.steps) > MOST:
                self.steps.popitem(last=False)
        self.steps.move_to_end(size)
        step = self.steps[size]
        frame = step.frame
        scratch = np.array([pool.group(layer).scratch for layer in range(pool.layers)])
        frame.fill(tables, [each.offset for each in batch.decode], scratch)
        frame.tokens[:count].copy_(batch.tokens)
        if self._rotated:
            cos, sin = angles(frame.places[:count].long(), batch.decode)
            frame.cos[:count].copy_(cos)
            frame.sin[:count].copy_(sin)
        logits, decoding = self._run(step, lambda: run(pool, frame, size))
        return logits[:count], decoding

    def _run(
        self, step: Step, work: Callable[[], tuple[Tensor, Decoding]]
    ) -> tuple[Tensor, Decoding]:
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

    def _capture(self, step: Step, work: Callable[[], tuple[Tensor, Decoding]]) -> None:
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
