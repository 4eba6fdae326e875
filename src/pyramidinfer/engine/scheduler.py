"""Who works in the next step: first come, first served, and nobody waits for ever.

Running requests decode one token in every step.  Prompts share what is left of the step's
budget, oldest first; a long prompt spreads over many steps and never holds the others up.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.request import Request
from pyramidinfer.models.intake import Work

__all__ = ["Plan", "Scheduler"]


class Plan(NamedTuple):
    """One step: requests that decode, and requests whose prompt goes on with how much work."""

    decode: list[Request]
    prefill: list[tuple[Request, Work]]


class Scheduler:
    """Three queues: waiting (no memory yet), prefilling, running (decoding)."""

    def __init__(self, config: EngineConfig, ledger: Ledger, depth: int) -> None:
        self.config, self.ledger, self.depth = config, ledger, depth
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []

    @property
    def in_flight(self) -> int:
        return len(self.prefilling) + len(self.running)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.in_flight

    def admit(self) -> list[Request]:
        """Requests that begin now.  The oldest waits for room; nobody overtakes it."""
        begun = []
        while self.waiting and self.in_flight < self.config.max_requests:
            request = self.waiting[0]
            if not self.ledger.fits(request.cost, instead_of=request.promised):
                break
            self.ledger.promise(self.waiting.popleft(), request.cost)
            self.prefilling.append(request)
            begun.append(request)
        return begun

    def plan(self) -> Plan:
        """Share one step's layer-tokens out; the oldest prompt always gets at least a chunk."""
        budget = (self.config.step_tokens - len(self.running)) * self.depth
        budget = max(budget, self.config.prefill_chunk)
        prefill = []
        for request in self.prefilling:
            assert request.intake is not None
            share = min(budget, request.intake.work_left)
            if share <= 0:
                break
            prefill.append((request, Work(request.intake, share)))
            budget -= share
        return Plan(list(self.running), prefill)

    def to_running(self, request: Request) -> None:
        self.prefilling.remove(request)
        self.running.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out of its queue."""
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)
