"""Who works in the next step: first come, first served, and nobody waits for ever.

Running requests decode one token in every step.  Prompts share what is left of the step's
budget, oldest first; a long prompt spreads over many steps and never holds the others up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.request import Request
from pyramidinfer.models.intake import Work

__all__ = ["Plan", "Scheduler"]


class Plan(NamedTuple):
    """One step: requests that decode, and requests whose prompt goes on with how much work."""

    decode: list[Request]
    prefill: list[tuple[Request, Work]]


class Scheduler:
    """Four queues: waiting (no memory yet), prefilling, running (decoding), and those that were
    preempted and are away, the oldest first."""

    def __init__(self, config: EngineConfig, depth: int) -> None:
        self.config, self.depth = config, depth
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.away: list[Request] = []

    @property
    def in_flight(self) -> int:
        return sum(each.width for each in self.prefilling) + len(self.running)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.in_flight and not self.away

    def admit(self, admits: Callable[[Request], bool]) -> Iterator[Request]:
        """Requests that begin now, or come back, one after the other; ``admits`` promises a
        request what it needs, or says no.

        Those that are away come before all that never began.  The oldest waits for room and nobody
        overtakes it, except who already holds a cache (an extended request): its pages are part of
        what the oldest waits for.
        """
        blocked = False
        for request in [*self.away, *self.waiting]:
            if self.in_flight + request.width > self.config.max_requests:
                break
            if blocked and (request.sequence is None or request.away is not None):
                continue
            if not admits(request):
                blocked = True
                continue
            self.remove(request)
            moved = request.away is not None and request.away.cache is not None
            decodes = moved and request.intake is None
            (self.running if decodes else self.prefilling).append(request)
            yield request

    def plan(self) -> Plan:
        """Share one step's layer-tokens out.

        Three quarters go to prompts in order of arrival, the oldest always getting at least a
        chunk; the rest goes to those with the least left to do, so that a short prompt behind a
        long one is not held up.
        """
        budget = (self.config.step_tokens - len(self.running)) * self.depth
        budget = max(budget, self.config.prefill_chunk)
        works = [Work(each.intake, 0) for each in self.prefilling if each.intake is not None]
        left = _grant(works, budget - budget // 4)
        _grant(sorted(works, key=lambda work: work.intake.work_left), left + budget // 4)
        chosen = zip(self.prefilling, works, strict=True)
        return Plan(list(self.running), [(each, work) for each, work in chosen if work.budget])

    def to_running(self, request: Request) -> None:
        self.prefilling.remove(request)
        self.running.append(request)

    def send_away(self, request: Request) -> None:
        """Queue a preempted request by its age."""
        self.remove(request)
        self.away.append(request)
        self.away.sort(key=lambda each: each.id)

    def remove(self, request: Request) -> None:
        """Take a request out of its queue."""
        for queue in (self.waiting, self.prefilling, self.running, self.away):
            if request in queue:
                queue.remove(request)


def _grant(works: list[Work], budget: int) -> int:
    """Give each work what it can use, in order; returns what is left over."""
    for work in works:
        more = min(budget, work.intake.work_left - work.budget)
        work.budget += more
        budget -= more
    return budget
