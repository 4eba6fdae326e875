"""Runs an engine's driver in its own process; returns its answer, or why it failed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.lab.bench.engines import Engine
from pyramidinfer.lab.bench.timing import spread

__all__ = ["LIMIT", "agreement", "ask_driver", "figures", "first_agreement", "why_missing"]

Row = dict[str, Any]
#: Time limit of a driver if none is given, seconds.
LIMIT = 1800.0


def ask_driver(
    engine: Engine,
    job: dict[str, Any],
    threads: int,
    environments: Path,
    drivers: Path,
    work: Path,
    limit: float = LIMIT,
) -> Row:
    """``status`` and the answer (``said``) of an engine's driver to a job, or the ``reason`` why
    there is none."""
    python = engine.python(environments)
    why = why_missing(engine, python, environments)
    if why:
        return {"status": "not installed", "reason": why}
    path = work / "job.json"
    path.write_text(json.dumps(job))
    count = str(threads)
    setting = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [str(python), str(drivers / engine.driver), str(path)],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **setting},
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {limit:g} seconds"}
    except OSError as error:
        return {"status": "failed", "reason": str(error)}
    if done.returncode:
        return {"status": "failed", "reason": _last_line(done.stderr) or f"code {done.returncode}"}
    try:
        return {"status": "ok", "said": json.loads(done.stdout.splitlines()[-1])}
    except (ValueError, IndexError) as error:
        return {"status": "failed", "reason": f"its driver's answer is no result: {error!r}"}


def why_missing(engine: Engine, python: Path, environments: Path) -> str:
    """Why an engine is not installed; empty if it is."""
    if engine.environment is None:
        return ""
    failed = environments / engine.environment / "failed.txt"
    if failed.is_file():
        return " ".join(failed.read_text().split())[:400]
    return "" if python.exists() else f"{python.parent.parent} does not exist; run `make peers`"


def figures(said: Row, job: dict[str, Any]) -> Row:
    """Rates of a run; a step's time is the time after the first tokens, divided evenly."""
    new, count = job["max_new"], len(job["prompts"])
    totals, firsts = said["total_seconds"], said["prefill_seconds"]
    made = [len(each) for each in said["tokens"]]
    if made != [new] * count or said["output_tokens"] != new * count:
        raise ValueError(f"it generated {made} tokens instead of {count} x {new}")
    total, first = float(np.median(totals)), float(np.median(firsts))
    prompt = sum(len(each) for each in job["prompts"])
    return {
        "seconds": spread(totals),
        "prefill_seconds": spread(firsts),
        "repeats": len(totals),
        "step_seconds": (total - first) / (new - 1),
        "output_tokens_per_second": new * count / total,
        "all_tokens_per_second": (prompt + new * count) / total,
        "prefill_in_own_run": said["prefill_in_own_run"],
        "load_seconds": said["load_seconds"],
        "peak_rss_bytes": said["peak_rss_bytes"],
        "versions": said["versions"],
        "notes": said["notes"],
        "tokens": said["tokens"],
    }


def agreement(mine: list[list[int]], judge: list[list[int]]) -> float:
    """Share of equal tokens at the same positions."""
    pairs = [a == b for x, y in zip(mine, judge, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def first_agreement(mine: list[list[int]], judge: list[list[int]]) -> float:
    """Share of answers with the same first token."""
    return agreement([each[:1] for each in mine], [each[:1] for each in judge])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
