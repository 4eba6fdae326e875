"""A model's stage in a pipeline: its layers run on the outputs of the stage before it.

``begin`` runs this stage's part of a batch and passes it on; ``end`` waits for the last stage's
message with the kept entries of all layers and the logits.  Other batches begin in the meantime, so
that all stages are busy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyramidinfer.cache import Pool, Table
from pyramidinfer.models.batch import Batch, Prefill, Sequence
from pyramidinfer.models.decode import Decoding, Stepped
from pyramidinfer.models.routing import evaluating
from pyramidinfer.models.runner import ModelRunner
from pyramidinfer.models.stages import FLIGHTS, TALK, Note, kept_here, told

__all__ = ["Flight", "StageRunner"]


class Flight(NamedTuple):
    """A batch in the pipeline.  known : the last stage's message, if this is the last stage: a
    note, and the logits."""

    batch: Batch
    decoding: Decoding | None
    lane: int
    known: tuple[Note, Tensor] | None


class StageRunner(ModelRunner):
    """One stage's layers; the first stage has the embedding, the last one the head.

    The first stage, which samples tokens, and the last one have logits; ``forward`` returns them on
    all stages.
    """

    @torch.inference_mode()
    def forward(self, pool: Pool, batch: Batch) -> Stepped:
        """One complete step; decoding sequences are already committed (``commit``)."""
        return self.end(pool, self.begin(pool, batch, TALK))

    @torch.inference_mode()
    def begin(self, pool: Pool, batch: Batch, lane: int = FLIGHTS) -> Flight:
        """This stage's part of a step, including evictions of the decoding sequences."""
        with evaluating(self._given):
            return self._begin(pool, batch, lane)

    def _begin(self, pool: Pool, batch: Batch, lane: int) -> Flight:
        stages, works = self.stages, batch.works
        decoding = self._claim(pool, batch) if batch.decode else None
        note, entering, last = Note(), None, dict[int, Tensor]()
        if not stages.is_first:
            note, tensors = stages.receive(stages.index - 1, lane)
            entering = tensors.pop(0) if decoding is not None else None
            note.enter(pool, works, tensors)
        begun = [work.prefill.layer for work in works]
        rows = self.run(pool, decoding, works, last, entering)
        if decoding is not None:
            for row, sequence in enumerate(batch.decode):
                with note.watch(row, sequence, stages.own):
                    self._count(pool, sequence, decoding, row)
            decoding.counted = True
        moving = note.leave(pool, works, begun, stages)
        if not stages.is_last:
            through = [] if decoding is None else [("rows", rows)]
            stages.send(stages.index + 1, note, through + moving, lane)
            return Flight(batch, decoding, lane, None)
        logits = self._answers(rows, last)
        for stage in range(stages.size - 1):
            wanted = len(logits) and (stage == 0 or lane == TALK)
            stages.send(stage, note, [("results", logits)] if wanted else [], lane)
        return Flight(batch, decoding, lane, (note, logits))

    @torch.inference_mode()
    def end(self, pool: Pool, flight: Flight) -> Stepped:
        """Wait for the last stage's message, and apply the changes of all stages."""
        stages, batch = self.stages, flight.batch
        if flight.known is not None:
            note, logits = flight.known
        else:
            note, tensors = stages.receive(stages.size - 1, flight.lane)
            logits = tensors[0] if tensors else self._answers(self._like[:0], {})
        note.apply(batch.decode, batch.works, stages)
        for sequence in batch.decode:
            if sequence.cache is not None and sequence.policy.streams:
                self._move_places(pool, sequence)
        for work in batch.works:
            if work.prefill.finished and work.prefill.sequence.cache is not None:
                self._finish_text(pool, work.prefill)
        return Stepped(logits, flight.decoding)

    def _end_text(self, pool: Pool, prefill: Prefill) -> None:
        """Do nothing here: all stages must know first that the text is through (``end``)."""

    def _finish_text(self, pool: Pool, prefill: Prefill) -> None:
        """``ModelRunner._end_text``, stage by stage if the policy selects entries once more."""
        stages, table = self.stages, prefill.sequence.table

        def hear(stage: int) -> None:
            kept, state = stages.receive(stage)[0]
            table.kept[:], table.state = kept, {**kept_here(table.state), **state}

        if not prefill.is_reread:
            super()._end_text(pool, prefill)
            return
        if not stages.is_first:
            hear(stages.index - 1)
        super()._end_text(pool, prefill)
        what = table.kept, told(table.state)
        if stages.is_last:
            stages.tell(what, [])
        else:
            stages.send(stages.index + 1, what, [])
            hear(stages.size - 1)

    @torch.inference_mode()
    def commit(self, pool: Pool, sequence: Sequence, decoding: Decoding, row: int) -> None:
        """Do nothing: the step has already counted its tokens."""
        assert decoding.counted

    def positions(self, pool: Pool, table: Table, layer: int) -> Tensor:
        """As on one rank; all stages must call this."""
        owner = next(i for i, layers in enumerate(self.stages.layers) if layer in layers)
        if owner != self.stages.index:
            return self.stages.receive(owner)[1][0]
        found = super().positions(pool, table, layer)
        self.stages.tell(None, [("positions", found)])
        return found
