"""What happens when more is promised than there is (``admission="overcommit"``).

A request then begins when what it is *expected* to need fits: its prompt in full, and a share of
the tokens it may generate.  Before every step each decoding request is promised at least what the
step may claim: one entry more in every layer, and no page shared.  Who outlives what was expected
is expected to go on for the same share of what is left to it.  Where the promises then exceed what
there is, in this order, until they fit:

1. expectations give way, the youngest request's first, down to what the next step needs;
2. caches of finished conversations go, the least recently finished first;
3. (elastic) the compressed request with the highest ``keep`` gets a lower one, down to a floor;
4. the youngest request is preempted: its cache moves to host memory, or is let go of and computed
   anew where the policy keeps everything and that was asked for.

A preempted request comes back before any that never began, as soon as what it is expected to need
from there on fits.  The oldest is preempted only when it is alone (caches that a caller holds then
take the room), and what could not be served alone was refused from the start: the oldest always
gets on, and every request comes to its end.  Pages cannot run out inside a pass, since promises
count every page once for each owner and cover the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyramidinfer.engine.making import costs_of, expected_of
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.request import Away, Request
from pyramidinfer.models.intake import Sequence

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["Counts", "Pressure"]

#: What ``keep`` is multiplied by each time it is lowered.
STEP = 0.8


@dataclass
class Counts:
    """How often what was done: caches moved to host memory, caches let go of to be computed anew,
    prompts in progress that began again, requests that came back, ``keep`` lowered."""

    swapped: int = 0
    recomputed: int = 0
    restarted: int = 0
    resumed: int = 0
    tightened: int = 0


class Pressure:
    """Makes promises fit before a step begins."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config = engine, engine.config
        self.is_on = engine.config.admission == "overcommit"
        self.counts = Counts()
        groups = np.arange(len(engine.pool.groups))
        self._member = (engine.pool.group_of[:, None] == groups).astype(np.int64)  # [L, groups]
        self._trimmed: list[Request] = []  # expected to need more than they are promised

    @property
    def host_bytes(self) -> int:
        """Bytes of caches that are in host memory."""
        away = [each.away for each in list(self.engine.scheduler.away)]
        return sum(each.kv.bytes for each in away if each is not None and each.cache is not None)

    def relieve(self) -> None:
        """Promise every decoding request what the next step may claim, and make that fit."""
        if not self.is_on:
            return
        ledger = self.engine.ledger
        self._restore()
        for request in self._short(self.engine.scheduler.running):
            ledger.promise(request, self._expected(request))
        if ledger.is_over:
            self._expect_less()
        while ledger.is_over:
            if not (self.engine.conversations.make_room() or self._tighten()):
                self._preempt()

    def may_begin(self, request: Request) -> bool:
        """Whether a further request can be had at its worst, host memory included."""
        if not self.is_on:
            return True
        scheduler = self.engine.scheduler
        worst = sum(
            (each.cost if each.intake is not None else _settled(each)).bytes
            for each in (*scheduler.prefilling, *scheduler.running, *scheduler.away)
        )
        most = self.engine.pool.budget + self.config.swap_budget
        return not worst or worst + request.cost.bytes <= most

    def admits(self, request: Request) -> bool:
        """Whether a preempted request can come back now; it is promised what it needs then."""
        assert request.away is not None
        if not self.engine.conversations.clears(request.away.wanted, None):
            return False
        self.engine.ledger.promise(request, request.away.wanted)
        return True

    def resume(self, request: Request) -> None:
        """Bring a preempted request back into the pool."""
        engine, away, sequence = self.engine, request.away, _sequence(request)
        assert away is not None
        if away.cache is None:
            sequence.table = engine.pool.new_table(len(request.text))
            sequence.table.state = request.policy.start(sequence.layers)
            request.away = None
            engine.begin(request)
        else:
            sequence.table = engine.pool.import_(away.cache)
            request.away = None
            if request.intake is not None:
                request.intake.move(engine.adapter.device)
                sequence.table.transient_bytes = request.intake.transient_bytes
            engine.pool.note_peak(sequence.table)
        self.counts.resumed += 1

    # --- what is needed -----------------------------------------------------------------------

    def _short(self, running: list[Request]) -> list[Request]:
        """Those that the next step may take beyond their promise."""
        if not running:
            return []
        kept = np.stack([_sequence(each).table.kept for each in running])  # [R, layers, kv_heads]
        need = (kept // self.engine.pool.page_size + 1).sum(2) @ self._member
        promised = np.stack([each.promised.pages for each in running if each.promised])
        return [running[row] for row in np.nonzero((need > promised).any(1))[0]]

    def _needed(self, request: Request) -> Cost:
        """What a decoding request holds, and what one step may add."""
        return self._after(request, 1)

    def _expected(self, request: Request) -> Cost:
        """What a decoding request is expected to need from here on."""
        left = max(1, request.max_new - len(request.output))
        return self._after(request, expected_of(self.config, left))

    def _after(self, request: Request, steps: int) -> Cost:
        """What a decoding request may need for so many tokens more."""
        kept, most = _sequence(request).table.kept, _settled(request)
        assert most.entries is not None
        entries = np.maximum(kept + 1, np.minimum(kept + steps, most.entries))
        return self.engine.ledger.settled(entries, most.beside)

    def _expect_less(self) -> None:
        """Promise no more than the next step needs, the youngest request's promise first."""
        ledger = self.engine.ledger
        for request in sorted(self.engine.scheduler.running, key=_age, reverse=True):
            if not ledger.is_over:
                return
            ledger.promise(request, self._needed(request))
            if request not in self._trimmed:
                self._trimmed.append(request)

    def _restore(self) -> None:
        """Promise what is expected again, the oldest request first, as far as it fits."""
        if not self._trimmed:
            return
        ledger, running = self.engine.ledger, set(self.engine.scheduler.running)
        self._trimmed = sorted((each for each in self._trimmed if each in running), key=_age)
        while self._trimmed:
            expected = self._expected(self._trimmed[0])
            if not ledger.fits(expected, instead_of=self._trimmed[0].promised):
                return
            ledger.promise(self._trimmed.pop(0), expected)

    # --- what is done -------------------------------------------------------------------------

    def _tighten(self) -> bool:
        """Lower the highest ``keep`` among compressed requests; False where none can be."""
        floor = self.config.elastic
        if floor is None:
            return False
        able = [each for each in self.engine.scheduler.running if _keep(each) > floor]
        able.sort(key=lambda each: (_keep(each), each.id), reverse=True)
        return any(self._lower(each, floor) for each in able)

    def _lower(self, request: Request, floor: float) -> bool:
        """Lower a request's ``keep`` until some layer is held to less, and evict at once."""
        engine, sequence, keep = self.engine, _sequence(request), _keep(request)
        found = None
        while keep > floor and found is None:
            keep = max(floor, round(STEP * keep, 4))
            found = request.policy.tightened(keep, sequence.table.state, sequence.layers)
        if found is None:
            return False
        sequence.policy, sequence.table.state = found
        request.policy, request.lowered_to, sequence.idle = found[0], keep, 0
        engine.adapter.evict_now(engine.pool, sequence)
        most = _settled(request)
        assert most.entries is not None
        forecast = found[0].forecast(len(request.prompt), request.max_new, sequence.layers)
        kept = forecast.by_head(engine.adapter.kv_heads) + int(sequence.protected.sum())
        entries = np.minimum(most.entries, kept)
        request.cost = request.cost._replace(settled=engine.ledger.settled(entries, most.beside))
        engine.ledger.promise(request, self._needed(request))
        self.counts.tightened += 1
        return True

    def _preempt(self) -> None:
        """Take the youngest request out of the pool; if anything is raised, it is aborted."""
        engine, scheduler = self.engine, self.engine.scheduler
        request = max((*scheduler.prefilling, *scheduler.running), key=_age)
        sequence = _sequence(request)
        try:
            away = self._let_go(request) or self._moved(request)
            scheduler.send_away(request)
            request.away = away
            engine.pool.release(sequence.table)
            engine.ledger.promise(request, None)
        except BaseException:
            engine.abort(request)
            raise

    def _moved(self, request: Request) -> Away:
        """Copy a request's cache to host memory."""
        engine = self.engine
        kv, wanted = engine.usage(request), request.likely
        if request.intake is None:
            wanted = self._expected(request)
        away = Away(engine.pool.export(_sequence(request).table), kv, wanted)
        if request.intake is not None:
            request.intake.move("cpu")
        self.counts.swapped += 1
        return away

    def _let_go(self, request: Request) -> Away | None:
        """Have a request's text computed anew, where that is asked for and gives the same."""
        engine, policy = self.engine, request.policy
        anew = self.config.preempt == "recompute" and policy.keeps_all
        anew &= engine.adapter.rotary.grows_from is None  # else keys are turned as it comes in
        if not anew or request.scoring is not None:
            return None
        left = request.max_new - len(request.output)
        most, likely = costs_of(
            engine, policy, len(request.text), left, request.protect, samples=request.width
        )  # fmt: skip
        if not engine.ledger.ever_fits(most):  # a longer text than the prompt it began with
            return None
        kv = engine.usage(request)
        for each in (request, *(each for each in request.samples if each.sequence is None)):
            each.cost, each.likely = most, likely
        if request.output:
            self.counts.recomputed += 1
        else:
            request.reused = request.reused_entries = 0
            self.counts.restarted += 1
        request.intake = None
        return Away(None, kv, likely)


def _sequence(request: Request) -> Sequence:
    assert request.sequence is not None
    return request.sequence


def _settled(request: Request) -> Cost:
    assert request.cost.settled is not None
    return request.cost.settled


def _keep(request: Request) -> float:
    keep: float | None = getattr(request.policy, "keep", None)
    return keep or 0.0


def _age(request: Request) -> int:
    return request.id
