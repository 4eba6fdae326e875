"""Finished conversations: their caches are kept until the memory is needed.

A request whose tokens begin with those of a finished one, of the same owner and under the same
policy with the same options and budgets, reuses its cache and prefills the rest only.  A cache
covers every token of its text except the last generated one.  A reused cache belongs to the new
request; of a separately prefilled prefix, a copy stays, on the same pages until one of them is
written.  If nothing is dropped, requests share common first tokens (``lending.py``).

Caches are held in the pool.  If memory is short there, the least recently finished one moves first:
to host memory, from there to disk, or it is dropped if there is neither.  A cache that is needed
again is copied back; one on disk is read into host memory first, while other requests continue.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from hashlib import blake2b
from typing import Literal

import numpy as np

from pyramidinfer.cache import Table
from pyramidinfer.config import parse_bytes
from pyramidinfer.engine.conversation import Conversation, Index, Names
from pyramidinfer.engine.disk import DiskStore
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.offers import Offer, Offers
from pyramidinfer.engine.offload import HostStore
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.batch import Sequence
from pyramidinfer.models.fingerprint import fingerprint

__all__ = ["Conversations", "Found", "open_conversations"]

log = logging.getLogger(__name__)

#: Result of a request's lookup: a cache that it has now, none, or one that is being read.
Found = Literal["taken", "none", "coming"]
#: Keys of a model's config that do not affect its caches.
ELSEWHERE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
#: Maximum seconds that an idle thread waits for a disk.
PATIENCE = 0.005


class Conversations:
    """Caches of finished requests, least recently finished first.

    ``limit``: bytes they may hold together in the pool;  ``host``, ``disk``: the next places.
    ``hits`` (``hits_from`` a place), ``misses``, and ``reused_tokens`` of all ``queried_tokens``
    count lookups, ``dropped`` the caches that were dropped for lack of room, ``spills`` those that
    moved from the pool to host memory and ``loads`` those that came back.
    """

    def __init__(
        self, shared: Shared, limit: int, host: HostStore, disk: DiskStore | None, names: Names
    ) -> None:
        self.shared, self.limit, self.names = shared, limit, names
        self.host, self.disk = host, disk
        host.lost = self._lose
        self.misses = self.dropped = self.spills = self.loads = 0
        self.queried_tokens = self.reused_tokens = 0
        self.hits_from: Counter[str] = Counter()
        self.index = Index()
        self.offers = Offers(shared, names, self.index)
        self._held: dict[Request, Conversation] = {}  # in the order in which they ended
        self._leaving: list[Conversation] = []
        self._pages, self._bytes = np.zeros_like(shared.ledger.pages), 0
        self._owners = [np.zeros(len(group.counts), dtype=np.int32) for group in shared.pool.groups]
        self.page_count = 0  # pages of held caches; shared pages count once
        if disk is not None:
            disk.lost = self._file_lost
            for one in disk.found:
                self.index.add(one)

    @property
    def hits(self) -> int:
        """Number of requests that reused a cache."""
        return self.hits_from.total()

    @property
    def count(self) -> int:
        """Caches in the pool."""
        return len(self._held)

    @property
    def held(self) -> list[Request]:
        """Requests whose caches are held in the pool, in order of eviction."""
        return list(self._held)

    @property
    def cost(self) -> Cost:
        """Bytes that all of them hold in the pool."""
        return Cost(self._pages.copy(), self._bytes)

    # --- holding ------------------------------------------------------------------------------

    def keep(self, request: Request) -> bool:
        """Hold a request's cache, and evict old caches above the limit; False if it is among
        them."""
        assert request.reserved is not None
        one = self.names.of(request, request.reserved.bytes)
        for other in [each for each in self.index.at(one.digest) if each.id == one.id]:
            if other.request is None or one.is_prefix:  # an older cache of the same text
                self.discard(other)
        if one.is_pinned and self.pinned_bytes() + one.size > self.pin_limit:
            log.warning("cache %s is no longer pinned: it exceeds the limit of bytes", one.id)
            one.pinned = 0.0
        self._held[request] = one
        self.index.add(one)
        self._count(request, 1)
        while self._bytes > self.limit:
            self._drop()
        return one in self.index.at(one.digest)

    def _count(self, held: Request, sign: int) -> None:
        """Count what a cache in the pool holds in or out."""
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
        """Let a held request, of the caller or of these, hold ``table`` instead of its own table,
        which is freed."""
        one = self._held.get(request)
        if one is not None:
            self._count(request, -1)
        self.shared.pool.release(request.table)
        request.cache = table
        self.shared.ledger.reserve(request, self.shared.ledger.held(table))
        if one is not None:
            self._count(request, 1)
            assert request.reserved is not None
            one.size = request.reserved.bytes

    # --- taking up ----------------------------------------------------------------------------

    def read_ahead(self, request: Request) -> None:
        """Start to read the cache that a request will reuse, if it is on disk."""
        if self.disk is not None:
            best = next(reversed(self.offers.beginnings(request)), None)
            if best is not None and best.place == "disk":
                self.read(request, best)

    def read(self, request: Request, one: Conversation) -> Found:
        """Read a cache from disk for a request; only once, even if it is evicted again."""
        assert self.disk is not None
        if one.reading:
            return "coming"
        if request.id in one.tried:
            return "none"
        if not self.host.make_room(one.size):
            return "none"
        one.tried.add(request.id)
        self.host.bytes += one.size
        self.disk.read(one)
        return "coming"

    def set_aside(self, offer: Offer) -> Cost | None:
        """Have what is offered stay while room is made for whoever takes it; what is reserved for
        that, which will be the taker's."""
        one, lender = offer.one, offer.lender
        if one is None:
            assert lender is not None
            offer.table = self.shared.pool.fork(lender.table, offer.length)
            return None
        one.coming = True
        if one.exported is not None:
            return None
        assert one.request is not None
        self._forget(one.request)
        return one.request.reserved

    def put_back(self, offer: Offer) -> None:
        """Cancel an offer that is not used."""
        one = offer.one
        if one is None:
            assert offer.table is not None
            self.shared.pool.release(offer.table)
            return
        one.coming = False
        if one.exported is None:
            assert one.request is not None
            self._count(one.request, 1)
            self._held[one.request] = one

    def hand_over(self, request: Request, offer: Offer) -> None:
        """Give a request the cache that was set aside for it, with its reservation, if any."""
        one = offer.one
        if one is None:
            self._lend(request, offer)
        else:
            one.coming = False
            self.hits_from["disk" if one.from_disk else one.place] += 1
            self._give(request, one)
            if not one.is_prefix:
                request.pinned = one.pinned
        request.reused, request.reused_entries = request.table.seen_len, request.table.layer_tokens
        self.reused_tokens += request.reused

    def _lend(self, request: Request, offer: Offer) -> None:
        """Begin a request on pages that it shares with another request."""
        table, lender = offer.table, offer.lender
        assert table is not None and lender is not None
        table.state = request.policy.truncated(table.state, table.kept)
        self.hits_from["device"] += 1
        request.take(table, Sequence(policy=request.policy, is_long=lender.is_long))

    def _give(self, request: Request, one: Conversation) -> None:
        """Give a held cache to a request, from any place."""
        here = one.request if one.exported is None else None
        if here is not None:
            table, old = here.table, Sequence(policy=here.policy, is_long=here.is_long)
            here.cache = None
            request.reserved, here.reserved = here.reserved, None
        else:
            assert one.exported is not None
            self._end_leave(one)
            table = self.shared.copier.import_(one.exported)
            old = Sequence(policy=request.policy, is_long=one.is_long)
            self.shared.pool.note_peak(table)
            self.loads += 1
        one.request = None
        self.discard(one)
        request.take(table, old)

    def hold_prefix(self, request: Request, pinned: float = 0.0) -> None:
        """Hold a copy of a request's cache, which covers its prefix, for other requests; without
        room for it, they compute it again."""
        if request.owner is None:
            return
        cost = self.shared.ledger.held(request.table)
        if cost.bytes > self.limit or not self.make_room_for(cost, None):
            return
        holder = request.holder()
        holder.take(self.shared.pool.fork(request.table), request)
        holder.pinned = pinned
        self.shared.ledger.reserve(holder, cost)
        self.keep(holder)

    @property
    def pin_limit(self) -> int:
        """Maximum bytes of all pinned caches."""
        return self.host.limit // 2

    def pinned_bytes(self) -> int:
        """Bytes of caches that must not be dropped."""
        return sum(one.size for one in self.index if one.is_pinned)

    # --- making room --------------------------------------------------------------------------

    def make_room_for(self, wanted: Cost, mine: Cost | None, patient: bool = False) -> bool:
        """Evict as many caches as needed to reserve ``wanted`` instead of ``mine``; False, without
        evictions, if that is not possible.

        patient : also False while their copies are in flight.
        """
        return self.could_have(wanted, mine) and self.free(wanted, mine, patient)

    def could_have(self, wanted: Cost, mine: Cost | None = None) -> bool:
        """Whether ``wanted`` could be reserved in place of ``mine`` if nothing were held."""
        given_back = self.cost.plus(self._on_leave())
        if mine is not None:
            given_back = given_back.plus(mine)
        return self.shared.ledger.fits(wanted, instead_of=given_back)

    def free(self, wanted: Cost, mine: Cost | None, patient: bool) -> bool:
        """``make_room_for``, if it is known to be possible."""
        ledger = self.shared.ledger
        nothing = Cost(np.zeros_like(ledger.pages), 0)
        self._end_leaves()
        while not ledger.fits(wanted, instead_of=(mine or nothing).plus(self._on_leave())):
            self._drop()
        if not ledger.fits(wanted, instead_of=mine):
            if patient:
                return False
            self._end_leaves(wait=True)
        return True

    def make_room(self) -> bool:
        """Evict the oldest; False if none is held."""
        if not self._held and not self._leaving:
            return False
        if self._held:
            self._drop()
        self._end_leaves(wait=True)
        return True

    def make_room_on_host(self, size: int, must: bool) -> bool:
        """``HostStore.make_room``; ``must``: also wait for caches that are being copied there."""
        self._end_leaves(wait=must)
        return self.host.make_room(size, must)

    def _forget(self, held: Request) -> Conversation:
        """Stop counting a request's cache as held in the pool; the request keeps it."""
        self._count(held, -1)
        return self._held.pop(held)

    def _drop(self) -> None:
        """Evict the oldest in the pool, to host memory if possible."""
        held = next(iter(self._held))
        one = self._forget(held)
        if self._spill(one, held):
            return
        self.shared.release(held)
        one.request = None
        self._lose(one)

    def _spill(self, one: Conversation, held: Request) -> bool:
        """Copy a cache to host memory and free its pages afterwards; False if there is no room for
        it."""
        size = self.shared.copier.host_bytes(one.size)
        if not self.limit or not self.host.make_room(size):
            return False
        one.size, one.tokens = size, held.text[: one.length]
        one.exported = self.shared.copier.export(held.table)
        one.leaving = True
        self._leaving.append(one)
        self.host.put(one)
        self.spills += 1
        self._end_leaves()
        return True

    def _on_leave(self) -> Cost:
        """Bytes in the pool of caches whose copies are in flight."""
        found = Cost(np.zeros_like(self.shared.ledger.pages), 0)
        for one in self._leaving:
            assert one.request is not None and one.request.reserved is not None
            found = found.plus(one.request.reserved)
        return found

    def _end_leaves(self, wait: bool = False) -> None:
        """Free the pages of caches whose copies to host memory have finished."""
        for one in list(self._leaving):
            assert one.exported is not None
            if wait or one.exported.is_here:
                self._end_leave(one)

    def _end_leave(self, one: Conversation) -> None:
        if one.leaving:
            assert one.request is not None and one.exported is not None
            one.exported.wait()
            self.shared.release(one.request)
            self._leaving.remove(one)
            one.request, one.leaving = None, False

    def _lose(self, one: Conversation) -> None:
        """Count a cache that was dropped for lack of room."""
        if one.is_pinned:
            log.warning("cache %s was pinned; preempted requests needed its room", one.id)
        self.index.remove(one)
        self.dropped += 1

    def _file_lost(self, one: Conversation) -> None:
        if one.place == "disk":
            self._lose(one)

    def discard(self, one: Conversation) -> None:
        """Drop a cache in all places."""
        self.index.remove(one)
        if one.request in self._held:
            self.shared.release(self._forgotten(one))
        self._end_leave(one)
        if one.exported is not None:
            self.host.remove(one)
        if self.disk is not None:
            self.disk.forget(one)

    def _forgotten(self, one: Conversation) -> Request:
        assert one.request is not None
        self._forget(one.request)
        return one.request

    # --- the disk's thread --------------------------------------------------------------------

    def poll(self) -> None:
        """Process finished writes and reads."""
        if self.disk is None:
            return
        for done in self.disk.poll():
            one = done.one
            if not done.was_read:
                continue
            self.host.bytes -= one.size  # it was counted in advance
            if one not in self.index.at(one.digest):  # deleted meanwhile
                continue
            if done.exported is None:
                self.index.remove(one)
                continue
            one.exported, one.tokens, one.from_disk = done.exported, done.tokens, True
            self.host.put(one)

    def wait(self) -> None:
        """Wait a moment for a read; called by an idle thread."""
        if self.disk is not None:
            self.disk.wait(PATIENCE)

    def clear(self) -> None:
        """Drop all caches that are not on disk."""
        self.poll()
        for one in list(self.index):
            if one.place == "host" and one.has_file:
                self._end_leave(one)
                self.host.remove(one)
            elif one.place != "disk":
                self.discard(one)

    def close(self) -> None:
        """Write caches that are not on disk yet, as far as there is room, the most recently used
        first; drop all of them from memory."""
        if self.disk is not None:
            self._end_leaves(wait=True)
            for one in reversed(self.host.held):
                if not (one.has_file or one.writing):
                    self.disk.write(one)
            for held in reversed(self.held):
                one = self._held[held]
                one.tokens = held.text[: one.length]
                one.exported = self.shared.copier.export(held.table)
                self.disk.write(one)
                self.disk.drain()
                one.exported = None
            self.disk.drain()
            self.disk.note_done()
            self.disk.close()
            self.disk = self.host.disk = None
        for one in list(self.index):
            if one.place == "disk":
                self.index.remove(one)
            else:
                self.discard(one)


def open_conversations(shared: Shared, weights: str) -> Conversations:
    """The caches for an engine's config.  weights : fingerprint of the model's weights, for files;
    ``ValueError`` for a folder that cannot be used."""
    config, disk = shared.config, None
    names = Names(shares=config.share_prefixes)
    if config.disk_kv_cache is not None:
        runner = shared.runner
        sizes = {k: v for k, v in runner.config.to_dict().items() if k not in ELSEWHERE}
        what = [
            weights or str(fingerprint(runner)),
            json.dumps(sizes, sort_keys=True, default=str),
            str(runner.dtype),
            config.kv_dtype,
            config.weights,
            str(shared.pool.layout.scores),
        ]
        model = blake2b("\n".join(what).encode(), digest_size=16).hexdigest()
        size = parse_bytes(config.disk_kv_memory or 0, "disk_kv_memory")
        disk = DiskStore(config.disk_kv_cache, size, model, shared.pool.on_gpu)
        names = Names(disk.secret, model, config.share_prefixes)
    host = HostStore(config.host_budget, disk)
    return Conversations(shared, int(config.budget * config.reuse_share), host, disk, names)
