"""Calibration: what is measured, the plan that is solved for, and the file that is written."""

from __future__ import annotations

import json
import random
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pyramidinfer import LLM
from pyramidinfer.cli.app import main
from pyramidinfer.lab import calibrate as lab
from pyramidinfer.lab.calibrate import Calibration, OneLayer, Tables, calibrate, predicted, solve
from pyramidinfer.lab.samples import Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Full, Policy, Pyramid, Schedule
from tests.tiny import lengths_of, of_layers, random_prompt, tiny_model

SHARES, PROPAGATED, KERNELS = (0.3, 0.6), (0.35,), (7,)
TASK = Calibration(Subject(kv_memory="32MiB"), context=200, samples=2, continuation=11, seed=5)
DEPTH = 4  # of synthetic tables


def use_small_grid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lab, "SHARES", SHARES)
    patch.setattr(lab, "PROPAGATED", PROPAGATED)
    patch.setattr(lab, "KERNELS", KERNELS)


def measured_apart(task: Calibration, policy: Policy, part: int) -> float:
    """Divergence from the full cache, in plain numpy."""
    passages = task.subject.corpus().passages(2 * task.seed + part, task.samples, task.context, 64)
    found = []
    for passage in passages:
        one, other = (
            task.subject.llm(each).score([passage.context], [passage.continuation], logits=True)[0]
            for each in (Full(), policy)
        )
        assert one.logits is not None and other.logits is not None
        p, q = (np.exp(each.logits.double().numpy()) for each in (one, other))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        found.append((p * np.log(p / q)).sum(1).mean())
    return float(np.mean(found))


# --- the shipped model ------------------------------------------------------------------------


