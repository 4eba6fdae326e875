"""``bench scale``: a model over several ranks on this machine, compared with the formula."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pyramidinfer.engine import LLM
from pyramidinfer.engine.dealing import deal_layers
from pyramidinfer.engine.ranks import Leader
from pyramidinfer.lab.bench.scale_plan import (
    Split,
    Work,
    cache_bytes,
    simulate,
    weight_bytes,
    wire_bytes,
)
from pyramidinfer.lab.bench.scaling_plans import ScalePlan
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import SHIPPED
from pyramidinfer.lab.shapes import empty_shape
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import empty_model
from pyramidinfer.policies import Policy, make_policy
from pyramidinfer.types import SamplingParams

__all__ = ["ScalePlan", "run_scale"]

#: Policies by their name in a table; others that select tokens during decode cannot be simulated.
POLICIES: dict[str, tuple[str, float | None]] = {
    "full": ("full", None),
    "snapkv, keep 0.3": ("snapkv", 0.3),
    "pyramid, keep 0.3": ("pyramid", 0.3),
}
#: Configurations that are only simulated: a known shape, ranks and stages, a prompt, an answer.
PAPER = ("llama3-70b", ((1, 1), (8, 1), (1, 8), (64, 1), (8, 8)), Work(8192, 128))


def run_scale(plan: ScalePlan, out: Path) -> dict[str, Any]:
    """Run, simulate, write ``out``, and return its result."""
    rows: list[dict[str, Any]] = []
    expected: dict[str, list[int]] = {}
    with progress("ranks", len(plan.sizes) * len(POLICIES)) as done:
        for tensor, stages in plan.sizes:
            llm = _open(plan, tensor, stages)
            try:
                for words, (name, keep) in POLICIES.items():
                    row = _measure(plan, llm, make_policy(name, keep), tensor)
                    tokens = row.pop("tokens")
                    same = expected.setdefault(words, tokens) == tokens
                    size = {"tensor": tensor, "stages": stages}
                    rows.append({"policy": words, **size, "same_tokens": same, **row})
                    done(f"{tensor} x {stages}, {words}")
            finally:
                llm.close()
    result = {"rows": rows, "paper": _on_paper()}
    write_result(out, {**asdict(plan), "model": plan.model or SHIPPED}, result)
    return result


def _open(plan: ScalePlan, tensor: int, stages: int) -> LLM:
    options: dict[str, Any] = {}
    if tensor > 1:
        options["tensor_parallel_size"] = tensor
    if stages > 1:
        options["pipeline_parallel_size"] = stages
    return LLM(plan.name, "pyramid", kv_memory=plan.kv_memory, dtype=plan.dtype, **options)


def _measure(plan: ScalePlan, llm: LLM, policy: Policy, tensor: int) -> dict[str, Any]:
    """One request: bytes that every stage's first rank sent, bytes it held at the end, and the
    values of the formula."""
    engine = llm.engine
    split = Split(tensor, engine.runner.stages.layers)
    before = []
    if isinstance(engine, Leader):
        before = [Counter(each.sent) for each in engine.holding()]
    size = engine.runner.vocab_size
    prompt = [3 + 7 * place % (size - 3) for place in range(plan.prompt)]
    request = engine.make(
        prompt,
        SamplingParams(max_tokens=plan.new, ignore_eos=True, temperature=0.0),
        policy=policy,
        hold=True,
    )
    begun = time.monotonic()
    engine.run([request])
    seconds = time.monotonic() - begun
    family = psutil.Process()
    processes = [family, *family.children()]
    stages = range(len(split.layers))
    empties = [empty_model(plan.name, plan.dtype)[0] for _ in stages]
    runner = ModelRunner(empty_model(plan.name, plan.dtype)[0], "reference")
    weights = [weight_bytes(empties[stage], runner, split, stage) for stage in stages]
    wanted, lens = simulate(runner, request.policy, Work(plan.prompt, plan.new), split)
    if isinstance(engine, Leader):
        held = engine.holding()
        sent = [Counter(each.sent) - old for each, old in zip(held, before, strict=True)]
        cache, loaded = [each.cache for each in held], [each.weights for each in held]
    else:
        sent, cache, loaded = [Counter()], [engine.pool.budget_used], weights
    engine.release(request)
    return {
        "tokens": request.output,
        "layers": [len(each) for each in split.layers],
        "seconds": seconds,
        "sent": [_bytes(each) for each in sent],
        "sent_by_formula": [_bytes(each) for each in wanted],
        "cache_bytes": cache,
        "weights_bytes": loaded,
        "cache_by_formula": cache_bytes(runner, lens, split)[:: split.tensor],
        "weights_by_formula": weights,
        "process_bytes": [each.memory_full_info().uss for each in processes[: split.ranks]],
    }


def _bytes(sent: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sent.items() if count}


def _on_paper() -> list[dict[str, Any]]:
    """Simulation of a larger model on more ranks: the figures of the rank with the largest ones."""
    shape, sizes, work = PAPER
    rows = []
    for tensor, stages in sizes:
        for words in ("full", "snapkv, keep 0.3"):
            policy = make_policy(*POLICIES[words])
            empties = [empty_shape(shape, "bfloat16") for _ in range(stages)]
            runner = ModelRunner(empty_shape(shape, "bfloat16"), "reference")
            split = Split(tensor, deal_layers(empties[0], runner, policy, stages, None))
            sent, lens = simulate(runner, policy, work, split)
            begun = simulate(runner, policy, work._replace(new=1), split)[0]
            weights = [weight_bytes(each, runner, split, i) for i, each in enumerate(empties)]
            prompt = max(wire_bytes(each, tensor) for each in begun)
            both = zip(sent, begun, strict=True)
            token = max(wire_bytes(all_ - first, tensor) for all_, first in both)
            rows.append(
                {
                    "shape": shape,
                    "tensor": tensor,
                    "stages": stages,
                    "layers": [len(each) for each in split.layers],
                    "policy": words,
                    "prompt": work.prompt,
                    "new": work.new,
                    "weights": max(weights),
                    "cache": max(cache_bytes(runner, lens, split)),
                    "wire_prompt": prompt,
                    "wire_token": token / (work.new - 1),
                    "waits_token": _waits(runner.depth, tensor, stages),
                }
            )
    return rows


def _waits(depth: int, tensor: int, stages: int) -> int:
    """Consecutive messages per token: sums in every layer, of the embedding and of the logits; from
    stage to stage, and back."""
    within = 2 * depth + 2 if tensor > 1 else 0
    return within + (stages if stages > 1 else 0)
