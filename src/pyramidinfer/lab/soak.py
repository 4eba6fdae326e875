"""A server under load from many clients for minutes: ``pyramidinfer bench soak``.

Clients stream with mixed policies, budgets, lengths and options; a third of them disconnect at a
random moment.  The server has too little memory and a bounded queue, so that requests wait and some
are refused.  Afterwards the run is checked: only the statuses 200 and 429, no stream that ends
without a finish reason, no leaked page, no growing memory, and a clean exit.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from pyramidinfer.lab.bench.adapters import adapter_words
from pyramidinfer.lab.bench.load import Record, ask, client
from pyramidinfer.lab.bench.serve_plan import SoakPlan
from pyramidinfer.lab.bench.served import PEAK, PROGRAM, RUNNING, WAITING, Metrics, Served
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.soak_requests import Visitor, Wish

__all__ = ["memory_growth", "report", "run_soak"]

WARM_SHARE = 0.2  # share of the run; memory is compared with its level after it
GROWTH = 0.02  # allowed growth of memory afterwards
WINDOW = 0.1  # share of the run, for the windows compared at both ends
#: Every ``WAVE`` seconds, there are ``CALM`` seconds in which only one of ``BUSY_IN_CALM`` clients
#: sends: the queue empties, and caches of conversations stay until their next turn.
WAVE, CALM, BUSY_IN_CALM = 40.0, 15.0, 10
LAST_REQUESTS = 4  # in progress when the server gets SIGTERM
IN_USE, REUSABLE = "pyramidinfer:pool_pages_in_use", "pyramidinfer:pool_pages_reusable"
CHECKS, FAULTS = "pyramidinfer:pool_checks_total", "pyramidinfer:pool_check_failures_total"
WATCHED = (
    IN_USE,
    REUSABLE,
    CHECKS,
    FAULTS,
    PEAK,
    "pyramidinfer:reuse_bytes",
    "pyramidinfer:reuse_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "pyramidinfer:resumed_total",
    "pyramidinfer:tightened_total",
    "pyramidinfer:kv_entries_evicted_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
)


@dataclass
class _Seen:
    """The outcomes of the requests, and the memory, second by second."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    moments: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def add(self, record: Record, wish: Wish) -> None:
        self.outcomes[record.outcome] += 1
        self.statuses[record.status] += 1
        self.finishes.update(record.finish.values())
        self.tokens += len(record.arrivals)
        odd = record.status not in (0, 200, 429)
        if record.outcome == "failed" or odd:
            self.faults[f"{wish.path}: {record.why or f'status {record.status}'}"] += 1
        elif record.outcome == "completed" and len(record.finish) != wish.choices:
            self.faults[
                f"{wish.path}: {len(record.finish)} of {wish.choices} choices have a finish_reason"
            ] += 1


def run_soak(
    plan: SoakPlan, out: Path | None = None, program: Sequence[str] = PROGRAM
) -> dict[str, Any]:
    """Start a server, load it, write ``out``, and return the result; ``breaches`` lists the
    faults."""
    plan.check()
    with TemporaryDirectory() as folder:
        words = [*plan.words, *adapter_words(plan.model, plan.adapters, Path(folder))]
        server = Served(words, plan.threads, program)
        try:
            server.ready()
            began = time.perf_counter()
            seen = asyncio.run(_load(plan, server))
            seconds = time.perf_counter() - began
            breaches = [f"{count} times: {what}" for what, count in seen.faults.most_common(10)]
            idle, wrong = _after(server)
            breaches += wrong
            code, wrong = asyncio.run(_end(plan, server))
            breaches += wrong
        finally:
            server.kill()
    memory = memory_growth(seen.moments, seen.resident)
    if plan.judge_memory and (memory is None or memory["growth"] > GROWTH):
        breaches.append(_memory_words(memory))
    result = {
        "breaches": breaches,
        "seconds": seconds,
        "requests": sum(seen.outcomes.values()),
        "outcomes": dict(seen.outcomes),
        "statuses": {str(s): n for s, n in seen.statuses.items()},
        "finish_reasons": dict(seen.finishes),
        "streamed_tokens": seen.tokens,
        "after": idle,
        "memory": memory,
        "exit_code": code,
        "resident_mib": [round(each / 2**20, 1) for each in seen.resident],
    }
    if out is not None:
        write_result(out, asdict(plan), result)
    return result


# --- while it runs --------------------------------------------------------------------------------