class Calibrated(NamedTuple):
    """What a run wrote and returned, and the policy that it measured last."""

    out: Path
    schedule: Schedule
    policy: Pyramid


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A calibration that is as small as can be."""
    out = tmp_path_factory.mktemp("calibrate") / "deep" / "plan.json"
    verified: list[Any] = []
    measure = lab._divergence

    def spy(task: Calibration, policy: Policy, part: int) -> float:
        if part == 1:
            verified.append(policy)
        return measure(task, policy, part)

    with pytest.MonkeyPatch.context() as patch:
        use_small_grid(patch)
        patch.setattr(lab, "_divergence", spy)
        return Calibrated(out, calibrate(TASK, out), verified[-1])


def test_the_schedule_is_written_and_says_where_it_comes_from(calibrated: Calibrated) -> None:
    out, schedule, _ = calibrated
    assert Schedule.load(out) == schedule
    assert schedule.layers == 12
    assert schedule.shares == (*SHARES, 1.0)
    assert all(row[-1] == 0 for row in schedule.loss)
    assert 0 < schedule.keep <= 1
    about = json.loads(out.read_text())["about"]
    assert about["commit"] and about["machine"]["torch"]
    assert about["task"]["context"] == 200 and about["task"]["subject"]["model"] == "shipped"
    assert [path.name for path in out.parent.iterdir()] == ["plan.json"], "parts are gone"


def test_the_scores_that_lose_least_are_taken(calibrated: Calibrated) -> None:
    out, schedule, _ = calibrated
    rows = json.loads(out.read_text())["about"]["scores"]
    assert [(row["heads"], row["kernel"]) for row in rows] == [("max", 7), ("mean", 7)]
    best = min(rows, key=lambda row: row["kl"])
    assert (schedule.heads, schedule.kernel) == (best["heads"], best["kernel"])


def test_the_target_is_met_on_passages_of_their_own(calibrated: Calibrated) -> None:
    out, schedule, policy = calibrated
    tried = json.loads(out.read_text())["about"]["tried"]
    assert tried[-1]["kl"] == schedule.kl <= TASK.target_kl
    assert tried[-1]["keep"] == schedule.keep
    assert isinstance(policy.schedule, Schedule) and policy.keep == schedule.keep
    assert policy.schedule.budgets(policy.keep) == schedule.budgets(schedule.keep)
    again = measured_apart(TASK, policy, 1)
    assert schedule.kl == pytest.approx(again, rel=1e-3, abs=1e-7)


def test_a_layers_loss_is_what_measuring_it_gives(calibrated: Calibrated) -> None:
    """The layer that matters most, held alone to the smallest share."""
    schedule = calibrated.schedule
    layer = max(range(12), key=lambda each: schedule.loss[each][0])
    policy = OneLayer(keep=SHARES[0], layer=layer, schedule=None, min_context=1,
                      heads=schedule.heads, kernel=schedule.kernel)  # fmt: skip
    expected = measured_apart(TASK, policy, 0)
    assert schedule.loss[layer][0] == pytest.approx(expected, rel=1e-3)
    assert schedule.loss[layer][0] > 10 * sorted(row[0] for row in schedule.loss)[6]


def test_pyramid_runs_by_it(calibrated: Calibrated) -> None:
    out, schedule, _ = calibrated
    policy = Pyramid(schedule=str(out), keep=0.5, min_context=1)
    trace = LLM(shipped_model(), policy=policy, kv_memory="16MiB").trace(random_prompt(1, 400))
    kept = lengths_of(trace.prefill_positions)
    assert kept == [max(policy.floor(), round(s * 400)) for s in schedule.budgets(0.5)]
    start = schedule.start_layer
    assert trace.computed_by_layer[: start + 1] == [400] * (start + 1)
    going = max(policy.floor(), int(schedule.propagate * 400))
    assert trace.computed_by_layer[start + 1 :] == [going] * (11 - start)


def test_one_layer_is_held_and_all_else_is_whole() -> None:
    for layer in (0, 2):
        policy = OneLayer(keep=0.3, layer=layer, schedule=None, min_context=1, window=8)
        llm = LLM(tiny_model("llama"), policy=policy, kv_memory="4MiB", poison=True)
        trace = llm.trace(random_prompt(1, 100), max_tokens=20)
        held = [30 if each == layer else 100 for each in range(4)]
        assert lengths_of(trace.prefill_positions) == held
        assert of_layers(trace.kept_len_by_step[-1]) == [each + 20 for each in held]
        assert trace.computed_by_layer == [100] * 4


# --- solving ----------------------------------------------------------------------------------


def random_tables(seed: int) -> Tables:
    """Falling losses, and a start that costs less the later it is."""
    rng = random.Random(seed)

    def falling(count: int, scale: float) -> list[float]:
        return sorted((scale * rng.random() ** 3 for _ in range(count)), reverse=True)

    retain = tuple((*falling(len(lab.SHARES), 0.1), 0.0) for _ in range(DEPTH))
    go = [falling(len(lab.PROPAGATED), 0.1 / (start + 1)) for start in range(DEPTH - 1)]
    return Tables(retain, tuple(map(tuple, go)), "max", 7)


def losses_of(found: Tables, start: int, share: float, budgets: tuple[float, ...]) -> float:
    """What each layer's budget costs, added up; nothing where it holds all that reaches it."""
    total = 0.0
    for layer, budget in enumerate(budgets):
        if layer > start and budget >= share - 1e-9:
            continue
        curve = list(accumulate(found.retain[layer], min))
        total += float(np.interp(budget, (*lab.SHARES, 1.0), curve))
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("allowed", [0.003, 0.03, 0.3])
def test_no_plan_within_the_target_is_cheaper(seed: int, allowed: float) -> None:
    """Every start, every propagated share and every budget in steps of 1/200."""
    found = random_tables(seed)
    plans = [(DEPTH - 1, 1.0, 0.0)] + [
        (start, share, loss)
        for start, row in enumerate(found.go)
        for share, loss in zip(lab.PROPAGATED, row, strict=True)
    ]
    costs = {}
    for start, share, loss in plans:
        plan = Schedule(start, share, (*lab.SHARES, 1.0), found.retain, "max", 7, 1.0, 0.0)
        computed = (start + 1 + share * (DEPTH - 1 - start)) / DEPTH
        for keep in range(1, 201):
            budgets = plan.budgets(keep / 200)
            lost = losses_of(found, start, share, budgets)
            assert predicted(plan, keep / 200) == pytest.approx(lost)
            if loss <= allowed / 2 and loss + lost <= allowed:
                costs[start, share, keep / 200] = computed + sum(budgets) / DEPTH
    chosen = solve(found, allowed, None)
    assert costs[chosen.start_layer, chosen.propagate, chosen.keep] == pytest.approx(
        min(costs.values())
    )
    assert (chosen.heads, chosen.kernel, chosen.loss) == ("max", 7, found.retain)


