"""``study ruler``: RULER's tasks under every policy at every budget, in two protocols.

The full cache is measured first.  A task on which it scores below ``SCREEN`` says nothing about
compression: it is reported for the full cache only, and left out for the others and from all
means.  All policies see the same samples, so differences from the full cache are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.chat import Asked
from pyramidinfer.lab.icr import publish
from pyramidinfer.lab.plans import RulerPlan
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.rows import is_reference, kv_dtype, weights
from pyramidinfer.lab.ruler.pictures import draw_scores, draw_tasks
from pyramidinfer.lab.ruler.tasks import Haystack, Sample, make_samples
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Policy
from pyramidinfer.types import SamplingParams

__all__ = [
    "NOISE",
    "SCREEN",
    "RulerPlan",
    "Scored",
    "answer_samples",
    "haystack",
    "interval_of_tasks",
    "mean_of_tasks",
    "means",
    "passed",
    "run_ruler",
    "task_samples",
]

#: A task on which the full cache scores below this is left out.
SCREEN = 0.3
#: ``--text noise``: RULER's own noise sentences instead of a text.
NOISE = "noise"
RESAMPLES = 2000


def after_screening(plan: RulerPlan, screened: list[Row]) -> list[dict[str, Any]]:
    """Cells of the other policies, on tasks that the full cache solves."""
    able = passed(screened)
    return [
        {"length": length, **way, "task": task, "protocol": protocol}
        for length in plan.lengths
        for way in plan.others()
        for task in plan.tasks
        if (length, task) in able
        for protocol in plan.protocols
    ]


def run_ruler(plan: RulerPlan, out: Path, workers: int = 1) -> tuple[list[Row], list[Path]]:
    """Measure; write ``out`` and pictures next to it; returns means over tasks (none if the full
    cache solves no task), and the pictures."""
    plan.check()
    configuration = asdict(plan)
    configuration["subject"]["source"] = haystack(plan.subject).name
    rows = run_cells(
        "ruler",
        configuration,
        plan.screening(),
        partial(measure, plan),
        out,
        workers,
        partial(after_screening, plan),
    )
    found = means(rows)
    publish(out, rows, means=found)
    pictures = [draw_scores(found, out.with_suffix(".png"))] if found else []
    pictures.append(draw_tasks(rows, SCREEN, out.with_name(out.stem + "_tasks.png")))
    return found, pictures


def measure(plan: RulerPlan, cell: dict[str, Any]) -> list[Row]:
    """One cell's rows: two for the reference, for which both protocols are the same."""
    machine = asker(plan.stored(cell))
    samples = _samples(plan, cell["task"], cell["length"])
    policy = machine.policy(cell["policy"], cell["keep"])
    protocols = plan.protocols if is_reference(cell) else (cell["protocol"],)
    scored = answer_samples(machine, samples, protocols[0], policy)
    return [
        {
            **cell,
            "protocol": protocol,
            "score": float(np.mean(scored.scores)),
            "score_ci": interval(scored.scores),
            "scores": scored.scores,
            "kv_share": scored.kv_share,
            "prefill_share": scored.prefill_share,
            "samples": len(samples),
        }
        for protocol in protocols
    ]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of samples (0 to 1), bytes relative to the full cache, layer-tokens computed."""

    scores: list[float]
    texts: list[str]
    kv_share: float
    prefill_share: float


def answer_samples(
    machine: Asker, samples: Sequence[Sample], protocol: str, policy: Policy
) -> Scored:
    """Answer samples under a policy and score the answers."""
    prompts = [ask(machine, sample) for sample in samples]
    params = [SamplingParams(max_tokens=sample.max_tokens) for sample in samples]
    answers = machine.ask(protocol, prompts, params, policy)
    return Scored(
        [sample.score(each.text) for sample, each in zip(samples, answers, strict=True)],
        [each.text for each in answers],
        sum(each.kv.bytes for each in answers) / sum(each.kv.full_bytes for each in answers),
        sum(each.computed_share for each in answers) / len(answers),
    )


def ask(machine: Asker, sample: Sample) -> Asked:
    return machine.chat.ask(sample.context, sample.question, sample.answer)


def task_samples(
    machine: Asker, subject: Subject, task: str, count: int, length: int, seed: int
) -> list[Sample]:
    """Samples of one task whose whole prompts, including the answer, have at most ``length``
    tokens."""
    chat = machine.chat
    template = len(chat.ask("a", " b", " c").whole) - len(chat.encode("a b c"))
    return make_samples(
        task,
        count,
        length - template,
        seed,
        lambda text: len(chat.encode(text)),
        haystack(subject),
    )


def haystack(subject: Subject) -> Haystack:
    """The text in which needles are hidden."""
    if subject.text is None:
        return Haystack.default()
    return Haystack.noise() if subject.text == NOISE else Haystack.read(subject.text)


@lru_cache(maxsize=64)
def _samples(plan: RulerPlan, task: str, length: int) -> tuple[Sample, ...]:
    count = max(1, round(plan.samples * min(plan.lengths) / length))
    return tuple(task_samples(asker(plan.subject), plan.subject, task, count, length, plan.seed))


# --- over tasks -----------------------------------------------------------------------------------


def passed(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """``(length, task)`` of the cells that the full cache solves."""
    return {
        (row["length"], row["task"]) for row in rows if is_reference(row) and row["score"] >= SCREEN
    }


def means(rows: Sequence[Row]) -> list[Row]:
    """Means over the tasks that the full cache solves, for every policy, keep, kv dtype, weights,
    length and protocol.

    score, score_ci : tasks have equal weight; 95 %, by resampling the samples of each task.
    lost, lost_ci : the full cache's mean minus this one, on the same samples (paired).
    left_out : tasks that the screen excludes.
    """
    able = passed(rows)
    whole = {(r["length"], r["protocol"], r["task"]): r for r in rows if is_reference(r)}
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if (row["length"], row["task"]) in able:
            where = row["length"], row["protocol"]
            key = (*where, row["policy"], row["keep"], kv_dtype(row), weights(row))
            cells.setdefault(key, []).append(row)
    found = []
    for (length, protocol, policy, keep, stored, held), mine in cells.items():
        own = [np.array(row["scores"]) for row in mine]
        lost = [
            np.array(whole[length, protocol, row["task"]]["scores"]) - scores
            for row, scores in zip(mine, own, strict=True)
        ]
        found.append(
            {
                "length": length,
                "protocol": protocol,
                "policy": policy,
                "keep": keep,
                "kv_dtype": stored,
                "weights": held,
                "score": mean_of_tasks(own),
                "score_ci": interval_of_tasks(own),
                "lost": mean_of_tasks(lost),
                "lost_ci": interval_of_tasks(lost),
                "kv_share": float(np.mean([row["kv_share"] for row in mine])),
                "prefill_share": float(np.mean([row["prefill_share"] for row in mine])),
                "tasks": [row["task"] for row in mine],
                "samples": min(row["samples"] for row in mine),
                "left_out": sorted(
                    {
                        r["task"]
                        for r in rows
                        if r["length"] == length and (length, r["task"]) not in able
                    }
                ),
            }
        )
    return found


def mean_of_tasks(parts: list[np.ndarray]) -> float:
    """The mean over tasks of the mean over samples; ``parts``: one array of samples per task."""
    return float(np.mean([part.mean() for part in parts]))


def interval_of_tasks(parts: list[np.ndarray]) -> list[float]:
    """95 % bootstrap interval of the mean over tasks of the mean over samples; the mean itself
    if a task has one sample."""
    if min(map(len, parts)) < 2:
        return [mean_of_tasks(parts)] * 2

    def mean(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(np.mean([part.mean(axis) for part in drawn], axis=0))

    found = stats.bootstrap(
        parts, mean, vectorized=True, method="percentile", n_resamples=RESAMPLES, rng=0
    ).confidence_interval
    return [float(found.low), float(found.high)]
