"""ChunkKV: what the prompt's last queries attend to, chunk by chunk (Liu et al., 2502.00299).

The text is split into chunks of consecutive tokens.  A chunk's score is the attention that the
window's queries of all heads gave to its entries.  After prefill the best chunks stay whole, plus
the window; all heads keep the same tokens.  Nothing is evicted during generation.

Deviations: a chunk's score is the mean over its entries, so that an incomplete chunk (the last one,
or one from a cache that was cut before) is not at a disadvantage.  If an incomplete chunk or a
protected span is among the best, the last chunk that stays may be cut short.  Layers do not reuse
the chunks of the layer before: the scores come from attention that is computed anyway, so choosing
in every layer costs almost nothing.
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
    chunk_length : tokens per chunk.
    window : number of newest queries that score; the newest ``window`` entries always stay.
    keep : replaces ``retain_ratio``: see ``Retaining``; generated entries are kept in addition.
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
        """Scores ``[1, n]`` for all heads: the mean over each entry's chunk."""
        assert seen.scores is not None
        positions = seen.positions[0]
        chunks = positions // self.chunk_length
        context = (positions <= seen.view.seen_len - 1 - self.window).to(seen.scores.dtype)
        sums = seen.scores.new_zeros(2, int(chunks.max()) + 1)
        sums.index_add_(1, chunks, torch.stack([seen.scores[0] * context, context]))
        return (sums[0] / sums[1].clamp(min=1))[chunks][None]