def test_a_smaller_target_costs_more() -> None:
    for seed in range(6):
        found = random_tables(seed)
        costs = []
        for allowed in (0.3, 0.1, 0.03, 0.01, 0.003):
            plan = solve(found, allowed, None)
            deep = DEPTH - 1 - plan.start_layer
            computed = plan.start_layer + 1 + plan.propagate * deep
            costs.append(computed + sum(plan.budgets(plan.keep)))
        assert costs == sorted(costs)
        assert costs[0] < costs[-1]


def test_where_nothing_may_be_lost_nothing_is_dropped() -> None:
    found = Tables(((1.0,) * len(lab.SHARES) + (0.0,),) * DEPTH,
                   ((1.0,) * len(lab.PROPAGATED),) * (DEPTH - 1), "max", 7)  # fmt: skip
    plan = solve(found, 1e-9, None)
    assert (plan.start_layer, plan.propagate, plan.keep) == (DEPTH - 1, 1.0, 1.0)
    free = Tables(((0.0,) * len(lab.SHARES) + (0.0,),) * DEPTH,
                  ((0.0,) * len(lab.PROPAGATED),) * (DEPTH - 1), "max", 7)  # fmt: skip
    plan = solve(free, 1e-9, None)
    assert (plan.start_layer, plan.propagate, plan.keep) == (0, min(lab.PROPAGATED), 1 / 200)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_a_byte_budget_is_kept_to(keep: float) -> None:
    """The target then bounds what propagation may cost, and nothing else."""
    for seed in range(6):
        found = random_tables(seed)
        plan = solve(found, 0.02, keep)
        assert plan.keep == keep
        if plan.start_layer < DEPTH - 1:
            at = lab.PROPAGATED.index(plan.propagate)
            assert found.go[plan.start_layer][at] <= 0.01
        assert sum(plan.budgets(keep)) <= keep * DEPTH + 1e-9


# --- the run ----------------------------------------------------------------------------------


class Synthetic:
    """Stands in for the model: a loss for every cell, and divergences of whole schedules."""

    def __init__(self, patch: pytest.MonkeyPatch, wholes: list[float]) -> None:
        self.cells: list[dict[str, Any]] = []
        self.policies: list[Policy] = []
        self.wholes, self.stop_at = wholes, -1
        use_small_grid(patch)
        patch.setattr(lab, "measure", self.measure)
        patch.setattr(lab, "_divergence", self.whole)

    def measure(self, task: Calibration, cell: dict[str, Any]) -> list[dict[str, Any]]:
        if len(self.cells) == self.stop_at:
            raise KeyboardInterrupt
        self.cells.append(cell)
        share = cell.get("keep", cell.get("propagate", 0.5))
        return [{**cell, "kl": (1 - share) * 0.01 * random.Random(str(cell)).random()}]

    def whole(self, task: Calibration, policy: Policy, part: int) -> float:
        assert part == 1, "not the passages that were measured on"
        self.policies.append(policy)
        return self.wholes[min(len(self.policies), len(self.wholes)) - 1]


