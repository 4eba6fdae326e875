"""One decode step: the inputs and outputs of its layers.

All ways to run a step (all layers in one call, layer by layer, or a replayed CUDA graph) read and
fill the same :class:`Decoding`.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.attention import DecodePlan
from pyramidinfer.attention.base import Attended
from pyramidinfer.cache import Pool, Staging, Weights
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.models.adapters import Adapted
from pyramidinfer.models.batch import Sequence
from pyramidinfer.types import AttentionShape

__all__ = ["Decoding", "Ropes", "Size", "Stepped", "Way", "adapted_rows"]

#: How a step runs: replayed on fixed buffers, all layers in one call, or layer by layer.
Way = Literal["replayed", "whole", "layers"]
#: cos and sin of some rows, each ``[rows, rotated]``, by kind of layer.
Ropes = dict[str | None, tuple[Tensor, Tensor]]

#: Alignment of parts of a buffer, in bytes.
ALIGNED = 128


class Size(NamedTuple):
    """``rows`` tokens of requests with at most ``pages`` pages per head; whether rings and scores
    are needed."""

    rows: int
    pages: int
    rings: bool
    scores: bool

    @classmethod
    def of(cls, sequences: list[Sequence], rows: int) -> Size:
        """The exact size for this number of tokens of these sequences."""
        tables = [each.table for each in sequences]
        return cls(
            rows,
            max(int(table.held.max()) for table in tables),
            any(table.ring is not None for table in tables),
            any(each.policy.uses_scores for each in sequences),
        )


def adapted_rows(sequences: list[Sequence], fed: list[int]) -> Adapted | None:
    """Adapters of the tokens that sequences feed."""
    return Adapted.of((each.adapter, count) for each, count in zip(sequences, fed, strict=True))


class Decoding:
    """``R`` tokens that sequences feed in one step, one per sequence or several in a row (drafts
    that are verified).

    Inputs of the layers: plan (page tables, lengths with the new entry, positions);  pages, offsets
    ``[L, R, K]`` of the new entries;  places ``[R]``, rotary positions of the tokens.
    They are parts of one buffer, written on the host and uploaded at once.  tokens ``[R]`` and
    ropes, cos and sin of the places, are on the device already.  adapted: the rows' adapters; steps
    on fixed buffers have none.

    Outputs of the layers: queries ``[L, R, H, D]`` with their log-sum-exps lse ``[L, R, H]``, if
    rings need them;  weights, if running scores need them.

    ``counted``: whether its tokens were counted and evictions done (``ModelRunner.commit``).

    ``staging``: the caches that are partly in host memory, whose layers are loaded before they run.

    ``way``: how the step runs.  A replayed one is created once, for a CUDA graph that reads the
    current contents of the buffers.  Its rows and pages are rounded up; unused rows have length 0
    and write into a page that no table owns (``Group.scratch``).
    """

    def __init__(
        self, size: Size, pool: Pool, shape: AttentionShape, like: Tensor, way: Way = "layers"
    ) -> None:
        """shape : of every layer;  like : a tensor of the model's dtype on its device."""
        self.size, self.way, on_gpu = size, way, pool.on_gpu
        self.counted = False
        self.staging: Staging | None = None
        self._heads, self._page_size = pool.own_heads, pool.page_size
        rows = (pool.layers, size.rows, pool.kv_heads)
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "tables": (torch.int32, (*rows, size.pages)),
            **dict.fromkeys(("lengths", "pages", "offsets"), (torch.int64, rows)),
            **dict.fromkeys(("positions", "places"), (torch.int64, (size.rows,))),
        }
        spans, end = {}, 0
        for name, (dtype, sizes) in parts.items():
            spans[name] = slice(end, end + prod(sizes) * dtype.itemsize)
            end = -(-spans[name].stop // ALIGNED) * ALIGNED
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=on_gpu and self.fixed)
        self._device = self._host
        if on_gpu or self.fixed:
            self._device = torch.empty(end, dtype=torch.uint8, device=pool.device)

        def part(buffer: Tensor, name: str) -> Tensor:
            return buffer[spans[name]].view(parts[name][0]).view(parts[name][1])

        read = {name: part(self._device, name) for name in parts}
        own = read if self._device is self._host else {n: part(self._host, n) for n in parts}
        self.host = {name: each.numpy() for name, each in own.items()}
        self.pages, self.offsets, self.places = (read[n] for n in ("pages", "offsets", "places"))
        longest = [size.pages * pool.page_size] * pool.layers
        self.plan = DecodePlan(read["tables"], read["lengths"], longest, read["positions"])
        self.tokens = torch.zeros(size.rows, dtype=torch.int64, device=pool.device)
        self.ropes: Ropes = {}
        self.adapted: Adapted | None = None
        scratch = [pool.group(i).scratch for i in range(pool.layers)] if self.fixed else []
        self._scratch = np.array(scratch)
        cuda: Any = torch.cuda
        self._sent = cuda.Event() if on_gpu and self.fixed else None
        self.weights = Weights(pool)
        self.queries: Tensor | None = None
        self.lse: Tensor | None = None
        if size.rings:
            high = accumulate_dtype(like.dtype)
            self.queries = like.new_empty(pool.layers, size.rows, shape.heads, shape.key_dim)
            self.lse = like.new_empty(self.queries.shape[:3], dtype=high)

    @property
    def fixed(self) -> bool:
        """Whether the buffers are kept for further steps."""
        return self.way == "replayed"

    def fill(
        self,
        sequences: list[Sequence],
        pages: np.ndarray,
        offsets: np.ndarray,
        fed: list[int],
        drafts: bool = False,
    ) -> None:
        """Fill the inputs from the sequences' tables, and upload them.

        pages, offsets : of the entries just claimed (``Pool.append_each``), ``fed`` per sequence.
        A token attends to the entries before it and its own.  ``drafts``: tokens read only the
        pages in their draft views.
        """
        if self._sent is not None:
            self._sent.synchronize()  # the last upload has read the host's side
        host, count, row = self.host, sum(fed), 0
        self.adapted = adapted_rows(sequences, fed)
        assert not (self.fixed and self.adapted)
        for each, tokens in zip(sequences, fed, strict=True):
            table = each.table
            held, lengths = int(table.held.max()), table.kept[:, self._heads]
            read = table.pages[..., :held]
            if table.away is not None and self.staging is not None:
                read, lengths = self.staging.read(table)
            elif drafts and table.away is None and each.draft_view is not None:
                read, lengths = each.draft_view.read(table, self._page_size)
            for number in range(tokens):
                host["tables"][:, row, :, : read.shape[2]] = read
                host["lengths"][:, row] = lengths - (tokens - 1 - number)
                host["positions"][row] = table.seen_len + number
                host["places"][row] = table.seen_len + number - each.offset
                row += 1
        host["pages"][:, :count], host["offsets"][:, :count] = pages, offsets
        if self.fixed:
            spare = self._scratch[:, None, None]
            host["tables"][:, count:, :, 0] = host["pages"][:, count:] = spare
            host["lengths"][:, count:] = host["offsets"][:, count:] = 0
            host["positions"][count:] = host["places"][count:] = 0
        else:
            self.plan.longest[:] = host["lengths"].max((1, 2)).tolist()
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def feed(self, tokens: Tensor, ropes: Ropes) -> None:
        """Set the inputs that are on the device already, of the used rows; copied into fixed
        buffers."""
        if not self.fixed:
            self.tokens, self.ropes = tokens, ropes
            return
        count = len(tokens)
        self.tokens[:count].copy_(tokens)
        for kind, pair in ropes.items():
            if kind not in self.ropes:
                cos, sin = (each.new_zeros(self.size.rows, each.shape[1]) for each in pair)
                self.ropes[kind] = cos, sin
            for mine, given in zip(self.ropes[kind], pair, strict=True):
                mine[:count].copy_(given)

    def note(self, layer: int, queries: Tensor, attended: Attended) -> None:
        """Store the results of a layer's attention for queries ``[R, H, D]``."""
        if self.queries is not None and self.lse is not None:
            assert attended.lse is not None
            self.queries[layer], self.lse[layer] = queries, attended.lse
        if attended.probs is not None:
            self.weights.by_layer[layer] = attended.probs


class Stepped(NamedTuple):
    """Logits ``[decode + finished works, vocab]`` in the batch's order, and the decode rows."""

    logits: Tensor
    decoding: Decoding | None
