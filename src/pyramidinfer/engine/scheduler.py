"""The scheduler: admission, each step's plan, and what happens when memory runs out.

Running requests decode one token in every step.  Prompts share the rest of the step's budget,
oldest first; a long prompt is spread over many steps and never blocks other requests.

By default a request begins when the most memory it can need fits in addition to what is reserved
for others.  With ``admission="overcommit"`` it begins when the memory it is *expected* to need
fits: its whole prompt, and a share of the tokens it may generate.  Before every step, each decoding
request then has at least the memory reserved that the step may claim: one more entry in every
layer, and no shared page.  A request that generates more than expected is expected to generate the
same share of its remaining tokens.  If more is reserved than the pool has, the following is done,
in this order, until everything fits:

1. reservations of running requests are cut to what the next step needs, the youngest first;
2. caches of finished conversations are evicted, the least recently finished first, to host memory
   while there is room;
3. (elastic) the compressed request with the highest ``keep`` gets a lower one, down to a floor;
4. the youngest request is preempted: its cache moves to host memory, where conversations are
   evicted for it, or is dropped and recomputed later if the policy keeps everything and the
   config asks for it.

A preempted request resumes before any request that has not begun, as soon as the memory it is
expected to need from then on fits.  The oldest request is preempted only if it runs alone (then
caches that a caller holds use the memory).  Requests that would not fit alone are refused when they
arrive.  So the oldest request always makes progress, and every request finishes.  Pages cannot run
out inside a pass, because reservations count every page once for each owner and cover the whole
pass.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pyramidinfer.engine import answers
from pyramidinfer.engine.drafting import Drafts
from pyramidinfer.engine.making import costs_of, expected_of
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.offers import Offer
from pyramidinfer.engine.request import Preempted, Request
from pyramidinfer.engine.reuse import Conversations, Found
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.batch import Work
from pyramidinfer.types import KVUsage

__all__ = ["Counts", "Plan", "Scheduler"]

#: Factor that ``keep`` is multiplied by each time it is lowered.
STEP = 0.8


class Plan(NamedTuple):
    """One step: the requests that decode, and the requests in prefill with the work for each.

    ``drafts``: the drafted tokens of decoding requests, to be verified.
    """

    decode: list[Request]
    prefill: list[tuple[Request, Work]]
    drafts: dict[Request, Drafts] = {}  # noqa: RUF012

    @property
    def requests(self) -> list[Request]:
        """All requests of the step."""
        return [*self.decode, *(request for request, _ in self.prefill)]

    @property
    def fed(self) -> list[int]:
        """The number of tokens that each decoding request feeds."""
        return [
            1 + len(self.drafts[each].tokens) if each in self.drafts else 1 for each in self.decode
        ]

    @property
    def given(self) -> list[tuple[Request, int]]:
        """After the step has run: the requests with logits (decoding requests first, then those
        whose prefill finished), and the number of rows of each."""
        ended = [(each, work.prefill) for each, work in self.prefill if work.prefill.finished]
        decoded = list(zip(self.decode, self.fed, strict=True))
        return decoded + [(each, prefill.rows) for each, prefill in ended]


@dataclass
class Counts:
    """Numbers of events: caches moved to host memory, caches freed to be recomputed, prompts in
    progress that restarted, requests that resumed, times that ``keep`` was lowered."""

    swapped: int = 0
    recomputed: int = 0
    restarted: int = 0
    resumed: int = 0
    tightened: int = 0


class Scheduler:
    """Four queues: waiting (no memory yet), prefilling, running (decoding), and preempted, the
    oldest first.

    ``moving``: the request that is being started, preempted or resumed; if an exception is raised
    meanwhile, it cannot continue, and the caller that catches the exception has to end it.
    ``flying``: requests of steps that are still in the stages of a pipeline; the next step takes
    other requests.
    """

    def __init__(self, shared: Shared, conversations: Conversations) -> None:
        self.shared, self.conversations = shared, conversations
        self.config, self.ledger, self.pool = shared.config, shared.ledger, shared.pool
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.preempted: list[Request] = []
        self.moving: Request | None = None
        self.counts = Counts()
        self.flying: set[Request] = set()
        self._trimmed: list[Request] = []  # expected to need more than is reserved
        conversations.host.others = lambda: self.host_bytes

    @property
    def in_flight(self) -> int:
        return sum(each.width for each in self.prefilling) + len(self.running)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.in_flight and not self.preempted

    @property
    def overcommits(self) -> bool:
        return self.config.admission == "overcommit"

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory used by preempted requests, and by lossless requests whose caches
        are there."""
        swapped = sum(each.preempted.size for each in list(self.preempted) if each.preempted)
        tables = [each.cache for each in (*self.prefilling, *self.running) if each.cache]
        return swapped + sum(away.reserved for away in {each.away for each in tables if each.away})

    def queue(self, request: Request) -> None:
        """Add a request at the end of the waiting queue."""
        request.status = "waiting"
        self.waiting.append(request)
        self.conversations.read_ahead(request)

    # --- beginning ----------------------------------------------------------------------------

    def admit(self) -> None:
        """Start or resume as many requests as fit.

        Preempted requests come before those that have not begun.  The oldest request waits for
        memory, and no other request overtakes it, with two exceptions: a request that already holds
        a cache (an extended request), since its pages are part of what the oldest waits for, and
        any request while the cache of the oldest is still being copied or computed.  ``ValueError``
        if nothing runs and nothing can start.
        """
        self.conversations.poll()
        blocked = coming = False
        for request in [*self.preempted, *self.waiting]:
            if self.in_flight + request.width > self.config.max_requests:
                break
            if blocked and request.cache is None:
                continue
            found = self._reserve(request)
            if found != "taken":
                coming |= found == "coming"
                blocked |= found == "none"
                continue
            self.moving = request
            self.remove(request)
            if request.status == "preempted":
                self._resume(request)
            else:
                self.shared.start(request)
            if request.prefill is None:
                self.to_running(request)
            else:
                request.status = "prefilling"
                self.prefilling.append(request)
            self.moving = None
        left = [*self.preempted, *self.waiting]
        if left and not self.in_flight and coming:
            self.conversations.wait()
        elif left and not self.in_flight:
            wanted = left[0].preempted.wanted if left[0].preempted else left[0].likely
            raise ValueError(
                f"{self.ledger.bytes} bytes of kv_memory are held by finished requests, and the "
                f"next one needs {wanted.bytes} of {self.pool.budget}: release some of them"
            )

    def _reserve(self, request: Request) -> Found:
        """Reserve the memory that a request needs to start or resume; "none" if it does not fit
        now."""
        wanted, mine, patient = request.likely, request.reserved, self._is_patient
        if request.status == "preempted":
            assert request.preempted is not None
            wanted = request.preempted.wanted
        elif not self._fits_at_worst(request) or not self._may_fit_on_host(request):
            return "none"
        elif (found := self._go_on(request)) != "none":
            return found
        if not self.conversations.make_room_for(wanted, mine, patient):
            return "none"
        if request.away is not None and not self._fits_on_host(request.away.reserved):
            return "none" if self.in_flight else "coming"
        if request.owner is not None and request.status == "waiting":
            self.conversations.misses += 1
            self.conversations.queried_tokens += len(request.prompt)
        self.ledger.reserve(request, wanted)
        return "taken"

    def _go_on(self, request: Request) -> Found:
        """Start a waiting request from a cache that already exists: the longest one for which the
        additional memory fits, or one that a prompt in progress will leave soon ("coming")."""
        held = self.conversations
        offers = held.offers.find(request)
        longest = offers[0].length if offers else 0
        if request.cache is None and held.offers.lenders.is_coming(
            request, self.prefilling, longest
        ):
            return "coming"
        for offer in offers:
            found = self._take_up(request, offer)
            if found != "none":
                return found
        return "none"

    def _take_up(self, request: Request, offer: Offer) -> Found:
        """Reserve what a request needs if it continues from the offered cache, and hand the cache
        over."""
        held = self.conversations
        if offer.one is not None and offer.one.place == "disk":
            return held.read(request, offer.one)
        costs = held.offers.costs(request, offer)
        if costs is None or not self.ledger.ever_fits(costs[0]) or not held.could_have(costs[1]):
            return "none"
        mine, is_free = held.set_aside(offer), False
        try:
            is_free = held.free(costs[1], mine, self._is_patient)
        finally:
            if not is_free:
                held.put_back(offer)
        if not is_free:
            return "coming"
        held.hand_over(request, offer)
        held.queried_tokens += len(request.prompt)
        for each in (request, *request.samples):
            each.cost, each.likely = costs
        self.ledger.reserve(request, request.likely)
        if request.reused == request.prefix:
            held.hold_prefix(request, offer.one.pinned if offer.one else 0.0)
        return "taken"

    @property
    def _is_patient(self) -> bool:
        """Whether other requests can run while a copy is in progress.  Always False with several
        ranks, whose decisions must not depend on time."""
        return self.in_flight > 0 and self.config.ranks == 1

    def _fits_at_worst(self, request: Request) -> bool:
        """Whether a further request fits, host memory included, if every request needs its
        maximum."""
        if not self.overcommits:
            return True
        worst = sum(
            (each.cost if each.prefill is not None else _decode_cost(each)).bytes
            for each in (*self.prefilling, *self.running, *self.preempted)
        )
        most = self.pool.budget + self.config.host_budget - self.conversations.pinned_bytes()
        return not worst or worst + request.cost.bytes <= most

    def _may_fit_on_host(self, request: Request) -> bool:
        """Whether a request's host memory is free or held by conversations."""
        size = 0 if request.away is None else request.away.reserved
        return not size or size <= self.config.host_budget - self.host_bytes

    def _fits_on_host(self, size: int) -> bool:
        """Whether this many bytes of host memory are free, after conversations were evicted; last,
        since conversations may move there when room is made in the pool."""
        return self.conversations.make_room_on_host(size, must=not self.in_flight)

    def _resume(self, request: Request) -> None:
        """Bring a preempted request back into the pool."""
        shared, gone = self.shared, request.preempted
        assert gone is not None
        request.preempted = None
        if gone.cache is None:
            shared.start(request)
        else:
            request.cache = shared.copier.import_(gone.cache)
            if request.prefill is not None:
                request.prefill.move(shared.runner.device)
                request.cache.transient_bytes = request.prefill.transient_bytes
            self.pool.note_peak(request.cache)
        self.counts.resumed += 1

    # --- a step -------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Divide one step's layer-tokens among the prompts.

        Three quarters go to prompts in order of arrival, and the oldest always gets at least a
        chunk.  The rest goes to the prompts with the least work left, so that a long prompt does
        not block a short one that arrived later.
        """
        self._wait_for_caches()
        running, prefilling = self._turn(self.running), self._turn(self.prefilling)
        budget = (self.config.step_tokens - len(running)) * self.shared.runner.depth
        budget = max(budget, self.config.prefill_chunk)
        works = [Work(each.prefill, 0) for each in prefilling if each.prefill is not None]
        left = _grant(works, budget - budget // 4)
        _grant(sorted(works, key=lambda work: work.prefill.work_left), left + budget // 4)
        chosen = zip(prefilling, works, strict=True)
        return Plan(running, [(each, work) for each, work in chosen if work.budget])

    def _turn(self, queue: list[Request]) -> list[Request]:
        """The requests of a queue that the next step may take: all whose caches are in the pool.
        If a pipeline runs several steps at once: this step's share of those that are in none."""
        stages = 1 if self.overcommits else self.shared.runner.stages.size
        here = [each for each in queue if each not in self.flying and each.table.is_here]
        return here[: -(-len(queue) // stages)]

    def _wait_for_caches(self) -> None:
        """Wait for caches that are being copied from host memory, if no other request can run."""
        requests = [*self.running, *self.prefilling]
        if self.config.ranks > 1 or not any(each.table.is_here for each in requests):
            for each in requests:
                each.table.wait()

    def to_running(self, request: Request) -> None:
        """Move a request whose prefill has finished to the decoding requests."""
        self.remove(request)
        request.status = "running"
        self.running.append(request)
        self.conversations.offers.lenders.add(request)

    def remove(self, request: Request) -> None:
        """Remove a request from its queue."""
        for queue in (self.waiting, self.prefilling, self.running, self.preempted):
            if request in queue:
                queue.remove(request)

    # --- more reserved than there is ----------------------------------------------------------

    def relieve(self) -> None:
        """Reserve what the next step may claim for every decoding request, and free memory until
        the reservations fit."""
        if not self.overcommits:
            return
        self._restore()
        for request in self._short():
            self.ledger.reserve(request, self._expected(request))
        if self.ledger.is_over:
            self._expect_less()
        while self.ledger.is_over:
            if not (self.conversations.make_room() or self._tighten()):
                self._preempt()

    def _short(self) -> list[Request]:
        """The requests for which the next step may claim more than is reserved."""
        if not self.running:
            return []
        layout, kept = self.pool.layout, [each.table.kept for each in self.running]
        pages = [layout.by_layer(each // layout.page_size + 1) for each in kept]
        need = np.stack(list(map(layout.by_group, pages)))
        reserved = np.stack([each.reserved.pages for each in self.running if each.reserved])
        return [self.running[row] for row in np.nonzero((need > reserved).any(1))[0]]

    def _needed(self, request: Request) -> Cost:
        """The memory that a decoding request holds, plus what one step may add."""
        return self._after(request, 1)

    def _expected(self, request: Request) -> Cost:
        """The memory that a decoding request is expected to need from now on."""
        left = max(1, request.max_new - len(request.output))
        return self._after(request, expected_of(self.config, left))

    def _after(self, request: Request, steps: int) -> Cost:
        """The memory that a decoding request may need for ``steps`` more tokens."""
        kept, most = request.table.kept, _decode_cost(request)
        assert most.entries is not None
        entries = np.maximum(kept + 1, np.minimum(kept + steps, most.entries))
        return self.ledger.decode_cost(entries, most.overhead)

    def _expect_less(self) -> None:
        """Cut reservations to what the next step needs, the youngest request's first."""
        for request in sorted(self.running, key=_age, reverse=True):
            if not self.ledger.is_over:
                return
            self.ledger.reserve(request, self._needed(request))
            if request not in self._trimmed:
                self._trimmed.append(request)

    def _restore(self) -> None:
        """Restore reservations to what is expected, the oldest request's first, while they fit."""
        if not self._trimmed:
            return
        ledger, running = self.ledger, set(self.running)
        self._trimmed = sorted((each for each in self._trimmed if each in running), key=_age)
        while self._trimmed:
            expected = self._expected(self._trimmed[0])
            if not ledger.fits(expected, instead_of=self._trimmed[0].reserved):
                return
            ledger.reserve(self._trimmed.pop(0), expected)

    def _tighten(self) -> bool:
        """Lower the highest ``keep`` among compressed requests; False if none can be lowered."""
        floor = self.config.elastic
        if floor is None:
            return False
        able = [each for each in self.running if _keep(each) > floor]
        able.sort(key=lambda each: (_keep(each), each.id), reverse=True)
        return any(self._lower(each, floor) for each in able)

    def _lower(self, request: Request, floor: float) -> bool:
        """Lower a request's ``keep`` until the limit of some layer falls, and evict at once."""
        runner, table, keep = self.shared.runner, request.table, _keep(request)
        found = None
        while keep > floor and found is None:
            keep = max(floor, round(STEP * keep, 4))
            found = request.policy.tightened(keep, table.state, request.layers)
        if found is None:
            return False
        request.policy, table.state = found
        request.lowered_to, request.idle = keep, 0
        table.wait()
        runner.evict_now(self.pool, request)
        most = _decode_cost(request)
        assert most.entries is not None
        came_at_once = request.prompt_len >= len(request.prompt)
        find = request.policy.forecast if came_at_once else request.policy.forecast_extended
        bound, entries = find(len(request.prompt), request.max_new, request.layers), most.entries
        if bound is not None:
            kept = bound.by_head(runner.kv_heads) + int(request.protected.sum())
            entries = np.minimum(entries, kept)
        request.cost = request.cost._replace(
            after_prefill=self.ledger.decode_cost(entries, most.overhead)
        )
        self.ledger.reserve(request, self._needed(request))
        self.counts.tightened += 1
        return True

    def _preempt(self) -> None:
        """Preempt the youngest request."""
        request = max((*self.prefilling, *self.running), key=_age)
        self.moving = request
        gone = self._recompute(request) or self._moved(request)
        self.remove(request)
        self.preempted.append(request)
        self.preempted.sort(key=_age)
        self.pool.release(request.table)
        request.cache, request.preempted, request.status = None, gone, "preempted"
        self.ledger.reserve(request, None)
        self.moving = None

    def _moved(self, request: Request) -> Preempted:
        """Copy a request's cache to host memory."""
        kv, wanted, reserved = self._usage(request), request.likely, request.reserved
        assert reserved is not None
        if request.prefill is None:
            wanted, reserved = self._expected(request), self.ledger.held(request.table)
        size = self.shared.copier.host_bytes(reserved.bytes)
        self.conversations.host.make_room(size, must=True)
        exported = self.shared.copier.export(request.table)
        if request.prefill is not None:
            request.prefill.move("cpu")
        exported.wait()  # its pages are needed at once
        gone = Preempted(exported, kv, wanted, size)
        self.counts.swapped += 1
        return gone

    def _recompute(self, request: Request) -> Preempted | None:
        """Prepare a preempted request to be recomputed.  None unless the config asks for it
        and recomputing gives the same cache."""
        shared, policy = self.shared, request.policy
        anew = self.config.preempt == "recompute" and policy.keeps_all
        anew &= shared.runner.rotary.grows_from is None  # else recomputed keys would differ
        if not anew or request.scoring is not None:
            return None
        left = request.max_new - len(request.output)
        most, likely = costs_of(
            shared, policy, len(request.text), left, request.protect, samples=request.width
        )
        if not self.ledger.ever_fits(most):  # a text longer than the prompt
            return None
        kv = self._usage(request)
        for each in (request, *request.waiting_samples):
            each.cost, each.likely = most, likely
        if request.output:
            self.counts.recomputed += 1
        else:
            request.reused = request.reused_entries = 0
            self.counts.restarted += 1
        request.prefill = None
        return Preempted(None, kv, likely)

    def _usage(self, request: Request) -> KVUsage:
        return answers.usage(self.pool, self.shared.runner, request)


def _grant(works: list[Work], budget: int) -> int:
    """Give each work what it can use, in order; returns what is left."""
    for work in works:
        more = min(budget, work.prefill.work_left - work.budget)
        work.budget += more
        budget -= more
    return budget


def _decode_cost(request: Request) -> Cost:
    assert request.cost.after_prefill is not None
    return request.cost.after_prefill


def _keep(request: Request) -> float:
    keep: float | None = getattr(request.policy, "keep", None)
    return keep or 0.0


def _age(request: Request) -> int:
    return request.id
