"""Taking back a step in which something was raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyramidinfer.engine.request import Request
from pyramidinfer.engine.scheduler import Plan

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["Undo"]


class Undo:
    """What a step's requests looked like before it.

    ``ran``: the forward pass came to its end;  ``committed``: requests that have their new token.
    A decoding request that has not loses the entry it wrote and feeds the same token again.  A
    prompt in progress begins again; one that extends a cache cannot, and is aborted.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine, self.plan = engine, plan
        self.ran = False
        self.committed: set[Request] = set()
        tables = [each.sequence.table for each in plan.decode if each.sequence is not None]
        self.before = [(table.kept.copy(), table.seen_len) for table in tables]
        self.samples = [
            each for request, _ in plan.prefill for each in request.samples if each.sequence is None
        ]

    def roll_back(self) -> None:
        """Bring every request of the plan that was not committed into a state to go on from."""
        for request, (kept, seen_len) in zip(self.plan.decode, self.before, strict=True):
            if request in self.committed or request.sequence is None:
                continue
            table = request.sequence.table
            if table.seen_len == seen_len:
                self.engine.pool.retract(table, kept)
            else:  # entries are evicted already, and its token is lost
                self.engine.abort(request)
        for sample in self.samples:  # one that has pages and no token cannot go on
            if sample.sequence is not None and sample not in self.committed:
                self.engine.abort(sample)
        for request, work in self.plan.prefill:
            if request in self.committed or (self.ran and not work.intake.finished):
                continue
            if work.intake.first or request.sequence is None:
                self.engine.abort(request)
            else:
                table = request.sequence.table
                self.engine.pool.retract(table, table.kept * 0)
                table.seen_len, table.transient_bytes = 0, 0
                self.engine.pool.note_beside(table)
                table.state = request.policy.start(request.sequence.layers)
                self.engine.begin(request)
