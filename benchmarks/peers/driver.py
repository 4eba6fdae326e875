"""What every driver shares: a JSON job in, warm-up, timing, one JSON line out.

Standard library only: it runs in each peer's own environment.  A job::

    {"model": folder, "work": folder for converted weights, "prompts": [[ids]], "max_new": 64,
     "threads": 2, "dtype": "bfloat16", "repeats": 2, "enough_seconds": 60, "options": {}}

A job with ``"convert_only": true`` makes the converted weights and measures nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

WARM_TOKENS = 4


@dataclass
class Answers:
    """tokens: new ones of every prompt; first_seconds: when the last first token was there, in
    seconds since the call, or None where the engine does not tell."""

    tokens: list[list[int]]
    first_seconds: float | None = None


@dataclass
class Engine:
    """generate(prompts, max_new): greedy, end of sequence ignored.  notes: anything to tell."""

    generate: Callable[[list[list[int]], int], Answers]
    packages: list[str]
    notes: dict[str, Any] = field(default_factory=dict)


def drive(
    load: Callable[[dict[str, Any]], Engine],
    convert: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Time the engine that ``load`` makes of a job.  ``convert`` makes its weights, once."""

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        if not job.get("convert_only"):
            return timed(load, job)
        start = time.perf_counter()
        if convert is not None:
            convert(job)
        return {"seconds": time.perf_counter() - start}

    reply(answer)


def reply(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run the job named on the command line; stdout gets the answer and nothing else."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    found = answer(json.loads(Path(sys.argv[1]).read_text()))
    out.write(json.dumps(found) + "\n")
    out.flush()
    os._exit(0)  # some engines hang in their own shutdown


def timed(load: Callable[[dict[str, Any]], Engine], job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure."""
    began = time.perf_counter()
    engine = load(job)
    loaded = time.perf_counter()
    engine.generate(job["prompts"][:1], min(WARM_TOKENS, job["max_new"]))
    warm = time.perf_counter()
    return {
        "versions": {name: version(name) for name in engine.packages},
        "load_seconds": loaded - began,
        "warm_seconds": warm - loaded,
        **measure(engine, job),
        "notes": engine.notes,
        "peak_rss_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """The most this process held.  Not ``ru_maxrss`` alone: that begins with the parent's."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Whole runs until there are ``repeats`` of them or ``enough_seconds`` have gone by."""
    prompts, new = job["prompts"], job["max_new"]
    totals: list[float] = []
    firsts: list[float] = []
    tokens: list[list[int]] = []
    while not totals or (len(totals) < job["repeats"] and sum(totals) < job["enough_seconds"]):
        start = time.perf_counter()
        answers = engine.generate(prompts, new)
        totals.append(time.perf_counter() - start)
        tokens = answers.tokens
        made = [len(each) for each in tokens]
        if made != [new] * len(prompts):
            raise RuntimeError(f"{new} tokens each were asked for; the engine made {made}")
        if answers.first_seconds is not None:
            firsts.append(answers.first_seconds)
    prefill_run = not firsts
    if prefill_run:
        start = time.perf_counter()
        engine.generate(prompts, 1)
        firsts.append(time.perf_counter() - start)
    return {
        "total_seconds": totals,
        "prefill_seconds": firsts,
        "prefill_in_own_run": prefill_run,
        "output_tokens": sum(len(each) for each in tokens),
        "tokens": tokens,
    }