async def _load(plan: SoakPlan, server: Served) -> _Seen:
    """Run all clients until the time is over; then wait for the answers still in progress."""
    seen = _Seen()
    start = time.perf_counter()
    end = start + plan.seconds
    model = server.model()
    adapters = [f"adapter-{number}" for number in range(plan.adapters)]

    async def one(number: int) -> None:
        visitor = Visitor(model, plan.seed, number, adapters)
        async with client(server.url) as http:
            while (now := time.perf_counter()) < end:
                if number % BUSY_IN_CALM and is_calm(now - start):
                    await asyncio.sleep(0.25)
                    continue
                wish = visitor.wish()
                await asyncio.sleep(wish.pause)
                record = await ask(http, wish.path, wish.body, start=start, leave=wish.leave)
                seen.add(record, wish)
                visitor.heard(wish, record)
                if record.outcome == "refused":
                    await asyncio.sleep(wish.patience)

    watcher = asyncio.create_task(_watch(server, seen, start))
    await asyncio.gather(*(one(number) for number in range(plan.clients)))
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    return seen


def is_calm(moment: float) -> bool:
    """Whether only a few clients send at this moment of the run."""
    return moment % WAVE > WAVE - CALM


async def _watch(server: Served, seen: _Seen, start: float) -> None:
    process = psutil.Process(server.pid)
    while True:
        seen.moments.append(time.perf_counter() - start)
        seen.resident.append(process.memory_info().rss)
        await asyncio.sleep(1.0)


def memory_growth(moments: Sequence[float], resident: Sequence[int]) -> dict[str, Any] | None:
    """Resident bytes after warm-up and at the end, as medians of windows; None if the series is too
    short."""
    if len(moments) < 20:
        return None
    length = moments[-1]

    def median(low: float, high: float) -> float:
        inside = [
            size
            for at, size in zip(moments, resident, strict=True)
            if low * length <= at <= high * length
        ]
        return float(np.median(inside))

    first, last = median(WARM_SHARE, WARM_SHARE + WINDOW), median(1 - WINDOW, 1)
    return {
        "warm_bytes": first,
        "end_bytes": last,
        "growth": last / first - 1,
        "peak_bytes": max(resident),
        "allowed": GROWTH,
    }


def _memory_words(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return "the run was too short to judge memory"
    first, last = memory["warm_bytes"] / 2**20, memory["end_bytes"] / 2**20
    return (
        f"resident memory grew by {memory['growth']:.1%} after warm-up ({first:.0f} to {last:.0f} "
        f"MiB; {GROWTH:.0%} allowed)"
    )


# --- and afterwards -------------------------------------------------------------------------------


def _after(server: Served) -> tuple[Metrics, list[str]]:
    """The metrics of the idle server, and the faults they show."""
    try:
        server.idle(60)
        time.sleep(1.0)  # an idle server checks its pool
        now = server.idle(5)
    except ValueError as error:
        return server.metrics(), [str(error)]
    missing = [name for name in (RUNNING, IN_USE, REUSABLE, CHECKS, FAULTS) if name not in now]
    if missing:
        return now, [f"/metrics lacks {name}" for name in missing]
    wrong = []
    if now[IN_USE] != now[REUSABLE]:
        wrong.append(
            f"{now[IN_USE]:.0f} pages are in use when idle, {now[REUSABLE]:.0f} of them "
            f"by conversations that may go on: the others leaked"
        )
    if now[FAULTS]:
        wrong.append(f"the pool's own check failed {now[FAULTS]:.0f} times")
    if not now[CHECKS]:
        wrong.append("the pool was never checked")
    return {name: now[name] for name in WATCHED if name in now}, wrong


async def _end(plan: SoakPlan, server: Served) -> tuple[int | None, list[str]]:
    """Send SIGTERM during requests: they must be answered completely, and the exit code must be
    0."""
    visitor = Visitor(server.model(), plan.seed, plan.clients)
    wishes = [visitor.long_wish() for _ in range(LAST_REQUESTS)]
    async with client(server.url) as http:
        tasks = [asyncio.create_task(ask(http, wish.path, wish.body)) for wish in wishes]
        taken = 0.0
        while taken < LAST_REQUESTS and not any(task.done() for task in tasks):
            now = await asyncio.to_thread(server.metrics)
            taken = now.get(RUNNING, 0) + now.get(WAITING, 0)
        code = await asyncio.to_thread(server.stop)
        records = await asyncio.gather(*tasks)
    wrong = [] if code == 0 else [f"after SIGTERM the server's exit code was {code}"]
    for record in records:
        if record.outcome != "completed":
            wrong.append(f"a request in hand at SIGTERM was not answered: {record.why}")
    return code, wrong


def report(result: dict[str, Any]) -> None:
    """Print what came of it."""
    counts = ", ".join(f"{number} {name}" for name, number in result["outcomes"].items())
    print(f"{result['requests']} requests in {result['seconds']:.0f} seconds: {counts}")
    memory = result["memory"]
    if memory is not None:
        print(
            f"resident memory: {memory['warm_bytes'] / 2**20:.0f} MiB after warm-up, "
            f"{memory['end_bytes'] / 2**20:.0f} at the end "
            f"({memory['growth']:+.1%})"
        )
    for breach in result["breaches"]:
        print(f"wrong: {breach}")
    print("soak: failed" if result["breaches"] else "soak: passed")