def test_every_layer_is_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Synthetic(monkeypatch, [0.0])
    calibrate(TASK, tmp_path / "plan.json")
    assert [cell for cell in run.cells if "level" in cell] == [
        {"heads": heads, "kernel": 7, "level": 0.25} for heads in ("max", "mean")
    ]
    pairs = [(cell["layer"], cell["keep"]) for cell in run.cells if "layer" in cell]
    assert pairs == [(layer, share) for layer in range(12) for share in SHARES]
    pairs = [(cell["start"], cell["propagate"]) for cell in run.cells if "start" in cell]
    assert pairs == [(start, share) for start in range(11) for share in PROPAGATED]


def test_it_is_solved_for_less_until_the_target_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Synthetic(monkeypatch, [0.08, 0.011, 0.004])
    schedule = calibrate(TASK, tmp_path / "plan.json")
    tried = json.loads((tmp_path / "plan.json").read_text())["about"]["tried"]
    assert [each["kl"] for each in tried] == [0.08, 0.011, 0.004]
    allowed = [each["allowed"] for each in tried]
    assert allowed == pytest.approx([0.01, 0.01 * 0.01 / 0.08, 0.01 * 0.01 / 0.08 / 2])
    assert schedule.kl == 0.004
    last = run.policies[-1]
    assert isinstance(last, Pyramid) and isinstance(last.schedule, Schedule)
    assert last.schedule.budgets(0.5) == schedule.budgets(0.5) and last.keep == schedule.keep


def test_a_byte_budget_is_solved_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Synthetic(monkeypatch, [0.5])
    task = Calibration(TASK.subject, keep=0.4, context=200, samples=2)
    schedule = calibrate(task, tmp_path / "plan.json")
    assert schedule.keep == 0.4 and schedule.kl == 0.5
    assert len(run.policies) == 1
    assert {cell["level"] for cell in run.cells if "level" in cell} == {0.4}


def test_an_interrupted_calibration_ends_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Synthetic(monkeypatch, [0.0])
    whole = calibrate(TASK, tmp_path / "whole.json")
    count = len(run.cells)
    for done in (1, 2, 9):
        out = tmp_path / f"{done}.json"
        run.cells, run.stop_at = [], done
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            calibrate(TASK, out)
        assert not out.exists()
        run.stop_at = -1
        assert calibrate(TASK, out) == whole
        layers = [cell for cell in run.cells if "level" not in cell]
        assert len(layers) == count - 2, "no layer is measured twice"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"whole.json", "1.json", "2.json", "9.json"}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "calibrate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("kl", [0.005, 0.5])
def test_the_command(
    kl: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Synthetic(monkeypatch, [kl])
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "plan.json"
    arguments = ("--samples", "2", "--context", "200", "--out", str(out))
    assert command(monkeypatch, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    schedule = Schedule.load(out)
    assert f"{schedule.keep:.1%} of the cache is kept" in shown
    assert f"divergence {kl:.2g} nats" in shown
    assert ("the target of 0.01 is not met" in shown) == (kl > 0.01)
    assert f"{schedule.budgets(schedule.keep)[0]:.1%}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-kl", "0"], "--target-kl 0.0 must be above 0"),
        (["--target-kl", "nan"], "--target-kl nan must be above 0"),
        (["--keep", "0"], "--keep 0.0 must be above 0 and at most 1"),
        (["--keep", "1.1"], "--keep 1.1 must be above 0 and at most 1"),
        (["--samples", "1"], "--samples 1 must be at least 2"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--context", "5"], "a context of 5 tokens is too short"),
        (["--context", "5000"], "4096 positions"),
        (["--text", "no/such/text"], "No such file"),
        (["no/such/model"], "does not exist"),
        (["--dtype", "float3"], "did you mean 'float32'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command(monkeypatch, "--out", str(tmp_path / "plan.json"), *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
