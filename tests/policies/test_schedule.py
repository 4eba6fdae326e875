"""Calibrated schedules: budgets against brute force, files, and where Pyramid finds one."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pyramidinfer import LLM
from pyramidinfer.policies import Pyramid, Schedule, make_policy
from pyramidinfer.policies.budgets import SHAPES, fill_budgets
from pyramidinfer.policies.schedule import FILE_NAME, allocate
from tests.tiny import lengths_of, random_prompt, tiny_model

PLAN = Schedule(
    start_layer=1, propagate=0.5, shares=(0.125, 0.5, 1.0),
    loss=((0.9, 0.1, 0.0), (0.5, 0.05, 0.0), (0.2, 0.01, 0.0), (0.04, 0.0, 0.0)),
    heads="max", kernel=7, keep=0.375, kl=0.01,
)  # fmt: skip
TABLE = ((0.9, 0.1, 0.0), (0.5, 0.05, 0.0), (0.2, 0.01, 0.0))
Curve = tuple[float, ...]


def at(shares: Curve, row: Curve, share: float) -> float:
    """A loss between measured shares, along the line."""
    return float(np.interp(share, shares, row))


def hull(shares: Curve, row: Curve, share: float) -> float:
    """The lower convex hull of a curve that never rises, by looking at every chord."""
    falling = list(accumulate(row, min))
    values = [at(shares, tuple(falling), share)]
    for i, low in enumerate(shares):
        for j, high in enumerate(shares):
            if low <= share <= high and low < high:
                along = (share - low) / (high - low)
                values.append(falling[i] + along * (falling[j] - falling[i]))
    return min(values)


def total(shares: Curve, loss: tuple[Curve, ...], held: list[float]) -> float:
    return sum(hull(shares, row, share) for row, share in zip(loss, held, strict=True))


#: Shares and caps are eighths, so the optimum lies on a grid of eighths.
EIGHTHS = (0.125, 0.375, 0.625, 1.0)
tables = st.lists(
    st.lists(st.integers(0, 40), min_size=4, max_size=4).map(tuple), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(table=tables, caps=st.lists(st.integers(1, 8), min_size=3, max_size=3), data=st.data())
def test_no_other_budgets_cost_less(
    table: list[tuple[int, ...]], caps: list[int], data: st.DataObject
) -> None:
    """Every way to hand out the same eighths is tried; curves may rise and bend either way."""
    depth = len(table)
    tops = [cap / 8 for cap in caps[:depth]]
    eighths = data.draw(st.integers(depth, 8 * depth))
    loss = tuple(tuple(value / 40 for value in row) for row in table)
    held = allocate(EIGHTHS, loss, eighths / 8 / depth, tops)
    assert all(0 < share <= top + 1e-12 for share, top in zip(held, tops, strict=True))
    if sum(caps[:depth]) <= eighths:
        assert held == pytest.approx(tops)
        return
    assert sum(held) == pytest.approx(eighths / 8)
    best = min(
        total(EIGHTHS, loss, [each / 8 for each in handed])
        for handed in product(*(range(1, cap + 1) for cap in caps[:depth]))
        if sum(handed) == eighths
    )
    assert total(EIGHTHS, loss, held) == pytest.approx(best, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000), keep=st.floats(0.05, 1.0), depth=st.integers(2, 8),
    start=st.integers(0, 7), propagate=st.floats(0.1, 1.0),
)  # fmt: skip
def test_no_named_shape_and_no_random_budgets_cost_less(
    seed: int, keep: float, depth: int, start: int, propagate: float
) -> None:
    """With convex losses, as they were measured."""
    rng = random.Random(seed)
    shares = (0.05, 0.1, 0.3, 0.6, 1.0)
    loss = []
    for _ in range(depth):
        gains = sorted((rng.random() ** 3 for _ in range(4)), reverse=True)
        widths = [high - low for low, high in pairwise(shares)]
        drops = [gain * width for gain, width in zip(gains, widths, strict=True)]
        loss.append(tuple(sum(drops[i:]) for i in range(5)))
    caps = [1.0 if layer <= start else propagate for layer in range(depth)]
    held = allocate(shares, tuple(loss), keep, caps)

    def cost(budgets: Any) -> float:
        return sum(at(shares, row, share) for row, share in zip(loss, budgets, strict=True))

    assert all(share <= cap + 1e-12 for share, cap in zip(held, caps, strict=True))
    assert sum(held) == pytest.approx(min(keep * depth, sum(caps)))
    if keep < shares[0]:  # below what was measured every layer is held to less in the same way
        assert held == pytest.approx([keep] * depth)
        return
    for shape in SHAPES:
        others = fill_budgets(shape, keep, tuple(caps))
        if min(others) >= shares[0]:  # below it a loss is not known
            assert cost(held) <= cost(others) + 1e-9
    for _ in range(20):
        others = tuple(rng.uniform(shares[0], cap) for cap in caps)
        assert cost(allocate(shares, tuple(loss), sum(others) / depth, caps)) <= (
            cost(others) + 1e-9
        )


@given(table=tables, keeps=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
def test_more_keep_takes_from_no_layer(table: list[Any], keeps: list[float]) -> None:
    caps = [1.0, 0.5, 0.0625][: len(table)]
    loss = tuple(tuple(value / 40 for value in row) for row in table)
    found = [allocate(EIGHTHS, loss, keep, caps) for keep in sorted(keeps)]
    for fewer, more in pairwise(found):
        assert all(low <= high + 1e-12 for low, high in zip(fewer, more, strict=True))


def test_budgets_know_the_start_layer() -> None:
    """Layers that fewer tokens reach cannot hold more, and the others get it."""
    assert PLAN.budgets(1.0) == (1.0, 1.0, 0.5, 0.5)
    assert sum(PLAN.budgets(0.6)) == pytest.approx(2.4)
    assert max(PLAN.budgets(0.6)[2:]) <= 0.5
    never = replace(PLAN, start_layer=3)
    assert never.budgets(1.0) == (1.0,) * 4
    assert never.layers == PLAN.layers == 4


# --- named shapes -----------------------------------------------------------------------------


@given(
    shape=st.sampled_from(sorted(SHAPES)), keep=st.floats(0.01, 1.0),
    reach=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
)  # fmt: skip
def test_shapes_keep_their_mean_below_what_reaches_a_layer(
    shape: str, keep: float, reach: list[float]
) -> None:
    held = fill_budgets(shape, keep, tuple(reach))
    depth = len(reach)
    assert sum(held) == pytest.approx(min(keep * depth, sum(reach)))
    assert all(share <= most for share, most in zip(held, reach, strict=True))
    weights = [SHAPES[shape](layer, depth) for layer in range(depth)]
    level = max(share / weight for share, weight in zip(held, weights, strict=True))
    for share, weight, most in zip(held, weights, reach, strict=True):
        assert share == pytest.approx(min(most, level * weight)), "only full layers hold less"


def test_shapes_run_as_they_are_called() -> None:
    for shape in SHAPES:
        held = fill_budgets(shape, 0.4, (1.0,) * 6)
        falls = all(high > low for high, low in pairwise(held))
        rises = all(low < high for low, high in pairwise(held))
        assert (falls, rises) == {
            "level": (False, False), "rising": (False, True),
        }.get(shape, (True, False))  # fmt: skip
    assert len(set(fill_budgets("level", 0.4, (1.0,) * 6))) == 1


# --- files ------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "plan.json"
    PLAN.save(path, {"where": "here"})
    assert Schedule.load(path) == Schedule.load(str(path)) == PLAN
    assert hash(Schedule.load(path)) == hash(PLAN)
    written = json.loads(path.read_text())
    assert written["about"] == {"where": "here"}
    assert written["budgets"] == pytest.approx(PLAN.budgets(PLAN.keep), abs=1e-4)
    assert repr(PLAN) == "Schedule(4 layers, start 1, propagate 0.5, keep 0.375 at KL 0.01)"


def damaged(**changes: Any) -> str:
    return json.dumps({"schedule": {**asdict(PLAN), **changes}})


@pytest.mark.parametrize(
    "text",
    [
        "", "no json", "[]", "{}", "7", '{"schedule": 3}', '{"schedule": {}}',
        json.dumps({"schedule": asdict(PLAN)})[:-30],
        damaged(loss=[]), damaged(loss=[[1.0, 0.0]]), damaged(loss=5), damaged(loss=["abc"] * 4),
        damaged(loss=[[None, 0.1, 0.0]] * 4), damaged(loss=[[float("nan"), 0.1, 0.0]] * 4),
        damaged(shares=[]), damaged(shares=[0.5, 0.125, 1.0]), damaged(shares=[0.1, 0.5, 0.9]),
        damaged(shares=None), damaged(start_layer=4), damaged(start_layer=-1),
        damaged(start_layer=1.0), damaged(start_layer=None), damaged(propagate=0),
        damaged(propagate=1.5), damaged(propagate="0.5"), damaged(heads="sum"),
        damaged(heads=["max"]), damaged(kernel=4), damaged(kernel="7"), damaged(kernel=None),
        damaged(keep="half"), damaged(kl=None),
    ],
)  # fmt: skip
def test_damaged_files_are_named_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    for read in (Schedule.load, lambda each: Pyramid(schedule=str(each))):
        with pytest.raises(ValueError) as found:
            read(path)
        assert repr(str(path)) in str(found.value)
        assert "calibrate" in str(found.value) or "make it again" in str(found.value)
        assert "\n" not in str(found.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name, message in (
        ("missing.json", "No such file"), ("", "Is a directory"), ("binary", "is no schedule"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as found:
            Pyramid(schedule=str(tmp_path / name))
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("wrong", [3, 0.5, True, [], {"start_layer": 1}])
def test_what_is_no_schedule_is_shown(wrong: Any) -> None:
    with pytest.raises(ValueError, match="schedule=.* must be a path, 'auto' or None"):
        Pyramid(schedule=wrong)


# --- where Pyramid finds one ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    PLAN.save(tmp_path / "model" / FILE_NAME, {})
    return tmp_path / "model"


def test_the_models_own_schedule_is_taken(folder: Path, tmp_path: Path) -> None:
    """From a folder or an object loaded from one; not where it is switched off or another given."""
    other = replace(PLAN, start_layer=2)
    other.save(tmp_path / "other.json", {})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for model in (str(folder), folder, loaded):
        for policy, wanted in (
            ("pyramid", PLAN),
            (make_policy("pyramid", 0.3), PLAN),
            (make_policy("pyramid", schedule=None), None),
            (make_policy("pyramid", schedule=str(tmp_path / "other.json")), other),
            (make_policy("pyramid", schedule=other), other),
        ):
            chosen = LLM(model, policy=policy, kv_memory="1MiB").policy
            assert isinstance(chosen, Pyramid)
            assert chosen.schedule == wanted
    (folder / FILE_NAME).unlink()
    plain = LLM(str(folder), policy="pyramid", kv_memory="1MiB").policy
    assert plain == make_policy("pyramid", schedule=None)
    assert LLM(tiny_model("llama"), policy="pyramid", kv_memory="1MiB").policy == plain


def test_it_decides_what_is_computed_and_kept(folder: Path) -> None:
    llm = LLM(str(folder), policy="pyramid", keep=0.375, kv_memory="4MiB")
    trace = llm.trace(random_prompt(1, 400))
    assert trace.computed_by_layer == [400, 400, 200, 200]
    kept = lengths_of(trace.prefill_positions)
    assert kept == [round(share * 400) for share in PLAN.budgets(0.375)]
    assert len(set(kept)) > 1, "budgets differ"


def test_a_damaged_schedule_beside_a_model_is_not_passed_over(folder: Path) -> None:
    (folder / FILE_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is no schedule"):
        LLM(str(folder), policy="pyramid", kv_memory="1MiB")
    LLM(str(folder), policy="snapkv", kv_memory="1MiB")
    LLM(str(folder), policy=Pyramid(schedule=None), kv_memory="1MiB")


def test_a_schedule_of_another_depth_is_refused(folder: Path) -> None:
    wrong = replace(PLAN, loss=TABLE)
    message = "the schedule is for a model of 3 layers, this one has 4: .* or pass schedule=None"
    with pytest.raises(ValueError, match=message):
        LLM(tiny_model("llama"), policy=Pyramid(schedule=wrong), kv_memory="1MiB")
    wrong.save(folder / FILE_NAME, {})
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), policy="pyramid", kv_memory="1MiB")
