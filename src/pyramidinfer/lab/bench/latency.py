"""``bench latency``: time to first token and between tokens, over prompt lengths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.lab.bench.plans import LatencyPlan
from pyramidinfer.lab.bench.setting import Pass, Rig, progress, run_pass
from pyramidinfer.lab.bench.timing import spread
from pyramidinfer.lab.record import write_result

__all__ = ["LatencyPlan", "run_latency"]


def run_latency(plan: LatencyPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    rig = Rig(plan.setting)
    rig.check_length(max(plan.prompt_lens), plan.output_len)
    setting = plan.setting
    cells = [(batch, length) for batch in plan.batches for length in plan.prompt_lens]
    rounds = setting.warmup + setting.repeats
    rows = []
    with progress("latency", len(cells) * len(setting.policies) * rounds) as done:
        for batch, length in cells:
            prompts = rig.prompts(batch, length)
            engines = {
                spec: rig.engine(spec, batch, length, plan.output_len) for spec in setting.policies
            }
            passes: dict[str, list[Pass]] = {spec: [] for spec in engines}
            for repeat in range(rounds):
                for spec, engine in engines.items():
                    run = run_pass(engine, prompts, plan.output_len)
                    if repeat >= setting.warmup:
                        passes[spec].append(run)
                    done(f"{spec} {batch}x{length}")
            for spec, engine in engines.items():
                head = {
                    "policy": spec,
                    "options": repr(engine.policy),
                    "batch": batch,
                    "prompt_len": length,
                }
                rows.append({**head, **_figures(passes[spec])})
    result = {"rows": rows}
    write_result(out, plan.configuration, result)
    return result


def _figures(passes: list[Pass]) -> dict[str, Any]:
    first = [each[0] for run in passes for each in run.arrivals]
    between = [b - a for run in passes for each in run.arrivals for a, b in pairwise(each)]
    last = passes[-1]
    return {
        "first_token_seconds": {**_percentiles(first), **spread(first)},
        "inter_token_seconds": {**_percentiles(between), **spread(between)},
        "samples": {"first_token": len(first), "inter_token": len(between)},
        "kv_share_prefill": last.prefill_bytes[0] / last.prefill_bytes[1],
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{at}": float(np.percentile(values, at)) for at in (50, 99)}
