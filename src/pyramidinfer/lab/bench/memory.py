"""``bench memory``: how many requests a given ``kv_memory`` holds at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.plans import MemoryPlan
from pyramidinfer.lab.bench.setting import Rig, progress, run_pass
from pyramidinfer.lab.bench.timing import PeakMemory
from pyramidinfer.lab.record import write_result
from pyramidinfer.types import SamplingParams

__all__ = ["MemoryPlan", "run_memory"]

#: Default of the memory that requests share.


def run_memory(plan: MemoryPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    rig = Rig(plan.shared)
    rig.check_length(plan.prompt_len, plan.output_len)
    rows = []
    with progress("memory", len(plan.shared.policies)) as done:
        for spec in plan.shared.policies:
            rows.append(_measure(plan, rig, spec))
            done(spec)
    first = rows[0]["in_flight"]
    for row in rows:
        row["in_flight_against_first"] = row["in_flight"] / first if first else None
    result = {"rows": rows}
    write_result(out, plan.configuration, result)
    return result


def _measure(plan: MemoryPlan, rig: Rig, spec: str) -> dict[str, Any]:
    memory = PeakMemory(rig.device)
    engine = rig.engine(
        spec, plan.most, plan.prompt_len, plan.output_len, alone=True, max_requests=plan.most
    )
    budget = engine.pool.budget
    head = {"policy": spec, "options": repr(engine.policy), "kv_memory": budget}
    try:
        fits = _fits(engine, plan)
    except ValueError as error:  # not even one
        return {**head, "fits": 0, "in_flight": 0, "reason": str(error)}
    count = min(plan.most, 2 * fits + 1)
    run = run_pass(engine, rig.prompts(count, plan.prompt_len), plan.output_len)
    return {
        **head,
        "fits": fits,
        "requests": count,
        "in_flight": run.peak_in_flight,
        "is_capped": run.peak_in_flight >= plan.most,
        "peak_kv_bytes": engine.peak_bytes,
        "kv_bytes_per_request": run.end_bytes[0] / count,
        "full_bytes_per_request": run.end_bytes[1] / count,
        "kv_share_end": run.end_bytes[0] / run.end_bytes[1],
        "kv_share_prefill": run.prefill_bytes[0] / run.prefill_bytes[1],
        "seconds": run.seconds,
        "output_tokens_per_second": run.output_tokens / run.seconds,
        "peak_bytes": memory.bytes,
    }


def _fits(engine: Engine, plan: MemoryPlan) -> int:
    """Requests whose whole prompts may be prefilled at once; ``ValueError`` if one is too large."""
    params = SamplingParams(max_tokens=plan.output_len, ignore_eos=True)
    request = engine.make([0] * plan.prompt_len, params)
    return engine.ledger.how_many(request.cost)
