"""Calibration: how much each layer suffers from pruning, on the user's text, made into budgets.

The paper's ICR measurement (prune one layer, leave the others whole) as a tool.  First the scores
are chosen that lose least at a level budget.  Then two tables are measured as divergence from the
full cache: *retention*, each layer's cache alone held to a share; *propagation*, only a share of
the tokens going deeper than a layer.  Taking losses as adding up,
the cheapest plan within the target is solved for, then measured as a whole on passages that were
not used; where it misses, it is solved again for less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pyramidinfer.lab.quality import divergence
from pyramidinfer.lab.record import commit, machine
from pyramidinfer.lab.samples import Passage, Subject, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Forecast, Full, Policy, Pyramid, Schedule
from pyramidinfer.policies.schedule import HEADS
from pyramidinfer.types import Layers, Needs, Observation, Score, View

__all__ = ["Calibration", "OneLayer", "calibrate"]

SHARES = (0.03, 0.06, 0.12, 0.25, 0.4, 0.6, 0.8)
KERNELS = (1, 7, 15)
PROPAGATED = (0.05, 0.1, 0.2, 0.35, 0.5)
#: Divergences below this are noise of the arithmetic.
NOISE = 1e-7


@dataclass(frozen=True)
class Calibration:
    """What to measure on, and the target: a divergence, or a byte budget (``keep``)."""

    subject: Subject
    target_kl: float = 0.01
    keep: float | None = None
    context: int = 1000
    continuation: int = 64
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.target_kl > 0:
            raise ValueError(f"--target-kl {self.target_kl} must be above 0 (nats per token)")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"--keep {self.keep} must be above 0 and at most 1")
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples} must be at least 2")


@dataclass(frozen=True)
class OneLayer(Pyramid):
    """Hold one layer's cache to a share, by Pyramid's scores; all else stays whole."""

    name: ClassVar[str] = "one_layer"
    evicts: ClassVar[bool] = False

    layer: int = 0

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        return Policy.forecast(self, prompt_len, max_new, layers)

    def needs(self, view: View) -> Needs:
        if view.layer != self.layer or view.phase == "decode":
            return Needs()
        needs = super().needs(view)
        return Needs(window=needs.window, reduce=needs.reduce, retain=needs.retain)

    def propagate(self, seen: Observation, state: Any) -> Any:
        raise AssertionError("nothing is dropped between layers")


def calibrate(task: Calibration, out: Path, workers: int = 1) -> Schedule:
    """Measure, solve, verify; writes the schedule to ``out`` and returns it."""
    depth = task.subject.depth
    level = task.keep or 0.25
    cells = [{"heads": h, "kernel": k, "level": level} for h in HEADS for k in KERNELS]
    parts = [out.with_name(f"{out.name}.{part}.json") for part in ("scores", "layers")]
    configuration = settings(task)
    rows = run_cells("scores", configuration, cells, partial(measure, task), parts[0], workers)
    scores = min(rows, key=lambda row: row["kl"])
    by = {"heads": scores["heads"], "kernel": scores["kernel"]}
    cells = [{"layer": i, "keep": s, **by} for i in range(depth) for s in SHARES]
    cells += [{"start": i, "propagate": s, **by} for i in range(depth - 1) for s in PROPAGATED]
    layers = run_cells("layers", configuration, cells, partial(measure, task), parts[1], workers)
    found = Tables.of(layers, depth, **by)
    schedule, tried = _solve_until_met(task, found)
    about = {
        "commit": commit(), "machine": machine(), "task": configuration, "tried": tried,
        "scores": rows,
    }  # fmt: skip
    schedule.save(out, about)
    for part in parts:
        part.unlink()
    return schedule


def measure(task: Calibration, cell: dict[str, Any]) -> list[Row]:
    """One cell's divergence from the full cache."""
    return [{**cell, "kl": _divergence(task, _policy(cell), 0)}]


def _policy(cell: dict[str, Any]) -> Policy:
    common = {"schedule": None, "min_context": 1, "heads": cell["heads"], "kernel": cell["kernel"]}
    if "level" in cell:
        return Pyramid(keep=cell["level"], propagate_ratio=1.0, **common)
    if "layer" in cell:
        return OneLayer(keep=cell["keep"], layer=cell["layer"], **common)
    return Pyramid(
        keep=1.0, start_layer=cell["start"], propagate_ratio=cell["propagate"], **common
    )  # fmt: skip


def _passages(task: Calibration, part: int) -> list[Passage]:
    """Passages to measure on (part 0), or to verify on (part 1)."""
    seed = 2 * task.seed + part
    return task.subject.corpus().passages(seed, task.samples, task.context, task.continuation)


