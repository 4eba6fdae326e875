"""``bench throughput``: many requests at once, policies side by side in one run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.machine import measure_roof
from pyramidinfer.lab.bench.plans import ThroughputPlan
from pyramidinfer.lab.bench.roofline import roofline
from pyramidinfer.lab.bench.selection import measure_selection
from pyramidinfer.lab.bench.setting import Pass, Rig, progress, run_pass
from pyramidinfer.lab.bench.timing import PeakMemory, ratios, spread
from pyramidinfer.lab.record import write_result

__all__ = ["ThroughputPlan", "figures", "forget", "run_throughput"]


def run_throughput(plan: ThroughputPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    rig = Rig(plan.setting)
    rig.check_length(plan.prompt_len, plan.output_len)
    prompts = rig.prompts(plan.batch, plan.prompt_len)
    specs, setting = plan.setting.policies, plan.setting
    before = measure_roof(rig.dtype, rig.device)
    peaks: dict[str, int] = {}
    passes: dict[str, list[Pass]] = {spec: [] for spec in specs}
    total = len(specs) * (2 + setting.warmup + setting.repeats)
    with progress("throughput", total) as done:
        for spec in specs:  # alone in memory, for the peak
            memory = PeakMemory(rig.device)
            run_pass(_engine(plan, rig, spec, alone=True), prompts, plan.output_len)
            peaks[spec] = memory.bytes
            forget(rig.device)
            done(spec)
        engines = {spec: _engine(plan, rig, spec) for spec in specs}
        for repeat in range(setting.warmup + setting.repeats):
            for spec in specs:
                run = run_pass(engines[spec], prompts, plan.output_len)
                if repeat >= setting.warmup:
                    passes[spec].append(run)
                done(spec)
        selection = {}
        for spec in specs:  # with timers, after the measured passes
            selection[spec] = measure_selection(engines[spec], prompts, plan.output_len)
            done(spec)
    roof = before.best(measure_roof(rig.dtype, rig.device))
    base = passes[specs[0]]
    rows = []
    for spec in specs:
        row = {"policy": spec, "options": repr(engines[spec].policy), **figures(passes[spec])}
        step = row["step_seconds"]
        row["peak_bytes"] = peaks[spec]
        row["selection"] = selection[spec]
        row["roofline"] = roofline(
            rig.runner,
            passes[spec][-1],
            row["prefill_seconds"]["median"],
            step and step["median"],
            roof,
            setting.kv_dtype,
            setting.weights,
        )
        row["against_first"] = _against(passes[spec], base)
        rows.append(row)
    result = {"roof": roof.figures(), "parameters": rig.parameters, "rows": rows}
    write_result(out, plan.configuration, result)
    return result


def figures(passes: list[Pass]) -> dict[str, Any]:
    """The figures of the passes of one policy."""
    last = passes[-1]
    prompt = sum(each[0] for each in last.computed)
    new = last.output_tokens
    steps = [step for run in passes for step in run.step_seconds()]
    shares = [sum(each) / (len(last.kept_end) * each[0]) for each in last.computed]
    return {
        "seconds": spread([run.seconds for run in passes]),
        "prefill_seconds": spread([run.prefill_seconds for run in passes]),
        "step_seconds": spread(steps) if steps else None,
        "output_tokens_per_second": spread([new / run.seconds for run in passes]),
        "all_tokens_per_second": spread([(prompt + new) / run.seconds for run in passes]),
        "output_tokens": new,
        "prompt_tokens": prompt,
        "computed_share": sum(shares) / len(shares),
        "kv_bytes_prefill": last.prefill_bytes[0],
        "full_bytes_prefill": last.prefill_bytes[1],
        "kv_share_prefill": last.prefill_bytes[0] / last.prefill_bytes[1],
        "kv_bytes_end": last.end_bytes[0],
        "full_bytes_end": last.end_bytes[1],
        "kv_share_end": last.end_bytes[0] / last.end_bytes[1],
        "in_flight": last.peak_in_flight,
    }


def _against(mine: list[Pass], first: list[Pass]) -> dict[str, Any]:
    """Speed relative to the first policy, per repeat."""
    return {
        "throughput": ratios([run.seconds for run in first], [run.seconds for run in mine]),
        "prefill": ratios(
            [run.prefill_seconds for run in first], [run.prefill_seconds for run in mine]
        ),
    }


def forget(device: torch.device) -> None:
    """Free memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _engine(plan: ThroughputPlan, rig: Rig, spec: str, *, alone: bool = False) -> Engine:
    return rig.engine(spec, plan.batch, plan.prompt_len, plan.output_len, alone=alone)
