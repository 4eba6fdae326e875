"""Finished conversations: their caches stay, as long as nobody needs the memory.

A request whose tokens begin with those of a finished one, of the same owner and under the same
policy with the same options and budgets, takes its cache up and prefills the rest only.  A cache
holds every token of its text but the last generated one.  What is taken up belongs to the new
request; what is least recently finished goes first when memory is short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyramidinfer.engine.checks import check_stream
from pyramidinfer.engine.making import costs_of, is_endless
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.request import Request

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["Conversations"]


class Conversations:
    """Caches of finished requests, least recently finished first.

    ``limit``: bytes they may hold together.  ``hits``, ``misses`` and ``reused_tokens`` count what
    was asked for, ``dropped`` the caches that went for want of room.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.held: list[Request] = []
        self.hits = self.misses = self.reused_tokens = self.dropped = 0

    @property
    def cost(self) -> Cost:
        """What all of them hold together."""
        pages = np.zeros_like(self.engine.ledger.pages)
        size = 0
        for promised in [each.promised for each in self.held]:  # a list: metrics look in meanwhile
            if promised is not None:
                pages, size = pages + promised.pages, size + promised.bytes
        return Cost(pages, size)

    @property
    def page_count(self) -> int:
        """Pages that held caches own, those they share counted once."""
        pool, owned = self.engine.pool, set[tuple[int, int]]()
        for sequence in [each.sequence for each in self.held]:
            if sequence is not None:
                table = sequence.table
                for layer, group in enumerate(pool.group_of.tolist()):
                    pages = table.pages[layer, : int(table.held[layer])].tolist()
                    owned.update((group, page) for page in pages)
        return len(owned)

    def keep(self, request: Request) -> None:
        """Hold a request's cache, and let old ones go that are too much then."""
        self.held.append(request)
        while self.cost.bytes > self.limit:
            self._drop(self.held[0])

    def admits(self, request: Request) -> bool:
        """Whether a waiting request can begin: on what is held, or beside it, or instead of it."""
        if request.owner is not None and request.sequence is None and request.prompt_top is None:
            for held in sorted(self._beginnings(request), key=_length, reverse=True):
                if self._take_up(request, held):
                    return True
        if not self.clears(request.likely, request.promised):
            return False
        if request.owner is not None:
            self.misses += 1
        return True

    def clears(self, wanted: Cost, mine: Cost | None) -> bool:
        """Whether ``wanted`` can be promised in place of ``mine``; as many caches go as must."""
        ledger = self.engine.ledger
        if ledger.fits(wanted, instead_of=mine):
            return True
        cost = self.cost
        if mine is not None:
            cost = Cost(cost.pages + mine.pages, cost.bytes + mine.bytes)
        if not ledger.fits(wanted, instead_of=cost):
            return False
        while not ledger.fits(wanted, instead_of=mine):
            self._drop(self.held[0])
        return True

    def make_room(self) -> bool:
        """Let the oldest go; False where none is held."""
        if self.held:
            self._drop(self.held[0])
            return True
        return False

    def clear(self) -> None:
        """Let all of them go."""
        while self.make_room():
            pass

    def _beginnings(self, request: Request) -> list[Request]:
        """Held texts that the request goes on with."""
        found = []
        for held in self.held:
            size = _length(held)
            if (
                held.owner == request.owner
                and size < len(request.prompt)
                and held.policy == request.policy
                and held.protect == request.protect
                and held.text[:size] == request.prompt[:size]
            ):
                found.append(held)
        return found

    def _take_up(self, request: Request, held: Request) -> bool:
        """Give a held cache to a request, if what is added to it then fits."""
        engine, sequence = self.engine, held.sequence
        assert sequence is not None
        table, length = sequence.table, len(request.prompt)
        if is_endless(engine, request.policy, length):
            limit = engine.adapter.streaming.limit(sequence.is_long)
            try:
                check_stream(length - table.seen_len + 1, int(table.kept.max()), limit)
            except ValueError:
                return False
        elif engine.adapter.rotary.is_long(length + request.max_new - 1) != sequence.is_long:
            return False
        most, likely = costs_of(
            engine, request.policy, length, request.max_new, request.protect, table,
            samples=1 + len(request.samples),
        )  # fmt: skip
        if not engine.ledger.ever_fits(most):
            return False
        others = self.cost
        if not engine.ledger.fits(likely, instead_of=others):
            return False
        self.held.remove(held)
        while not engine.ledger.fits(likely, instead_of=held.promised):
            self._drop(self.held[0])
        request.reused, request.reused_entries = table.seen_len, int(table.kept.sum())
        for each in (request, *request.samples):
            each.cost, each.likely = most, likely
        request.sequence, held.sequence = sequence, None
        request.promised, held.promised = held.promised, None
        self.hits, self.reused_tokens = self.hits + 1, self.reused_tokens + table.seen_len
        return True

    def _drop(self, held: Request) -> None:
        self.held.remove(held)
        self.engine.release(held)
        self.dropped += 1


def _length(held: Request) -> int:
    """Tokens that a held cache has seen."""
    assert held.sequence is not None
    return held.sequence.table.seen_len
