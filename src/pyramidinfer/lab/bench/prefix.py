"""``bench prefix``: chats with the same system prompt, which each of them computes or all share."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyramidinfer.engine import LLM
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.lab.bench.scaling_plans import PrefixPlan
from pyramidinfer.lab.bench.setting import FIRST_WORD, progress
from pyramidinfer.lab.bench.timing import spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.catalog import find_model
from pyramidinfer.policies.registry import make_policy, parse_spec
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["WAYS", "run_prefix"]

#: Each chat computes the system prompt, or they share it.
WAYS = ("anew", "shared")
OWNER = "bench"


def run_prefix(plan: PrefixPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    if plan.threads:
        torch.set_num_threads(plan.threads)
    result = {"rows": [_measure(plan, spec) for spec in plan.policies]}
    write_result(out, asdict(plan), result)
    return result


def _measure(plan: PrefixPlan, spec: str) -> dict[str, Any]:
    """Time to first token in seconds and tokens per second, both ways; the tokens must be equal."""
    name, own = parse_spec(spec)
    llm = LLM(
        find_model(plan.model), make_policy(name, **own), kv_memory=plan.kv_memory, dtype=plan.dtype
    )
    engine, same = llm.engine, True
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    rate: dict[str, list[float]] = {way: [] for way in WAYS}
    peak: dict[str, int] = {}
    try:
        with progress(spec, plan.repeats * len(WAYS)) as done:
            engine.run(_chats(engine, plan, WAYS[0], range(1)))  # warms up
            for repeat in range(plan.repeats):
                said = []
                for way in WAYS[repeat % 2 :] + WAYS[: repeat % 2]:
                    alone, together, peak[way], seconds = _once(engine, plan, way)
                    assert alone.times.first_token is not None
                    assert (alone.reused > 0) == (way == "shared")
                    first[way].append(alone.times.first_token - alone.times.arrived)
                    rate[way].append(plan.chats * plan.output / seconds)
                    said.append([each.output for each in (alone, *together)])
                    done(way)
                same &= said[0] == said[1]
    finally:
        llm.close()
    return {
        "policy": spec,
        "first_token_seconds": {way: spread(each) for way, each in first.items()},
        "tokens_per_second": {way: spread(each) for way, each in rate.items()},
        "peak_bytes": peak,
        "same_tokens": same,
    }


def _once(engine: Engine, plan: PrefixPlan, way: str) -> tuple[Request, list[Request], int, float]:
    """Seconds of one chat alone and of several together, and the peak bytes of the latter."""
    engine.conversations.clear()
    engine.run(_chats(engine, plan, way, range(1)))
    (alone,) = _chats(engine, plan, way, range(1, 2))
    engine.run([alone])
    engine.conversations.clear()
    engine.pool.peak_bytes = 0
    together = _chats(engine, plan, way, range(2, 2 + plan.chats))
    begun = time.perf_counter()
    engine.run(together)
    return alone, together, engine.pool.peak_bytes, time.perf_counter() - begun


def _chats(engine: Engine, plan: PrefixPlan, way: str, numbers: range) -> list[Request]:
    params = SamplingParams(max_tokens=plan.output, ignore_eos=True, temperature=0.0)
    system = list(_text(engine, 0, plan.system))
    return [
        engine.make(
            system + list(_text(engine, 1 + number, plan.question)),
            params,
            owner=OWNER if way == "shared" else None,
            prefix=0 if engine.policy.keeps_all else plan.system,
        )
        for number in numbers
    ]


def _text(engine: Engine, number: int, length: int) -> TokenIds:
    """Tokens that are unique to this number."""
    size = engine.runner.vocab_size - FIRST_WORD
    draw = torch.Generator().manual_seed(number)
    return (FIRST_WORD + torch.randint(0, size, (length,), generator=draw)).tolist()
