"""Undoing a step in which an exception was raised."""

from __future__ import annotations

from collections.abc import Iterator

from pyramidinfer.engine.request import Request
from pyramidinfer.engine.scheduler import Plan
from pyramidinfer.engine.shared import Shared

__all__ = ["Undo"]


class Undo:
    """The state of a step's requests before the step.

    ``ran``: whether the forward pass finished;  ``committed``: requests that have their new token.
    A decoding request that is not committed loses the entry that the step wrote, and feeds the same
    token again.  A prompt in progress starts again; one that extends a cache cannot, and ends.
    """

    def __init__(self, shared: Shared, plan: Plan) -> None:
        self.shared, self.plan = shared, plan
        self.ran = False
        self.committed: set[Request] = set()
        tables = [each.table for each in plan.decode]
        self.before = [(table.kept.copy(), table.seen_len) for table in tables]
        self.samples = [each for request, _ in plan.prefill for each in request.waiting_samples]

    def roll_back(self) -> Iterator[Request]:
        """Restore every request of the plan that was not committed to a state from which it can
        continue.  Yields the requests that cannot be restored; the caller ends them."""
        pool = self.shared.pool
        for request, (kept, seen_len) in zip(self.plan.decode, self.before, strict=True):
            if request in self.committed or request.cache is None:
                continue
            table = request.cache
            if table.seen_len == seen_len:
                pool.retract(table, kept)
            else:  # entries are already evicted and its token is lost
                yield request
        for sample in self.samples:  # a sample with pages but no token cannot continue
            if sample.cache is not None and sample not in self.committed:
                yield sample
        for request, work in self.plan.prefill:
            if request in self.committed or (self.ran and not work.prefill.finished):
                continue
            if work.prefill.first or request.cache is None:
                yield request
            else:
                self.shared.start_again(request)
