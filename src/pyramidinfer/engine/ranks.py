"""Engines of a model that is split over ranks: one leads, the others repeat its steps.

Every rank has the complete state of requests (tokens, lengths, reservations, queues) and its part
of the weights and of the cache.  Every change of an engine is sent to the others first, in one
order, and applied on all ranks.  Only rank 0 creates requests, samples tokens and reads the clock;
in each step it sends its samples to the others.  So nothing on another rank depends on its own
clock, free memory or random numbers.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pyramidinfer.engine.committing import Committer, Rows
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.holding import check_held, check_holds
from pyramidinfer.engine.launch import Link, RanksError
from pyramidinfer.engine.making import Spans
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.owned import Held
from pyramidinfer.engine.profiling import find_profile, profile_model, store_profile
from pyramidinfer.engine.recompress import Recompressor
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.scheduler import Plan
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models.pipeline import Flight, StageRunner
from pyramidinfer.models.runner import Stepped
from pyramidinfer.policies import Policy
from pyramidinfer.policies.profile import Profile
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["Follower", "Leader", "check_policy_sent"]


@dataclass(frozen=True, slots=True)
class Told:
    """The parts of a request that other ranks need."""

    id: int
    prompt: TokenIds
    params: SamplingParams
    max_new: int
    policy: int  # its number among the policies that were sent
    cost: Cost
    likely: Cost
    protect: tuple[tuple[int, int], ...]
    hold: bool
    scored: TokenIds | None
    owner: str | None
    prefix: int
    salt: str
    lowered_to: float | None
    lora: str | None
    onto: int | None
    samples: tuple[Told, ...]


class Chosen(NamedTuple):
    """A request's result in a step: its token (None if it failed), and why it ended."""

    token: int | None
    reason: str | None
    error: str | None


class Holding(NamedTuple):
    """Bytes that a rank holds, of weights and of pages in use, and bytes it has sent, by
    purpose."""

    weights: int
    cache: int
    sent: dict[str, int]


class Telling(Committer):
    """Commits the steps of rank 0, and sends the sampled tokens to the other ranks."""

    def __init__(self, link: Link, *parts: Any) -> None:
        super().__init__(*parts)
        self.link = link
        self._chosen: list[tuple[Request, int | None]] = []

    def commit(self, plan: Plan, stepped: Stepped, committed: set[Request]) -> list[Request]:
        self._chosen = []
        try:
            ended = super().commit(plan, stepped, committed)
        except Exception as error:  # the others wait for the samples
            raise self.link.fail(f"a step failed: {type(error).__name__}: {error}") from error
        self.link.tell(
            [Chosen(token, each.finish_reason, each.error) for each, token in self._chosen]
        )
        return ended

    def choose(self, request: Request, rows: Rows) -> str | None:
        before = len(request.output)
        reason = super().choose(request, rows)
        token = request.output[-1] if len(request.output) > before else None
        self._chosen.append((request, token))
        return reason


class Following(Committer):
    """Commits the steps of another rank, with the tokens that rank 0 sampled."""

    def __init__(self, link: Link, *parts: Any) -> None:
        super().__init__(*parts)
        self.link = link
        self._chosen: list[Chosen] = []

    def commit(self, plan: Plan, stepped: Stepped, committed: set[Request]) -> list[Request]:
        """Common work comes first; then rank 0's samples are applied."""
        given = [request for request, _ in plan.given if not request.ended]
        for row, request in enumerate(plan.decode):
            if not request.ended:
                self.advance(request, stepped, row)
        self._chosen = self.link.hear()[::-1]
        ended = []
        for request in given:
            ended += self._answer(request, Rows(stepped.logits[:0], [], []), committed)
        return ended

    def choose(self, request: Request, rows: Rows) -> str | None:
        token, reason, request.error = self._chosen.pop()
        if token is not None:
            request.output.append(token)
        return reason


class Split(Engine):
    """The engine of one rank of several.

    With pipeline stages, a step begins a batch of some requests and ends the oldest batch in
    flight: there are as many batches as stages, of different requests, so that each stage has one
    to work on.  With ``admission="overcommit"`` only one batch is in flight, because a lack of
    memory affects all requests.
    """

    def __init__(self, link: Link, *values: Any, **options: Any) -> None:
        self.link = link
        self._flights: deque[tuple[Plan, Flight]] = deque()
        super().__init__(*values, **options)

    def _run(self, plan: Plan) -> list[Request]:
        runner = self.runner
        if not isinstance(runner, StageRunner):
            return super()._run(plan)
        self.peak_in_flight = max(self.peak_in_flight, self.scheduler.in_flight)
        begun = time.perf_counter()
        try:
            return self._fly(runner, plan)
        except ValueError as error:  # of one stage only: the others wait for it
            raise self.link.fail(f"a step failed: {error}") from error
        finally:
            self.work.add(time.perf_counter() - begun)

    def _fly(self, runner: StageRunner, plan: Plan) -> list[Request]:
        """Begin a step, if there is work, and end the oldest one if it is due."""
        if plan.decode or plan.prefill:
            flight = runner.begin(self.pool, self._batch(plan))
            self._flights.append((plan, flight))
            self.scheduler.flying.update(plan.requests)
            if len(self._flights) < runner.stages.size and not self.scheduler.overcommits:
                return []
        if not self._flights:
            return []
        plan, flight = self._flights.popleft()
        self.scheduler.flying.difference_update(plan.requests)
        ended = self.committer.commit(plan, runner.end(self.pool, flight), set())
        runner.stages.let_go(len(self._flights))
        return ended

    def _holding(self) -> list[Holding]:
        """The memory and traffic of every stage's first rank; all ranks must call this."""
        runner = self.runner
        sent = runner.ranks.sent + runner.stages.sent
        mine = Holding(runner.ranks.weight_bytes, self.pool.budget_used, dict(sent))
        return runner.stages.gather(mine)


