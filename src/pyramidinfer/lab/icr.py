"""Inference context redundancy: how much of the context does each layer need?

The measurement of the PyramidInfer paper (arXiv 2405.12532, section 3.1).  The whole context
is prefilled; then the cache of ONE layer is cut to its top share, all other layers stay unchanged,
and the continuation is scored on that cache.

Entries are ranked by the paper's score: attention of the newest 20 % of queries, mean over heads,
mean over queries weighted linearly from 1 to 1.2.  The newest entries always stay: the whole window
if it is at most half of the kept entries, otherwise half of them.  The other entries, including the
rest of the window, are kept by score.

The context's last token is fed with the continuation, so that every scored token is predicted from
the pruned cache.  Layers whose sliding window is shorter than the text are left out, because the
window already limits them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyramidinfer.engine import LLM
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.lab.pictures import draw_icr
from pyramidinfer.lab.plans import IcrPlan
from pyramidinfer.lab.samples import Passage, Subject, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Policy
from pyramidinfer.policies.rule import best_entries
from pyramidinfer.types import Keep, Needs, Observation, Reduce, SamplingParams, State, View

__all__ = [
    "IcrPlan",
    "WindowScores",
    "bootstrap",
    "measure_passage",
    "publish",
    "run_icr",
    "top_entries",
]

RECENT_RATIO, NEWEST_WEIGHT = 0.2, 1.2
RESAMPLES = 2000


def run_icr(plan: IcrPlan, out: Path, workers: int = 1) -> Path:
    """Measure, write ``out`` and draw; returns the picture's path."""
    chosen = replace(plan, layers=_layers(plan), shares=tuple(sorted(set(plan.shares))))
    cells = [{"passage": index} for index in range(plan.samples)]
    configuration = {
        **settings(chosen),
        "recent_ratio": RECENT_RATIO,
        "newest_weight": NEWEST_WEIGHT,
    }
    found = run_cells("icr", configuration, cells, partial(_work, chosen), out, workers)
    rows = _summarise(found)
    publish(out, rows)
    return draw_icr(rows, out.with_suffix(".png"))


def _work(plan: IcrPlan, cell: dict[str, Any]) -> list[Row]:
    assert plan.layers is not None
    llm = _llm(plan.subject)
    passage = _passages(plan)[cell["passage"]]
    return measure_passage(llm, passage, plan.layers, plan.shares)


def measure_passage(
    llm: LLM, passage: Passage, layers: tuple[int, ...], shares: tuple[float, ...]
) -> list[Row]:
    """One row per layer and share; ``llm`` has the policy ``WindowScores``.

    nll, full_nll : negative log-likelihood of the continuation, with and without pruning, in nats;
    kl : divergence of the pruned model's next-token distribution from the full model's, in nats.
    Both are sums over ``tokens``.
    """
    engine = llm.engine
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    held = engine.make(passage.context[:-1], params, hold=True)
    engine.run([held])
    state, rows = held.table.state, []
    try:
        longest = len(passage.context) + len(passage.continuation)
        if engine.runner.rotary.is_long(longest - 1) and not held.is_long:
            raise ValueError(
                f"the model's rotary positions change between {len(passage.context)} and {longest} "
                f"tokens; choose a --context on one side"
            )
        whole = _continue(engine, held, passage, None)
        reference = _logprobs(whole)
        for layer in layers:
            scores = state[_name(layer)]
            for share in shares:
                kept = top_entries(scores, share)
                scored = _continue(engine, held, passage, (layer, kept))
                pruned = _logprobs(scored)
                divergence = (reference.exp() * (reference - pruned)).sum()
                rows.append(
                    {
                        "layer": layer,
                        "share": share,
                        "kept_share": kept.shape[1] / len(scores),
                        "tokens": len(scored.tokens),
                        "nll": -math.fsum(scored.logprobs),
                        "full_nll": -math.fsum(whole.logprobs),
                        "kl": max(0.0, float(divergence)),
                    }
                )
    finally:
        engine.release(held)
    return rows


