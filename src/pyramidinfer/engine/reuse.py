"""Finished conversations: their caches stay, as long as nobody needs the memory.

A request whose tokens begin with those of a finished one, of the same owner and under the same
policy with the same options and budgets, reuses its cache and prefills the rest only.  A cache
holds every token of its text but the last generated one.  What is reused belongs to the new
request; what is least recently finished goes first when memory is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from pyramidinfer.cache import Table
from pyramidinfer.engine.checks import check_stream
from pyramidinfer.engine.making import costs_of
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared
from pyramidinfer.types import TokenIds

__all__ = ["Conversations"]


class Conversations:
    """Caches of finished requests, least recently finished first.

    ``limit``: bytes they may hold together.  ``hits``, ``misses`` and ``reused_tokens`` count what
    was asked for, ``dropped`` the caches that went for want of room.
    """

    def __init__(self, shared: Shared, limit: int) -> None:
        self.shared, self.limit = shared, limit
        self.hits = self.misses = self.reused_tokens = self.dropped = 0
        self._digests: dict[Request, bytes] = {}  # in the order in which they ended
        self._by_digest: dict[bytes, list[Request]] = {}
        self._lengths: Counter[int] = Counter()
        self._pages, self._bytes = np.zeros_like(shared.ledger.pages), 0
        self._owners = [np.zeros(len(group.counts), dtype=np.int32) for group in shared.pool.groups]
        self.page_count = 0  # pages that held caches own, those they share counted once

    @property
    def held(self) -> list[Request]:
        """Requests whose caches are held, the one that goes first in front."""
        return list(self._digests)

    @property
    def cost(self) -> Cost:
        """What all of them hold together."""
        return Cost(self._pages.copy(), self._bytes)

    def keep(self, request: Request) -> None:
        """Hold a request's cache, and let old ones go that are too much then."""
        assert request.owner is not None
        length = _length(request)
        *_, digest = _digests(request.owner, request.text, [length])
        self._digests[request] = digest
        self._by_digest.setdefault(digest, []).append(request)
        self._lengths[length] += 1
        self._count(request, 1)
        while self._bytes > self.limit:
            self._drop()

    def _forget(self, held: Request) -> None:
        """Hold a request's cache no longer; it has it still."""
        self._count(held, -1)
        digest, length = self._digests.pop(held), _length(held)
        self._by_digest[digest].remove(held)
        if not self._by_digest[digest]:
            del self._by_digest[digest]
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]

    def _count(self, held: Request, sign: int) -> None:
        """Count what a cache holds in or out."""
        assert held.reserved is not None
        table, pool = held.table, self.shared.pool
        self._pages = self._pages + sign * held.reserved.pages
        self._bytes += sign * held.reserved.bytes
        for layer in pool.own_layers:
            owners, pages = self._owners[pool.group_of[layer]], pool.owned(table, layer)
            before = int(np.count_nonzero(owners[pages]))
            owners[pages] += sign
            self.page_count += int(np.count_nonzero(owners[pages])) - before

    def exchange(self, request: Request, table: Table) -> None:
        """Have a held request, of the caller's or of these, hold ``table`` in the place of its own,
        which is given back."""
        is_counted = request in self._digests
        if is_counted:
            self._count(request, -1)
        self.shared.pool.release(request.table)
        request.cache = table
        self.shared.ledger.reserve(request, self.shared.ledger.held(table))
        if is_counted:
            self._count(request, 1)

    def reuse(self, request: Request) -> bool:
        """Give a waiting request the held cache that its text goes on with, the longest first, if
        what is added then fits."""
        if request.owner is None or request.cache is not None or request.prompt_top is not None:
            return False
        return any(self._reuse(request, held) for held in self._beginnings(request))

    def make_room_for(self, wanted: Cost, mine: Cost | None) -> bool:
        """Let as many caches go as must, so that ``wanted`` can be reserved in place of ``mine``;
        False, and none goes, where that cannot be."""
        ledger = self.shared.ledger
        if ledger.fits(wanted, instead_of=mine):
            return True
        cost = self.cost
        if mine is not None:
            cost = Cost(cost.pages + mine.pages, cost.bytes + mine.bytes)
        if not ledger.fits(wanted, instead_of=cost):
            return False
        while not ledger.fits(wanted, instead_of=mine):
            self._drop()
        return True

    def make_room(self) -> bool:
        """Let the oldest go; False where none is held."""
        if self._digests:
            self._drop()
            return True
        return False

    def clear(self) -> None:
        """Let all of them go."""
        while self.make_room():
            pass

    def _beginnings(self, request: Request) -> list[Request]:
        """Held texts that the request goes on with, the longest first."""
        assert request.owner is not None
        lengths = sorted(length for length in self._lengths if length < len(request.prompt))
        found = []
        for digest in _digests(request.owner, request.prompt, lengths):
            found += self._by_digest.get(digest, [])
        return [
            held
            for held in reversed(found)
            if held.owner == request.owner
            and held.policy == request.policy
            and held.protect == request.protect
        ]

    def _reuse(self, request: Request, held: Request) -> bool:
        """Give a held cache to a request, if what is added to it then fits."""
        shared, table, length = self.shared, held.table, len(request.prompt)
        if shared.is_endless(request.policy, length):
            limit = shared.runner.streaming.limit(held.is_long)
            try:
                check_stream(length - table.seen_len + 1, int(table.kept.max()), limit)
            except ValueError:
                return False
        elif held.is_long != is_long(
            shared.runner, request.policy, length - table.seen_len, length, request.max_new
        ):
            return False
        most, likely = costs_of(
            shared,
            request.policy,
            length,
            request.max_new,
            request.protect,
            table,
            samples=1 + len(request.samples),
        )
        if not shared.ledger.ever_fits(most):
            return False
        others = self.cost
        if not shared.ledger.fits(likely, instead_of=others):
            return False
        self._forget(held)
        while not shared.ledger.fits(likely, instead_of=held.reserved):
            self._drop()
        request.reused, request.reused_entries = table.seen_len, table.layer_tokens
        for each in (request, *request.samples):
            each.cost, each.likely = most, likely
        request.take(table, held)
        held.cache = None
        request.reserved, held.reserved = held.reserved, None
        self.hits, self.reused_tokens = self.hits + 1, self.reused_tokens + table.seen_len
        return True

    def _drop(self) -> None:
        """Let the oldest go."""
        held = next(iter(self._digests))
        self._forget(held)
        self.shared.release(held)
        self.dropped += 1


def _length(held: Request) -> int:
    """Tokens that a held cache has seen."""
    return held.table.seen_len


def _digests(owner: str, text: TokenIds, lengths: list[int]) -> Iterator[bytes]:
    """What the first so many tokens of an owner's text are known by; lengths ascend."""
    data, at = np.array(text, dtype=np.int64), 0
    hasher = blake2b(owner.encode(), digest_size=32)
    for length in lengths:
        hasher.update(data[at:length].tobytes())
        at = length
        yield hasher.digest()