class Leader(Split):
    """The engine of rank 0."""

    def __init__(self, link: Link, *values: Any, **options: Any) -> None:
        self._busy, self._is_built = False, False
        self._policies: dict[Policy, int] = {}
        self._known: set[int] = set()  # requests that other ranks know
        super().__init__(link, *values, **options)
        self._is_built = True
        link.begin()

    def _committer(self) -> Committer:
        parts = self.shared, self.scheduler, self.conversations, self.drafter, self.end_ids
        return Telling(self.link, *parts)

    @contextmanager
    def together(self, name: str, *values: Any) -> Iterator[None]:
        """Run an operation on all ranks with these arguments."""
        if self._busy:  # already part of an operation on all ranks
            yield
            return
        with self.link.guarded():
            self._busy = True
            try:
                self.link.tell((name, values))
                yield
            finally:
                self._busy = False

    def _known_profile(self, measure: bool) -> Profile | None:
        if self.link.broken is not None or self._is_built:  # the other ranks are not asked again
            return find_profile(self.shared)
        found = find_profile(self.shared)
        self.link.tell(("profile", found))
        if found is None and measure:
            found = profile_model(self.shared)
            if self.tokenizer is not None:
                store_profile(found)
        return found

    # --- requests -----------------------------------------------------------------------------

    def check_policy(self, policy: Policy) -> None:
        super().check_policy(policy)
        check_policy_sent(policy)

    def submit(self, request: Request) -> None:
        check_held(request)
        with self.together("submit", self._told(request)):
            super().submit(request)

    def _go_on(self, request: Request, turn: Request) -> None:
        with self.together("go_on", request.id, self._told(turn)):
            super()._go_on(request, turn)

    def truncate(self, request: Request, seen_len: int) -> None:
        check_holds(request)
        with self.together("truncate", request.id, seen_len):
            super().truncate(request, seen_len)

    def recompress(self, request: Request) -> bool:
        if request.cache is None or not request.ended:
            return super().recompress(request)  # says that there is none
        with self.together("recompress", request.id):
            return super().recompress(request)

    def recompressor(self) -> Recompressor:
        raise ValueError(
            "compress_idle (serve --compress-idle) works on one rank only: omit it, or "
            "tensor_parallel_size and pipeline_parallel_size"
        )

    def release(self, request: Request) -> None:
        if request.ended and request.cache is not None:
            with self.together("release", request.id):
                super().release(request)

    def pin_cache(self, owner: str, id: str, ttl: float) -> Held:
        raise ValueError("caches can be pinned on one rank only: other ranks do not read the clock")

    def delete_cache(self, owner: str, id: str) -> None:
        with self.together("delete_cache", owner, id):
            super().delete_cache(owner, id)

    def fail(self, request: Request, reason: str = "error", error: str | None = None) -> None:
        if request.ended or request.id not in self._known:
            return super().fail(request, reason, error)
        if self.link.is_over:
            return super().fail(request, reason, self.link.broken or error)
        with self.together("fail", request.id, reason):
            super().fail(request, reason, error)
        ended = [each.id for each in (request, *request.samples) if each.ended]
        self._known.difference_update(ended)

    def holding(self) -> list[Holding]:
        """The memory and traffic of every stage's first rank so far."""
        with self.together("holding"):
            return self._holding()

    def _told(self, request: Request) -> Told:
        """The request for the other ranks; a new policy is sent before it."""
        number = self._policies.get(request.policy)
        if number is None:
            number = self._policies[request.policy] = len(self._policies)
            with self.together("learn", request.policy):
                pass
        self._known.add(request.id)
        scored = None if request.scoring is None else request.scoring.tokens
        onto = None if request.onto is None else request.onto.id
        lora = None if request.adapter is None else request.adapter.name
        return Told(
            request.id,
            request.prompt,
            request.params,
            request.max_new,
            number,
            request.cost,
            request.likely,
            request.protect,
            request.hold,
            scored,
            request.owner,
            request.prefix,
            request.salt,
            request.lowered_to,
            lora,
            onto,
            tuple(map(self._told, request.samples)),
        )

    # --- stepping -----------------------------------------------------------------------------

    def step(self) -> list[Request]:
        with self.together("step", _mark(self)):
            ended = super().step()
        self._known.difference_update(each.id for each in ended)
        return ended

    def step_singly(self) -> list[Request]:
        """A step that failed on some ranks cannot be undone on all of them."""
        self.link.check()
        raise RanksError("a step failed")

    def check_alive(self) -> None:
        self.link.check()

    def when_broken(self, tell: Callable[[str], None]) -> None:
        self.link.when_broken(tell)

    def close(self) -> None:
        self.link.close()