def top_entries(scores: Tensor, share: float) -> Tensor:
    """The entries that a layer keeps, ``[1, k]``: see the module's docstring.

    scores : ``[n]``, of the entries in text order.
    """
    length = len(scores)
    count = max(1, round(share * length))
    newest = min(_recent(length), count // 2)
    forced = torch.arange(length) >= length - newest
    return best_entries(scores[None], count, forced[None])


def _recent(length: int) -> int:
    return int(length * RECENT_RATIO) + 1


@dataclass(frozen=True)
class WindowScores(Policy):
    """Keeps all entries, and stores each layer's scores ``[prompt]`` in its state."""

    def needs(self, view: View) -> Needs:
        if view.phase != "prefill" or not view.layers.governed[view.layer]:
            return Needs()
        reduce = Reduce("mean", "mean", NEWEST_WEIGHT)
        return Needs(window=_recent(view.prompt_len), reduce=reduce, retain=True)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        assert seen.scores is not None
        return Keep(), {**state, _name(seen.view.layer): seen.scores[0].cpu()}


def _name(layer: int) -> str:
    return f"scores.{layer}"


def _continue(
    engine: Engine, held: Request, passage: Passage, kept: tuple[int, Tensor] | None
) -> Scoring:
    """Score the continuation on a copy of a held cache, after pruning one layer of it."""
    table = engine.pool.fork(held.table)
    scoring = Scoring(passage.continuation, keep_logits=True)
    try:
        if kept is not None:
            engine.pool.keep(table, kept[0], Keep(kept[1]))
        request = engine.make(
            passage.context, SamplingParams(max_tokens=1), on=table, scoring=scoring
        )
    except BaseException:
        engine.pool.release(table)
        raise
    request.take(table, held)
    engine.run([request])
    return scoring


def _logprobs(scoring: Scoring) -> Tensor:
    """Log-probabilities ``[continuation, vocab]`` in float64."""
    return torch.cat(scoring.logits).double().log_softmax(-1)


def _layers(plan: IcrPlan) -> tuple[int, ...]:
    """The layers to prune; ``ValueError`` for a layer that does not exist or is limited by its
    window."""
    governed = _llm(plan.subject).engine.runner.layers_for(plan.context + plan.continuation)
    possible = tuple(layer for layer, yes in enumerate(governed.governed) if yes)
    if plan.layers is None:
        return possible
    for layer in plan.layers:
        if layer not in possible:
            raise ValueError(
                f"--layers: {layer} is not one of the layers that attend to a whole text of "
                f"{plan.context + plan.continuation} tokens: {', '.join(map(str, possible))}"
            )
    return tuple(sorted(set(plan.layers)))


@lru_cache(maxsize=1)
def _llm(subject: Subject) -> LLM:
    return subject.llm(WindowScores())


@lru_cache(maxsize=1)
def _passages(plan: IcrPlan) -> list[Passage]:
    return plan.subject.corpus().passages(plan.seed, plan.samples, plan.context, plan.continuation)


# --- from passages to rows ------------------------------------------------------------------------


def _summarise(found: list[Row]) -> list[Row]:
    """One row per layer and share over all passages; all tokens have the same weight."""
    cells: dict[tuple[int, float], list[Row]] = {}
    for row in found:
        cells.setdefault((row["layer"], row["share"]), []).append(row)
    return [_summary(layer, share, rows) for (layer, share), rows in cells.items()]


def _summary(layer: int, share: float, rows: list[Row]) -> Row:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=np.float64)

    tokens, change = column("tokens"), column("nll") - column("full_nll")
    low, high = bootstrap(change, tokens)
    return {
        "layer": layer,
        "share": share,
        "kept_share": float(column("kept_share").mean()),
        "perplexity": math.exp(column("nll").sum() / tokens.sum()),
        "full_perplexity": math.exp(column("full_nll").sum() / tokens.sum()),
        "ratio": math.exp(change.sum() / tokens.sum()),
        "log_ratio": float(change.sum() / tokens.sum()),
        "log_ratio_low": low,
        "log_ratio_high": high,
        "kl": float(column("kl").sum() / tokens.sum()),
        "samples": len(rows),
        "tokens": int(tokens.sum()),
    }


def bootstrap(values: np.ndarray, weights: np.ndarray) -> tuple[float | None, float | None]:
    """95 % interval of ``values.sum() / weights.sum()`` over resampled passages (percentiles).

    (None, None) for a single passage, which has no spread.
    """
    if len(values) < 2:
        return None, None

    def ratio(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(values.sum(axis) / weights.sum(axis))

    found = stats.bootstrap(
        (values, weights),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=0,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def publish(path: Path, rows: list[Row], **more: Any) -> None:
    """Replace a study's rows by its summary, and add ``more`` to its metadata."""
    meta = {**json.loads(path.read_text())["meta"], **more}
    body = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"meta": {json.dumps(meta, indent=1)},\n"rows": [\n{body}\n]}}\n')
