"""``study text``: how well real text is predicted on a compressed cache, by context length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.plans import TextPlan
from pyramidinfer.lab.quality import divergence, interval
from pyramidinfer.lab.real_plots import draw_text
from pyramidinfer.lab.rows import is_reference
from pyramidinfer.lab.samples import Passage, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Policy
from pyramidinfer.types import Score

__all__ = ["TextPlan", "loss", "measure_text", "run_text"]

CONTINUATION = 64  # tokens scored after each context


def measure_text(machine: Asker, policy: Policy, passages: Sequence[Passage]) -> list[Score]:
    """Score each continuation on its context's compressed cache; the continuation is not
    compressed."""
    contexts, wanted = [p.context for p in passages], [p.continuation for p in passages]
    return machine.llm.score(contexts, wanted, logits=True, policy=policy)


def loss(score: Score) -> float:
    """Negative log-likelihood of the continuation, in nats per token."""
    return -math.fsum(score.logprobs) / len(score.logprobs)


def run_text(plan: TextPlan, out: Path, workers: int = 1) -> tuple[list[Row], Path]:
    """Measure; write ``out`` and a picture next to it."""
    plan.check()
    if not plan.contexts or min(plan.contexts) < 60:
        raise ValueError(f"--contexts {plan.contexts}: give lengths of at least 60 tokens")
    cells = [{**cell, "context": context} for context in plan.contexts for cell in plan.cells()]
    rows = run_cells("text", settings(plan), cells, partial(measure, plan), out, workers)
    return rows, draw_text(rows, out.with_suffix(".png"))


def measure(plan: TextPlan, cell: dict[str, Any]) -> list[Row]:
    """One cell's row."""
    context = cell["context"]
    full = _full(plan, context)
    if is_reference(cell):
        mine = full
    else:
        machine = asker(plan.stored(cell))
        mine = measure_text(
            machine, machine.policy(cell["policy"], cell["keep"]), _passages(plan, context)
        )
    losses = [loss(each) for each in mine]
    more = [loss(ours) - loss(theirs) for ours, theirs in zip(mine, full, strict=True)]
    apart = [divergence(theirs, ours) for ours, theirs in zip(mine, full, strict=True)]
    return [
        {
            **cell,
            "perplexity": math.exp(np.mean(losses)),
            "perplexity_ci": [math.exp(each) for each in interval(losses)],
            "ratio": math.exp(np.mean(more)),
            "ratio_ci": [math.exp(each) for each in interval(more)],
            "kl": float(np.mean(apart)),
            "kl_ci": interval(apart),
            "kv_share": sum(s.kv.bytes for s in mine) / sum(s.kv.full_bytes for s in mine),
            "prefill_share": float(np.mean([s.metrics.computed_share for s in mine])),
            "samples": len(mine),
        }
    ]


@lru_cache(maxsize=4)
def _passages(plan: TextPlan, context: int) -> tuple[Passage, ...]:
    corpus = plan.subject.corpus()
    return tuple(corpus.passages(plan.seed, plan.passages(context), context, CONTINUATION))


@lru_cache(maxsize=1)  # with their logits: cells of one context follow each other
def _full(plan: TextPlan, context: int) -> list[Score]:
    machine = asker(plan.subject)
    return measure_text(machine, machine.policy("full", None), _passages(plan, context))