class Follower(Split):
    """The engine of another rank: runs commands of rank 0 until it gets the command to end."""

    def __init__(self, link: Link, *values: Any, **options: Any) -> None:
        self._told_of: dict[int, Request] = {}
        self._learned: list[Policy] = []
        super().__init__(link, *values, **options)

    def _committer(self) -> Committer:
        parts = self.shared, self.scheduler, self.conversations, self.drafter, self.end_ids
        return Following(self.link, *parts)

    def _known_profile(self, measure: bool) -> Profile | None:
        found: Profile | None = self.link.hear()[1]
        return profile_model(self.shared, progress=False) if found is None and measure else found

    def follow(self) -> NoReturn:
        """Run commands; ends the process when rank 0 ends the model."""
        try:
            while (command := self.link.hear()) != "close":
                name, values = command
                with suppress(ValueError):  # rank 0 has raised the same
                    getattr(self, f"_obey_{name}")(*values)
                self._told_of = {
                    number: each
                    for number, each in self._told_of.items()
                    if not each.ended or each.cache is not None
                }
        except RuntimeError as error:  # from torch.distributed, if another rank is lost
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RanksError(lines[0]) from error
        self.link.close()
        raise SystemExit(0)

    # --- commands -----------------------------------------------------------------------------

    def _obey_learn(self, policy: Policy) -> None:
        self._learned.append(policy)

    def _obey_submit(self, told: Told) -> None:
        self.submit(self._request(told))

    def _obey_go_on(self, old: int, told: Told) -> None:
        self._go_on(self._told_of[old], self._request(told))

    def _obey_truncate(self, number: int, seen_len: int) -> None:
        self.truncate(self._told_of[number], seen_len)

    def _obey_recompress(self, number: int) -> None:
        self.recompress(self._told_of[number])

    def _obey_release(self, number: int) -> None:
        if number in self._told_of:
            self.release(self._told_of[number])

    def _obey_delete_cache(self, owner: str, id: str) -> None:
        with suppress(KeyError):  # rank 0 has raised the same
            self.delete_cache(owner, id)

    def _obey_fail(self, number: int, reason: str) -> None:
        if number in self._told_of:
            self.fail(self._told_of[number], reason)

    def _obey_holding(self) -> None:
        self._holding()

    def _obey_step(self, mark: tuple[int, ...]) -> None:
        if mark != _mark(self):
            raise RanksError(f"this rank is out of step: {_mark(self)}, not {mark}")
        self.step()

    def _obey_trace(
        self, prompt: TokenIds, max_tokens: int, protect: Spans, lora: str | None
    ) -> None:
        trace(self, prompt, max_tokens, protect, lora)

    def _request(self, told: Told) -> Request:
        request = Request(
            policy=self._learned[told.policy],
            id=told.id,
            prompt=told.prompt,
            params=told.params,
            max_new=told.max_new,
            cost=told.cost,
            likely=told.likely,
            protect=told.protect,
            hold=told.hold,
            scoring=None if told.scored is None else Scoring(told.scored, False),
            samples=list(map(self._request, told.samples)),
            owner=told.owner,
            prefix=told.prefix,
            salt=told.salt,
            lowered_to=told.lowered_to,
            adapter=self.adapter(told.lora),
            onto=None if told.onto is None else self._told_of[told.onto],
        )
        for each in request.samples:
            each.leads = False
        self._told_of[request.id] = request
        return request


def check_policy_sent(policy: Policy) -> None:
    """``ValueError`` for a policy that cannot be sent to other processes."""
    if type(policy).__module__ == "__main__":
        raise ValueError(
            f"policy {policy.name!r} is defined in the program itself, where other ranks cannot "
            f"find it: put its class in a module that can be imported"
        )
    try:
        hash(policy)
        pickle.dumps(policy)
    except Exception as error:
        raise ValueError(
            f"policy {policy.name!r} cannot be sent to other ranks: {type(error).__name__}: {error}"
        ) from error


def _mark(engine: Engine) -> tuple[int, ...]:
    """Values that must be equal on all ranks before a step."""
    scheduler = engine.scheduler
    lengths = sum(len(each.output) for each in scheduler.running)
    queues = (scheduler.waiting, scheduler.prefilling, scheduler.running, scheduler.preempted)
    return (engine.ledger.bytes, lengths, *map(len, queues))
