"""ChunkKV: what the prompt's last queries look at, chunk by chunk (Liu et al., 2502.00299).

A text is cut into chunks of neighbouring tokens.  A chunk's score is the attention that the
window's queries of all heads gave its entries; after prefill the best chunks stay whole, beside the
window, the same in every head.  Nothing is evicted later.

Deviations: a chunk scores by the mean of its entries, so that one that is not whole (the text's
last, or of a cache that was cut before) is not at a disadvantage.  Where such a chunk or a
protected span is among the best, the last chunk that stays may be cut short.  Chosen chunks are not
reused by the next layers: scores are made while the window's queries attend, so choosing again
costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Needs, Observation, Reduce, View

__all__ = ["ChunkKV"]


@named_options
@dataclass(frozen=True)
class ChunkKV(Retaining):
    """The same budget in every layer, in whole chunks.

    retain_ratio : share of the text kept (published: 0.1; not used with ``keep``).
    chunk_length : tokens of a chunk.
    window : newest queries that score, and newest entries that stay.
    keep : instead of ``retain_ratio``: see ``Retaining``; generated entries come on top.
    """

    name: ClassVar[str] = "chunkkv"

    retain_ratio: float = 0.1
    chunk_length: int = 10
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("retain_ratio", self.retain_ratio)
        check_whole("chunk_length", self.chunk_length, 1)
        check_whole("window", self.window, 1)

    def entries(self, text_len: int) -> int:
        return round(text_len * self.retain_ratio)

    def floor(self) -> int:
        return self.window + self.chunk_length

    def needs(self, view: View) -> Needs:
        if view.phase == "decode" or not self.over(view):
            return Needs()
        whole = (self.limit(view) - self.window) // self.chunk_length * self.chunk_length
        rule = Best(self.window + whole, "own", recent=self.window)
        return Needs(self.window, Reduce("mean", "sum"), retain=rule)

    def score(self, seen: Observation) -> Tensor:
        """``[1, n]``, the same tokens in every head: the mean over each entry's chunk."""
        assert seen.scores is not None
        positions = seen.positions[0]
        chunks = positions // self.chunk_length
        context = (positions <= seen.view.seen_len - 1 - self.window).to(seen.scores.dtype)
        sums = seen.scores.new_zeros(2, int(chunks.max()) + 1)
        sums.index_add_(1, chunks, torch.stack([seen.scores[0] * context, context]))
        return (sums[0] / sums[1].clamp(min=1))[chunks][None]