def _scores(task: Calibration, policy: Policy, part: int) -> list[Score]:
    passages = _passages(task, part)
    return task.subject.llm(policy).score(
        [p.context for p in passages], [p.continuation for p in passages], logits=True
    )


@lru_cache(maxsize=2)
def _full(task: Calibration, part: int) -> list[Score]:
    return _scores(task, Full(), part)


def _divergence(task: Calibration, policy: Policy, part: int) -> float:
    pairs = zip(_full(task, part), _scores(task, policy, part), strict=True)
    return float(np.mean([divergence(full, other) for full, other in pairs]))


@dataclass(frozen=True)
class Tables:
    """Losses: ``retain[layer][share]`` with share 1 appended, ``go[start][propagated]``."""

    retain: tuple[tuple[float, ...], ...]
    go: tuple[tuple[float, ...], ...]
    heads: str
    kernel: int

    @classmethod
    def of(cls, rows: list[Row], depth: int, heads: str, kernel: int) -> Tables:
        def table(kind: str, share: str, count: int, shares: tuple[float, ...]
                  ) -> tuple[tuple[float, ...], ...]:  # fmt: skip
            found = {(r[kind], r[share]): r["kl"] for r in rows if kind in r}
            return tuple(tuple(_clean(found[i, s]) for s in shares) for i in range(count))

        retain = table("layer", "keep", depth, SHARES)
        go = table("start", "propagate", depth - 1, PROPAGATED)
        return cls(tuple((*row, 0.0) for row in retain), go, heads, kernel)


def _clean(kl: float) -> float:
    return 0.0 if kl < NOISE else kl


def _solve_until_met(task: Calibration, found: Tables) -> tuple[Schedule, list[dict[str, Any]]]:
    """Solve for the target, measure the whole, and solve for less while it misses.

    With a byte budget the target bounds what propagation may cost, and budgets are solved once.
    """
    tried: list[dict[str, Any]] = []
    allowed = task.target_kl
    for _ in range(8):
        schedule = solve(found, allowed, task.keep)
        kl = _divergence(task, Pyramid(schedule=schedule, keep=schedule.keep, min_context=1), 1)
        schedule = Schedule(**{**vars(schedule), "kl": kl})
        tried.append({"allowed": allowed, "keep": schedule.keep, "start": schedule.start_layer,
                      "propagate": schedule.propagate, "kl": kl})  # fmt: skip
        if kl <= task.target_kl or task.keep is not None:
            break
        allowed *= min(0.5, task.target_kl / kl)
    return schedule, tried


def solve(found: Tables, allowed: float, keep: float | None) -> Schedule:
    """The cheapest plan whose losses add up to ``allowed`` at most.

    Cost is the share of prefill computed plus the share of the cache kept.  With ``keep`` given
    half of ``allowed`` is for propagation, whatever the budgets then cost.
    """
    depth = len(found.retain)
    plans = [(depth - 1, 1.0, 0.0)]  # nothing is dropped between layers
    for start, row in enumerate(found.go):
        plans += [(start, s, loss) for s, loss in zip(PROPAGATED, row, strict=True)]
    best: tuple[float, Schedule] | None = None
    for start, share, loss in plans:
        if loss > allowed / 2:
            continue
        plan = Schedule(start, share, (*SHARES, 1.0), found.retain, found.heads, found.kernel,
                        1.0, 0.0)  # fmt: skip
        kept = keep if keep is not None else _least_keep(plan, allowed - loss)
        computed = (start + 1 + (depth - 1 - start) * share) / depth
        cost = computed + sum(plan.budgets(kept)) / depth
        if best is None or cost < best[0]:
            best = (cost, Schedule(**{**vars(plan), "keep": kept}))
    assert best is not None  # the plan that drops nothing costs no loss
    return best[1]


def _least_keep(plan: Schedule, allowed: float) -> float:
    """The smallest mean budget whose predicted loss is within ``allowed``, to 1/200."""
    low, high = 0, 200
    while low < high:
        middle = (low + high) // 2
        if predicted(plan, max(1, middle) / 200) <= allowed:
            high = middle
        else:
            low = middle + 1
    return max(1, high) / 200


def predicted(plan: Schedule, keep: float) -> float:
    """Losses of a plan's budgets, added up; between measured shares along the line.

    A layer that fewer tokens reach than were tried alone loses no more than propagation, which is
    counted on its own.
    """
    total = 0.0
    for layer, share in enumerate(plan.budgets(keep)):
        falling = list(accumulate(plan.loss[layer], min))
        full = share >= plan.propagate - 1e-9 and layer > plan.start_layer
        total += 0.0 if full else float(np.interp(share, plan.shares, falling))
    return total
