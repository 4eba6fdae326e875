"""Running engines to their end, checked after every step, and what each request gives alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import POLICIES, Policy
from tests.engine.build import build, policy_named
from tests.tiny import random_prompt, tiny_model

#: Every policy as tests have it.
NAMES = sorted(POLICIES)


@cache
def model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(family, dtype)


def start(
    name: str | Policy, family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any
) -> Engine:
    """An engine with small pages, freed entries poisoned."""
    policy = policy_named(name) if isinstance(name, str) else name
    options = {"kv_memory": "4MiB", "page_size": 4, **options}
    return LLM(model(family, dtype), policy=policy, **options).engine


def queue(
    engine: Engine,
    prompt: list[int],
    new: int,
    policy: Policy | None = None,
    samples: int = 1,
    owner: str | None = None,
    **params: Any,
) -> Request:
    """A request of ``new`` tokens, and its samples."""
    wanted = SamplingParams(max_tokens=new, ignore_eos=True, **params)
    request = engine.make(prompt, wanted, policy=policy, samples=samples)
    for each in (request, *request.samples):
        each.owner = owner
    engine.submit(request)
    return request


def step(engine: Engine) -> list[Request]:
    """One step; what is held never exceeds what is reserved, nor that what there is."""
    ended = engine.step()
    engine.pool.check()
    ledger, pool = engine.ledger, engine.pool
    assert not ledger.is_over
    for request in (*engine.scheduler.prefilling, *engine.scheduler.running):
        assert request.reserved is not None
        held = ledger.held(request.table)
        assert (held.pages <= request.reserved.pages).all()
        assert held.bytes <= request.reserved.bytes
    assert pool.budget_used <= ledger.bytes <= pool.budget
    return ended


def finish(engine: Engine) -> None:
    """Until nothing is left to do."""
    while not engine.scheduler.idle:
        step(engine)
    engine.check()


@cache
def _roomy(name: str, family: str) -> Engine:
    return build(name, family).engine


@cache
def _alone(
    name: str, family: str, number: int, length: int, new: int, params: tuple[Any, ...]
) -> tuple[int, ...]:
    engine = _roomy(name, family)
    request = queue(engine, random_prompt(number, length), new, **dict(params))
    while request.finish_reason is None:
        engine.step()
    return tuple(request.output)


def alone(name: str, family: str, number: int, length: int, new: int, **params: Any) -> list[int]:
    """The tokens of ``random_prompt(number, length)`` with an engine to itself (float64)."""
    return list(_alone(name, family, number, length, new, tuple(sorted(params.items()))))


def talk(
    engine: Engine,
    prompt: list[int],
    new: int = 6,
    owner: str | None = "ann",
    policy: Policy | None = None,
    samples: int = 1,
) -> Request:
    """A turn, to its end."""
    request = queue(engine, prompt, new, policy, samples, owner)
    finish(engine)
    assert request.finish_reason == "length"
    return request


def after(turn: Request, number: int, length: int = 9) -> list[int]:
    """The text so far and more of it."""
    return turn.text + random_prompt(number, length)
