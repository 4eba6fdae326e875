"""Chunks of prompts in the flat row: claimed before a layer, stored after it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pyramidinfer.models.batch import Work
from pyramidinfer.models.decoder import Decoder
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.routing import Segment

__all__ = ["store_chunks", "take_chunks"]


def take_chunks(
    works: Iterable[Work], layer: int, start: int, size: int, decoder: Decoder, ranks: Ranks
) -> tuple[list[Segment], list[Tensor]]:
    """Claim the next chunk, of at most ``size`` tokens, of every prefill that is at this layer and
    has budget left.  Returns segments from row ``start`` of the flat row on, and their inputs."""
    segments, parts = [], []
    for work in works:
        prefill = work.prefill
        count = min(size, prefill.left, work.budget)
        if prefill.layer != layer or count <= 0:
            continue
        if prefill.done == 0:
            prefill.needs = prefill.sequence.policy.needs(prefill.view())
            ranks.check(prefill.needs)
            prefill.computed.append(prefill.length)
        rows = slice(prefill.done, prefill.done + count)
        if prefill.hidden is None:
            part = decoder.embed(prefill.entering[rows], prefill.positions[rows])
        else:
            part = prefill.hidden[rows]
        work.budget -= count
        segments.append(Segment(prefill, start, count))
        parts.append(part)
        start += count
    return segments, parts


def store_chunks(
    segments: list[Segment], out: Tensor, at: int, is_last: bool, last_only: bool
) -> None:
    """Store a layer's outputs (from row ``at`` on) for the next layer or the head.

    is_last : whether the head follows;  last_only : see ``LayerCall``.
    """
    for segment in segments:
        prefill, _, count = segment
        wanted = len(segment.rows_out(last_only))
        rows, at = out[at : at + wanted], at + wanted
        end = prefill.done + count
        if is_last and not prefill.gives_all:  # keep only rows that the head reads
            if end == prefill.length:
                prefill.out = rows[-1:].clone()
        elif count == prefill.length:
            prefill.out = rows
        else:
            if prefill.out is None:
                prefill.out = out.new_empty(prefill.length, out.shape[-1])
            prefill.out[prefill.done : end] = rows
        prefill.done = end
