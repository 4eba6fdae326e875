"""Who runs: admission, each step's plan, and what happens when memory runs out.

Running requests decode one token in every step.  Prompts share what is left of the step's
budget, oldest first; a long prompt spreads over many steps and never holds the others up.

By default a request begins when the most it can need fits beside what is reserved for others.
With ``admission="overcommit"`` it begins when what it is *expected* to need fits: its prompt in
full, and a share of the tokens it may generate.  Before every step at least what it may claim is
then reserved for each decoding request: one entry more in every layer, and no page shared.  One
that outlives what was expected is expected to go on for the same share of what is left to it.
Where reservations exceed what there is, in this order, until they fit:

1. expectations give way, the youngest request's first, down to what the next step needs;
2. caches of finished conversations go, the least recently finished first, to host memory while
   there is room;
3. (elastic) the compressed request with the highest ``keep`` gets a lower one, down to a floor;
4. the youngest request is preempted: its cache moves to host memory, where conversations give way
   to it, or is dropped and computed anew where the policy keeps everything and that was asked for.

A preempted request comes back before any that never began, as soon as what it is expected to need
from there on fits.  The oldest is preempted only when it is alone (caches that a caller holds then
take the room), and what could not be served alone was refused from the start: the oldest always
gets on, and every request comes to its end.  Pages cannot run out inside a pass, since reservations
count every page once for each owner and cover the pass.
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
from pyramidinfer.engine.request import Preempted, Request
from pyramidinfer.engine.reuse import Conversations, Found, Offer
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.batch import Work
from pyramidinfer.types import KVUsage

__all__ = ["Counts", "Plan", "Scheduler"]

#: What ``keep`` is multiplied by each time it is lowered.
STEP = 0.8


class Plan(NamedTuple):
    """One step: requests that decode, and requests whose prompt goes on with how much work.

    ``drafts``: what was guessed of those that decode, to be verified.
    """

    decode: list[Request]
    prefill: list[tuple[Request, Work]]
    drafts: dict[Request, Drafts] = {}  # noqa: RUF012

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        return [*self.decode, *(request for request, _ in self.prefill)]

    @property
    def fed(self) -> list[int]:
        """Tokens that each of those that decode feeds."""
        return [
            1 + len(self.drafts[each].tokens) if each in self.drafts else 1 for each in self.decode
        ]

    @property
    def given(self) -> list[tuple[Request, int]]:
        """Once it was run: requests that have logits, those that decode first and then those whose
        prompt came to its end, and how many each."""
        ended = [(each, work.prefill) for each, work in self.prefill if work.prefill.finished]
        decoded = list(zip(self.decode, self.fed, strict=True))
        return decoded + [(each, prefill.rows) for each, prefill in ended]


@dataclass
class Counts:
    """How often what was done: caches moved to host memory, caches freed to be computed anew,
    prompts in progress that began again, requests that came back, ``keep`` lowered."""

    swapped: int = 0
    recomputed: int = 0
    restarted: int = 0
    resumed: int = 0
    tightened: int = 0


class Scheduler:
    """Four queues: waiting (no memory yet), prefilling, running (decoding), and those that were
    preempted, the oldest first.

    ``moving``: the request that is being begun, preempted or brought back; where something is
    raised meanwhile it cannot go on, and whoever catches that has to end it.  ``flying``: requests
    of steps that are still on their way through the stages of a pipeline; the next one is of
    others.
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
        """Bytes of host memory that preempted requests take."""
        return sum(each.preempted.size for each in list(self.preempted) if each.preempted)

    def queue(self, request: Request) -> None:
        """Let a request wait, behind all others."""
        request.status = "waiting"
        self.waiting.append(request)
        self.conversations.read_ahead(request)

    # --- beginning ----------------------------------------------------------------------------

    def admit(self) -> None:
        """Let requests begin, or come back, as many as fit.

        Those that were preempted come before all that never began.  The oldest waits for room and
        nobody overtakes it, except who already holds a cache (an extended request): its pages are
        part of what the oldest waits for, and except while its cache comes from elsewhere.
        ``ValueError`` where nothing runs and nothing can begin.
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
        """Reserve for a request what it needs to begin, or to come back; "none" where that does not
        fit now."""
        wanted, mine, patient = request.likely, request.reserved, self._is_patient
        if request.status == "preempted":
            assert request.preempted is not None
            wanted = request.preempted.wanted
        elif not self._fits_at_worst(request):
            return "none"
        elif (found := self._go_on(request)) != "none":
            return found
        if not self.conversations.make_room_for(wanted, mine, patient):
            return "none"
        if request.owner is not None and request.status == "waiting":
            self.conversations.misses += 1
            self.conversations.queried_tokens += len(request.prompt)
        self.ledger.reserve(request, wanted)
        return "taken"

    def _go_on(self, request: Request) -> Found:
        """Have a waiting request begin with what was computed already: the longest that there is,
        if what is added then fits, or what a prompt in progress is about to leave."""
        held = self.conversations
        offers = held.offers(request)
        longest = offers[0].length if offers else 0
        if request.cache is None and held.lenders.is_coming(request, self.prefilling, longest):
            return "coming"
        for offer in offers:
            found = self._take_up(request, offer)
            if found != "none":
                return found
        return "none"

    def _take_up(self, request: Request, offer: Offer) -> Found:
        """Reserve what a request needs that goes on with what is offered, and give it that."""
        held = self.conversations
        if offer.one is not None and offer.one.place == "disk":
            return held.read(request, offer.one)
        costs = held.costs(request, offer)
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
        """Whether there is work while a copy is on its way; never on several ranks, which must not
        look at the time."""
        return self.in_flight > 0 and self.config.ranks == 1

    def _fits_at_worst(self, request: Request) -> bool:
        """Whether a further request can be had at its worst, host memory included."""
        if not self.overcommits:
            return True
        worst = sum(
            (each.cost if each.prefill is not None else _decode_cost(each)).bytes
            for each in (*self.prefilling, *self.running, *self.preempted)
        )
        most = self.pool.budget + self.config.host_budget - self.conversations.pinned_bytes()
        return not worst or worst + request.cost.bytes <= most

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
        """Share one step's layer-tokens out.

        Three quarters go to prompts in order of arrival, the oldest always getting at least a
        chunk; the rest goes to those with the least left to do, so that a short prompt behind a
        long one is not held up.
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
        """Those of a queue whose turn it is: all whose caches are here, or, where a pipeline has
        several steps on their way, its share of those that are in none."""
        stages = 1 if self.overcommits else self.shared.runner.stages.size
        here = [each for each in queue if each not in self.flying and each.table.is_here]
        return here[: -(-len(queue) // stages)]

    def _wait_for_caches(self) -> None:
        """Until what comes from host memory is here, where nobody else could run meanwhile."""
        requests = [*self.running, *self.prefilling]
        if self.config.ranks > 1 or not any(each.table.is_here for each in requests):
            for each in requests:
                each.table.wait()

    def to_running(self, request: Request) -> None:
        """A request's prompt is in: from now on it decodes."""
        self.remove(request)
        request.status = "running"
        self.running.append(request)
        self.conversations.lenders.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out of its queue."""
        for queue in (self.waiting, self.prefilling, self.running, self.preempted):
            if request in queue:
                queue.remove(request)

    # --- more reserved than there is ----------------------------------------------------------

    def relieve(self) -> None:
        """Reserve every decoding request what the next step may claim, and make that fit."""
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
        """Those that the next step may take beyond their reservation."""
        if not self.running:
            return []
        layout, kept = self.pool.layout, [each.table.kept for each in self.running]
        pages = [layout.by_layer(each // layout.page_size + 1) for each in kept]
        need = np.stack(list(map(layout.by_group, pages)))
        reserved = np.stack([each.reserved.pages for each in self.running if each.reserved])
        return [self.running[row] for row in np.nonzero((need > reserved).any(1))[0]]

    def _needed(self, request: Request) -> Cost:
        """What a decoding request holds, and what one step may add."""
        return self._after(request, 1)

    def _expected(self, request: Request) -> Cost:
        """What a decoding request is expected to need from here on."""
        left = max(1, request.max_new - len(request.output))
        return self._after(request, expected_of(self.config, left))

    def _after(self, request: Request, steps: int) -> Cost:
        """What a decoding request may need for so many tokens more."""
        kept, most = request.table.kept, _decode_cost(request)
        assert most.entries is not None
        entries = np.maximum(kept + 1, np.minimum(kept + steps, most.entries))
        return self.ledger.decode_cost(entries, most.overhead)

    def _expect_less(self) -> None:
        """Reserve no more than the next step needs, the youngest request's reservation first."""
        for request in sorted(self.running, key=_age, reverse=True):
            if not self.ledger.is_over:
                return
            self.ledger.reserve(request, self._needed(request))
            if request not in self._trimmed:
                self._trimmed.append(request)

    def _restore(self) -> None:
        """Reserve what is expected again, the oldest request first, as far as it fits."""
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
        """Lower the highest ``keep`` among compressed requests; False where none can be."""
        floor = self.config.elastic
        if floor is None:
            return False
        able = [each for each in self.running if _keep(each) > floor]
        able.sort(key=lambda each: (_keep(each), each.id), reverse=True)
        return any(self._lower(each, floor) for each in able)

    def _lower(self, request: Request, floor: float) -> bool:
        """Lower a request's ``keep`` until some layer is held to less, and evict at once."""
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
        """Take the youngest request out of the pool."""
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
        """Have a request's text computed anew, where that is asked for and gives the same."""
        shared, policy = self.shared, request.policy
        anew = self.config.preempt == "recompute" and policy.keeps_all
        anew &= shared.runner.rotary.grows_from is None  # else keys are rotated as it comes in
        if not anew or request.scoring is not None:
            return None
        left = request.max_new - len(request.output)
        most, likely = costs_of(
            shared, policy, len(request.text), left, request.protect, samples=request.width
        )
        if not self.ledger.ever_fits(most):  # a longer text than the prompt it began with
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
    """Give each work what it can use, in order; returns what is left over."""
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
