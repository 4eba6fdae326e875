"""``bench stages``: layers split over two stages evenly, compared with a split by the policy's
forecast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pyramidinfer.engine import LLM
from pyramidinfer.engine.dealing import layer_work
from pyramidinfer.lab.bench.scaling_plans import StagesPlan
from pyramidinfer.lab.bench.setting import FIRST_WORD, progress
from pyramidinfer.lab.bench.timing import ratios, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import empty_model
from pyramidinfer.policies import Policy
from pyramidinfer.policies.registry import make_policy, parse_spec
from pyramidinfer.types import SamplingParams

__all__ = ["StagesPlan", "run_stages"]


def run_stages(plan: StagesPlan, out: Path) -> dict[str, Any]:
    """Run, write ``out``, and return its result."""
    rows = []
    with progress("stages", len(plan.policies) * 2 * plan.repeats) as done:
        for spec in plan.policies:
            ways: dict[str, list[dict[str, Any]]] = {"even": [], "forecast": []}
            for _ in range(plan.repeats):
                for way, runs in ways.items():
                    runs.append(_run(plan, spec, way))
                    done(f"{spec}, {way}")
            even, dealt = ways["even"], ways["forecast"]
            rows.append(
                {
                    "policy": spec,
                    **{way: _summary(runs) for way, runs in ways.items()},
                    "same_tokens": all(each["tokens"] == even[0]["tokens"] for each in dealt),
                    "times_even": ratios(
                        [each["seconds"] for each in even], [each["seconds"] for each in dealt]
                    ),
                }
            )
    result = {"rows": rows}
    write_result(out, asdict(plan), result)
    return result


def _run(plan: StagesPlan, spec: str, way: str) -> dict[str, Any]:
    """All requests once, in processes that are started for the run and end with it."""
    depth = ModelRunner(empty_model(plan.name, plan.dtype)[0], "reference").depth
    half = -(-depth // 2)
    options: dict[str, Any] = {"pipeline_layers": f"{half},{depth - half}"} if way == "even" else {}
    llm = LLM(
        plan.name,
        _policy(spec),
        kv_memory=plan.kv_memory,
        dtype=plan.dtype,
        pipeline_parallel_size=2,
        **options,
    )
    with _closing(llm):
        size = llm.engine.runner.vocab_size
        prompts = [
            [FIRST_WORD + (7 * place + 31 * each) % (size - FIRST_WORD) for place in range(length)]
            for each, length in enumerate([plan.prompt] * plan.requests)
        ]
        params = SamplingParams(max_tokens=plan.new, ignore_eos=True, temperature=0.0)
        llm.generate(prompts[0][:64], params)  # warms up
        before, begun = _busy(), time.monotonic()
        tokens = [each.token_ids for each in llm.generate(prompts, params)]
        seconds = time.monotonic() - begun
        busy = [after - earlier for after, earlier in zip(_busy(), before, strict=True)]
        layers, policy = [len(each) for each in llm.engine.runner.stages.layers], llm.policy
    empty = empty_model(plan.name, plan.dtype)[0]
    work, head = layer_work(empty, ModelRunner(empty, "reference"), policy)
    first = sum(work[: layers[0]])
    shares = [first, sum(work) + head - first]
    return {
        "layers": layers,
        "seconds": seconds,
        "busy": busy,
        "busiest_by_forecast": max(shares) / sum(shares),
        "tokens": tokens,
    }


def _policy(spec: str) -> Policy:
    name, options = parse_spec(spec)
    return make_policy(name, **options)


@contextmanager
def _closing(llm: LLM) -> Iterator[None]:
    try:
        yield
    finally:
        llm.close()


def _busy() -> list[float]:
    """CPU seconds of this process, and of the other rank's."""
    family = psutil.Process()
    times = [each.cpu_times() for each in (family, *family.children())]
    return [each.user + each.system for each in times]


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "layers": runs[0]["layers"],
        "busiest_by_forecast": runs[0]["busiest_by_forecast"],
        "seconds": spread([each["seconds"] for each in runs]),
        "busiest": spread([max(each["busy"]) / sum(each["busy"]) for each in runs]),
    }
