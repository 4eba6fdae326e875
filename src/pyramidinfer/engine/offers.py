"""Finds the caches that a request may continue on, and the memory that it then needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pyramidinfer.cache import Exported, Table
from pyramidinfer.engine.checks import check_stream
from pyramidinfer.engine.conversation import Conversation, Index, Names
from pyramidinfer.engine.lending import Lenders
from pyramidinfer.engine.making import costs_of
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared

__all__ = ["Offer", "Offers"]


class Beginning(NamedTuple):
    """The first tokens of a cache that keeps all: their number, and entries ``[layers,
    kv_heads]``."""

    seen_len: int
    kept: np.ndarray


@dataclass(slots=True, eq=False)
class Offer:
    """The cache that a request may continue on: a held one (``one``), or the first ``length``
    tokens of its ``lender``'s cache, shared (``table``, after it is set aside)."""

    length: int
    one: Conversation | None = None
    lender: Request | None = None
    table: Table | None = None


class Offers:
    """Finds caches of the same owner, policy and beginning: held ones, and those of ``lenders``."""

    def __init__(self, shared: Shared, names: Names, index: Index) -> None:
        self.shared, self.names, self.index = shared, names, index
        self.lenders = Lenders(shared, names)

    def find(self, request: Request) -> list[Offer]:
        """Caches that a waiting request may continue on, those with most tokens first."""
        found = [Offer(one.length, one) for one in self.beginnings(request)]
        if self._takes(request) and (lender := self.lenders.find(request)) is not None:
            found.insert(0, Offer(lender[1], lender=lender[0]))
        return sorted(found, key=lambda each: each.length)[::-1]

    def _takes(self, request: Request) -> bool:
        """Whether a request may share tokens that another request has computed."""
        free = request.cache is None and request.prompt_top is None
        return free and request.owner is not None

    def beginnings(self, request: Request) -> list[Conversation]:
        """Texts that the request continues, the longest last."""
        if not self._takes(request):
            return []
        names, prompt = self.names, request.prompt
        lengths = self.index.lengths(len(prompt))
        digests = list(names.digests(names.realm(request), prompt, lengths))
        if request.prefix and names.shares:
            digests[:0] = names.digests(names.realm(request, True), prompt, [request.prefix])
        mark = names.mark(request.policy)
        held = [one for digest in digests for one in self.index.at(digest)]
        return [one for one in held if one.fits(request, mark)]

    def costs(self, request: Request, offer: Offer) -> tuple[Cost, Cost] | None:
        """The maximum need of a request that continues on the offered cache, and its reservation;
        None if it cannot use it."""
        shared, length, one = self.shared, len(request.prompt), offer.one
        cache: Table | Exported | Beginning
        if one is None:
            assert offer.lender is not None
            far = offer.lender.is_long
            kept = np.full_like(offer.lender.table.kept, offer.length)
            cache = Beginning(offer.length, kept)
        elif one.tokens is not None and request.prompt[: one.length] != one.tokens:
            return None
        else:
            far, cache = one.is_long, one.cache
        if shared.is_endless(request.policy, length):
            limit = shared.runner.streaming.limit(far)
            try:
                check_stream(length - cache.seen_len + 1, int(cache.kept.max()), limit)
            except ValueError:
                return None
        elif far != is_long(
            shared.runner, request.policy, length - cache.seen_len, length, request.max_new
        ):
            return None
        return costs_of(
            shared,
            request.policy,
            length,
            request.max_new,
            request.protect,
            cache,
            samples=1 + len(request.samples),
        )
