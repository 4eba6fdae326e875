"""Quality over bytes: every policy at every budget, on the same samples.

A cell is one policy at one ``keep`` and one context length.  Its samples are

* questions with a needle (recall; a few generate more tokens, for agreement with the full cache);
* passages with a continuation, scored on the compressed cache (perplexity, divergence).

All policies see the same samples, so their differences are paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from pyramidinfer.engine import LLM
from pyramidinfer.lab.asking import reachable
from pyramidinfer.lab.plans import Grid
from pyramidinfer.lab.quality_plots import draw_needles, draw_quality
from pyramidinfer.lab.samples import Needle, Subject, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Full, Policy
from pyramidinfer.types import SamplingParams, Score, TokenIds

__all__ = ["DEPTHS", "Grid", "divergence", "interval", "run_quality"]

DEPTHS = 5  # number of depths of needles
AGREED = 64  # tokens generated for the agreement with the full cache
#: Relative deviation from ``keep`` (pages, windows) at which a share still counts as reached.
SLACK = 0.04


def run_quality(grid: Grid, out: Path, workers: int = 1) -> list[Path]:
    """Measure the grid; write ``out`` and pictures next to it; returns the pictures."""
    rows = run_cells("quality", settings(grid), grid.cells(), partial(measure, grid), out, workers)
    curves = draw_quality(rows, out.with_suffix(".png"))
    needles = draw_needles(rows, out.with_name(out.stem + "_needles.png"))
    return [curves, needles]


def measure(grid: Grid, cell: dict[str, Any]) -> list[Row]:
    """One cell's row."""
    context, keep = cell["context"], cell["keep"]
    policy = nearest_policy(cell["policy"], keep, grid.subject)
    llm = replace(grid.subject, kv_dtype=cell["kv_dtype"], weights=cell["weights"]).llm(policy)
    reference = _reference(grid, context)
    needles = _needles(grid, context)
    outputs = _answer(llm, grid, context)
    right = [int(n.is_right(o.text)) for n, o in zip(needles, outputs, strict=True)]
    same = [
        sum(a == b for a, b in zip(mine.token_ids, theirs, strict=True)) / len(theirs)
        for mine, theirs in zip(outputs[: grid.long_samples], reference.tokens, strict=True)
    ]
    scores = _score(llm, grid, context)
    loss = [-sum(each.logprobs) / len(each.logprobs) for each in scores]
    apart = [divergence(full, s) for full, s in zip(reference.scores, scores, strict=True)]
    share = sum(s.kv.bytes for s in scores) / sum(s.kv.full_bytes for s in scores)
    kept = sum(s.kv.kept_share for s in scores) / len(scores)
    end = outputs[: grid.long_samples] or outputs
    low, high = interval(loss)
    depths = [n.depth for n in needles]
    return [
        {
            **cell,
            "kv_share": share,
            "kv_share_end": sum(o.kv.bytes for o in end) / sum(o.kv.full_bytes for o in end),
            "prefill_share": sum(s.metrics.computed_share for s in scores) / len(scores),
            "recall": sum(right) / len(right),
            "recall_ci": _proportion(sum(right), len(right)),
            "recall_by_depth": {
                f"{depth:.2f}": _mean_at(depth, depths, right) for depth in sorted(set(depths))
            },
            "right": right,
            "perplexity": math.exp(sum(loss) / len(loss)),
            "perplexity_ci": [math.exp(low), math.exp(high)],
            "kl": sum(apart) / len(apart),
            "kl_ci": interval(apart),
            "agreement": sum(same) / len(same) if same else None,
            "agreement_ci": interval(same) if same else None,
            "samples": len(right),
            "passages": len(scores),
            "reachable": kept <= keep * (1 + SLACK) + 16 / context,
        }
    ]


def nearest_policy(spec: str, keep: float, subject: Subject) -> Policy:
    """The policy at ``keep``, or at the lowest share that it can reach on this model."""
    if spec == "full":
        return Full()
    return reachable(spec, keep, subject.layers)


@dataclass(frozen=True)
class Reference:
    """Results of the full cache on a context length's samples."""

    scores: list[Score]
    tokens: list[TokenIds]


@lru_cache(maxsize=2)
def _reference(grid: Grid, context: int) -> Reference:
    llm = grid.subject.llm(Full())
    long = _answer(llm, grid, context, only=grid.long_samples)
    return Reference(_score(llm, grid, context), [o.token_ids for o in long])


def _needles(grid: Grid, context: int) -> list[Needle]:
    count = grid.questions_at(context)
    return grid.subject.corpus().needles(grid.seed, count, context, DEPTHS)


def _answer(llm: LLM, grid: Grid, context: int, only: int | None = None) -> list[Any]:
    """Answers to the needles' questions; the first ``long_samples`` generate more tokens."""
    needles = _needles(grid, context)[:only]
    params = [
        SamplingParams(max_tokens=AGREED, ignore_eos=True)
        if index < grid.long_samples
        else SamplingParams(max_tokens=needle.answer_tokens)
        for index, needle in enumerate(needles)
    ]
    return llm.generate([needle.prompt for needle in needles], params) if needles else []


def _score(llm: LLM, grid: Grid, context: int) -> list[Score]:
    passages = grid.subject.corpus().passages(
        grid.seed, grid.passages_at(context), context, grid.continuation
    )
    return llm.score([p.context for p in passages], [p.continuation for p in passages], logits=True)


def divergence(full: Score, other: Score) -> float:
    """Mean over the continuation's tokens of KL(full ‖ other) of the next token, in nats."""
    assert full.logits is not None and other.logits is not None
    p, q = full.logits.double().log_softmax(-1), other.logits.double().log_softmax(-1)
    return max(0.0, float(torch.sum(p.exp() * (p - q), dim=-1).mean()))


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the mean."""
    if len(values) < 2 or max(values) == min(values):
        return [values[0], values[0]]
    found = stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=2000, method="percentile", rng=0
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def _mean_at(depth: float, depths: list[float], right: list[int]) -> float:
    found = [r for r, d in zip(right, depths, strict=True) if d == depth]
    return sum(found) / len(found)


def _proportion(right: int, count: int) -> list[float]:
    """95 % Wilson interval of a share."""
    found = stats.binomtest(right, count).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]
