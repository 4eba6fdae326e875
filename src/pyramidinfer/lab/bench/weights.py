"""``bench weights``: a model with weights of 8 and 4 bits compared with its own dtype: perplexity
on real text, bytes, and times of a prompt and a decode step."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.engine import LLM
from pyramidinfer.lab.bench.machine import measure_roof
from pyramidinfer.lab.bench.plans import WeightsPlan
from pyramidinfer.lab.bench.setting import FIRST_WORD, Pass, progress, run_pass
from pyramidinfer.lab.bench.timing import ratios, spread
from pyramidinfer.lab.quality import divergence, interval
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.text import loss
from pyramidinfer.models.weights import stored_bytes
from pyramidinfer.policies import Full

__all__ = ["WeightsPlan", "run_weights"]

BASE = "auto"


def run_weights(plan: WeightsPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result: one row per format of weights."""
    plan.check()
    names = [BASE, *plan.weights]
    plan.subject.loaded()
    llms, took = {}, {}
    for name in names:
        begun = time.perf_counter()
        llms[name] = plan.subject.llm(Full(), weights=name)
        took[name] = time.perf_counter() - begun
    steps = plan.samples + len(plan.batches) * len(names) * (plan.warmup + plan.repeats)
    with progress("weights", steps) as done:
        said = _quality(plan, llms, done)
        speed = {batch: _speed(plan, llms, batch, done) for batch in plan.batches}
    model = plan.subject.loaded().model
    rows = []
    for name in names:
        held = llms[name].engine.runner.weight_bytes
        row: dict[str, Any] = {
            "weights": name,
            "bytes": held if name == "gguf" else stored_bytes(model, name),
            "held_bytes": held,
            "load_seconds": took[name],
            **said[name],
            "speed": [],
        }
        for batch, passes in speed.items():
            first, mine = passes[BASE], passes[name]
            firsts, others = (
                [float(np.median(each.step_seconds())) for each in runs] for runs in (first, mine)
            )
            prefills = [[each.prefill_seconds for each in runs] for runs in (first, mine)]
            row["speed"].append(
                {
                    "batch": batch,
                    "step_seconds": spread(others),
                    "prefill_seconds": spread(prefills[1]),
                    "step_speedup": ratios(firsts, others),
                    "prefill_speedup": ratios(*prefills),
                }
            )
        rows.append(row)
    base = llms[BASE]
    result = {
        "backend": base.engine.runner.backend.name,
        "roof": measure_roof(base.dtype, base.device).figures() if plan.batches else None,
        "rows": rows,
    }
    write_result(out, asdict(plan), result)
    return result


def _quality(plan: WeightsPlan, llms: dict[str, LLM], done: Any) -> dict[str, dict[str, Any]]:
    """Perplexity, its ratio to that of the model's own dtype, and the divergence from it."""
    passages = plan.subject.corpus().passages(
        plan.seed, plan.samples, plan.context, plan.continuation
    )
    losses: dict[str, list[float]] = {name: [] for name in llms}
    apart: dict[str, list[float]] = {name: [] for name in llms}
    for passage in passages:  # one at a time: logits of a large vocabulary are large
        scores = {
            name: llm.score([passage.context], [passage.continuation], logits=True)[0]
            for name, llm in llms.items()
        }
        for name, score in scores.items():
            losses[name].append(loss(score))
            apart[name].append(divergence(scores[BASE], score))
        done("text")
    found = {}
    for name in llms:
        more = [mine - its for mine, its in zip(losses[name], losses[BASE], strict=True)]
        found[name] = {
            "perplexity": math.exp(np.mean(losses[name])),
            "ratio": math.exp(np.mean(more)),
            "ratio_ci": [math.exp(each) for each in interval(more)],
            "kl": float(np.mean(apart[name])),
            "kl_ci": interval(apart[name]),
        }
    return found


def _speed(plan: WeightsPlan, llms: dict[str, LLM], batch: int, done: Any) -> dict[str, list[Pass]]:
    """Timed passes of one batch, in turns."""
    draw = np.random.default_rng(plan.seed)
    passes: dict[str, list[Pass]] = {name: [] for name in llms}
    highest = next(iter(llms.values())).engine.runner.vocab_size
    prompts = [draw.integers(FIRST_WORD, highest, plan.prompt_len).tolist() for _ in range(batch)]
    for repeat in range(plan.warmup + plan.repeats):
        for name, llm in llms.items():
            run = run_pass(llm.engine, prompts, plan.output_len)
            if repeat >= plan.warmup:
                passes[name].append(run)
            done(f"{name} {batch}")
    return passes
