"""The study of RULER's tasks: cells, screening, means, pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyramidinfer.cli.app import main
from pyramidinfer.engine.english import ENGLISH
from pyramidinfer.lab import asking
from pyramidinfer.lab.asking import asker
from pyramidinfer.lab.chat import Asked, Chat
from pyramidinfer.lab.quality_plots import style
from pyramidinfer.lab.rows import series
from pyramidinfer.lab.ruler import grid
from pyramidinfer.lab.ruler.grid import (
    RulerPlan,
    after_screening,
    haystack,
    means,
    run_ruler,
    task_samples,
)
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import SnapKV
from pyramidinfer.types import SamplingParams

SUBJECT = Subject(kv_memory="32MiB")
TASKS = ("niah_single_1", "niah_single_2")


def plan(**changes: Any) -> RulerPlan:
    whole = {
        "policies": ("full", "snapkv"),
        "keeps": (0.5, 0.2),
        "lengths": (500,),
        "tasks": TASKS,
        "samples": 2,
        "seed": 0,
        **changes,
    }
    return RulerPlan(subject=SUBJECT, **whole)


def row(policy: str, task: str, scores: list[float], keep: float = 0.5, **more: Any) -> Any:
    return {
        "length": 500,
        "protocol": "inside",
        "policy": policy,
        "keep": keep,
        "task": task,
        "score": float(np.mean(scores)),
        "scores": scores,
        "kv_share": keep,
        "prefill_share": 1.0,
        "samples": len(scores),
        **more,
    }


def test_a_task_that_the_full_cache_cannot_do_is_not_asked_of_the_others() -> None:
    rows = [row("full", "niah_single_1", [1.0, 0.0], 1.0), row("full", "vt", [0.2, 0.2], 1.0)]
    cells = after_screening(plan(tasks=("niah_single_1", "vt")), rows)
    assert {cell["task"] for cell in cells} == {"niah_single_1"}
    assert {(cell["keep"], cell["protocol"]) for cell in cells} == {
        (keep, protocol) for keep in (0.5, 0.2) for protocol in ("inside", "after")
    }


def test_a_spec_with_a_keep_of_its_own_is_measured_there_only() -> None:
    rows = [row("full", "niah_single_1", [1.0], 1.0)]
    cells = after_screening(plan(policies=("full", "snapkv:keep=.3,kernel=5", "tova")), rows)
    keeps = {
        spec: {c["keep"] for c in cells if c["policy"] == spec}
        for spec in ("snapkv:keep=.3,kernel=5", "tova")
    }
    assert keeps == {"snapkv:keep=.3,kernel=5": {0.3}, "tova": {0.5, 0.2}}


def test_weights_are_measured_against_those_of_the_models_dtype() -> None:
    """Each in its own engine; rows with other weights are no reference, and have own means."""
    asked = plan(policies=("full",), weights=("int8", "auto"), kv_dtypes=("auto", "int4"))
    stored = [(each["weights"], each["kv_dtype"]) for each in asked.cells()]
    own, *others = stored
    assert own == ("auto", "auto")
    assert others == [("int8", "auto"), ("int8", "int4"), ("auto", "int4")]
    assert [asked.stored(cell).weights for cell in asked.cells()] == [each for each, _ in stored]
    rows = [
        row("full", "a", [1.0, 1.0], 1.0),
        row("full", "a", [0.0, 1.0], 1.0, weights="int8"),
        row("full", "a", [0.0, 0.0], 1.0, weights="int8", kv_dtype="int4"),
    ]
    found = {series(each): (each["score"], each["lost"]) for each in means(rows)}
    eight = {"full weights=int8": (0.5, 0.5), "full int4 weights=int8": (0.0, 1.0)}
    assert found == {"full": (1.0, 0.0), **eight}
    assert all(style(list(found)).values())


def test_means_are_paired_with_the_full_cache_and_leave_out_what_it_cannot_do() -> None:
    rows = [
        row("full", "a", [1.0, 1.0, 0.0, 1.0], 1.0),
        row("full", "b", [0.5, 0.5, 0.5, 0.5], 1.0),
        row("full", "c", [0.0, 0.0, 0.0, 1.0], 1.0),
        row("snapkv", "a", [0.0, 1.0, 0.0, 1.0]),
        row("snapkv", "b", [0.5, 0.5, 0.5, 0.5]),
    ]
    full, snap = means(rows)
    assert full["policy"] == "full" and full["lost_ci"] == [0, 0]
    assert full["score"] == pytest.approx((0.75 + 0.5) / 2)
    assert snap["score"] == pytest.approx((0.5 + 0.5) / 2) and snap["left_out"] == ["c"]
    assert snap["lost"] == pytest.approx(0.125)
    assert snap["lost_ci"][0] == 0 and 0.125 < snap["lost_ci"][1] <= 0.375
    assert snap["tasks"] == ["a", "b"]


def test_the_study_runs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model knows none of this: with the screen at 0 its silence is measured."""
    monkeypatch.setattr(grid, "SCREEN", 0.0)
    out = tmp_path / "ruler.json"
    stop_after, measure = 3, grid.measure

    def interrupted(*args: Any) -> Any:
        nonlocal stop_after
        stop_after -= 1
        if stop_after < 0:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(grid, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match="goes on from there"):
        run_ruler(plan(samples=1), out)
    before = out.with_name("ruler.json.partial").read_text()
    assert before.count("\n") == 4
    stop_after = 100
    found, pictures = run_ruler(plan(samples=1), out)
    assert stop_after == 100 - (2 + 2 * 2 * 2 - 3)
    written = json.loads(out.read_text())
    assert written["meta"]["configuration"]["subject"]["source"] == ENGLISH
    assert written["meta"]["means"] == found and len(found) == 2 + 2 * 2
    after = {r["keep"]: r["kv_share"] for r in found if r["protocol"] == "after"}
    assert after[1.0] == 1 and 0.15 < after[0.2] < after[0.5] < 0.6
    assert [path.name for path in pictures] == ["ruler.png", "ruler_tasks.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_every_policy_is_measured_with_each_kv_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares are of the full cache's bytes in 16 bits, so bits and policies share an axis."""
    monkeypatch.setattr(grid, "SCREEN", 0.0)
    out, kv_dtypes = tmp_path / "r.json", ("auto", "int8", "int4")
    where = plan(
        samples=1,
        tasks=TASKS[:1],
        policies=("full", "snapkv:keep=.5"),
        protocols=("after",),
        kv_dtypes=kv_dtypes,
    )
    found, pictures = run_ruler(where, out)
    share = {(row["policy"], row["kv_dtype"]): row["kv_share"] for row in found}
    assert list(share) == [
        (policy, each) for each in kv_dtypes for policy in ("full", "snapkv:keep=.5")
    ]
    assert share["full", "auto"] == 1
    for policy in ("full", "snapkv:keep=.5"):
        whole = share[policy, "auto"]
        assert 0.5 < share[policy, "int8"] / whole < 0.7
        assert 0.25 < share[policy, "int4"] / whole < 0.45
    assert all(path.stat().st_size > 5000 for path in pictures)
    written = json.loads(out.read_text())
    assert written["meta"]["configuration"]["kv_dtypes"] == list(kv_dtypes)
    assert {row["kv_dtype"] for row in written["rows"]} == set(kv_dtypes)


def test_the_reference_is_the_full_cache_in_the_models_dtype() -> None:
    """Whatever is asked for; and results of before, which do not say how caches were stored."""
    rows = [
        row("full", "a", [1.0, 1.0], 1.0),
        row("full", "b", [0.0, 0.0], 1.0, kv_dtype="auto"),
        row("full", "a", [1.0, 0.0], 1.0, kv_dtype="int4"),
        row("full", "b", [1.0, 1.0], 1.0, kv_dtype="int4"),
    ]
    assert grid.passed(rows) == {(500, "a")}
    reference, coded = means(rows)
    assert (reference["kv_dtype"], reference["lost"]) == ("auto", 0)
    assert (coded["kv_dtype"], coded["score"], coded["lost"]) == ("int4", 0.5, 0.5)
    only = plan(policies=("full", "snapkv"), keeps=(0.5,), kv_dtypes=("int4",))
    assert [(c["policy"], c["kv_dtype"]) for c in only.cells()] == [
        ("full", "auto"),
        ("full", "int4"),
        ("snapkv", "int4"),
    ]


def test_both_protocols_are_the_same_with_the_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the study rests on when it measures the full cache once; and not with another."""
    machine = asker(SUBJECT)
    samples = task_samples(machine, SUBJECT, "niah_multivalue", 3, 500, 1)
    prompts = [grid.ask(machine, sample) for sample in samples]
    params = [SamplingParams(max_tokens=8, ignore_eos=True)] * 3
    full = [
        machine.ask(each, prompts, params, machine.policy("full", None))
        for each in asking.PROTOCOLS
    ]
    assert [a.token_ids for a in full[0]] == [a.token_ids for a in full[1]]
    inside, after = (
        machine.ask(each, prompts, params, SnapKV(keep=0.1, window=8)) for each in asking.PROTOCOLS
    )
    assert [a.token_ids for a in inside] != [a.token_ids for a in after]
    assert all(a.kv.seen_len == len(p.context) for a, p in zip(after, prompts, strict=True))
    assert machine.llm.engine.pool.budget_used == 0
    machine.llm.engine.check()


def test_prompts_fit_the_length_with_template_and_answer() -> None:
    machine = asker(SUBJECT)
    for sample in task_samples(machine, SUBJECT, "niah_single_2", 4, 600, 0):
        assert len(grid.ask(machine, sample).whole) + sample.max_tokens <= 600


def test_the_haystack_is_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("The cat sat on the mat. A dog ran away. " * 50)
    assert haystack(Subject(text="noise")).name == "noise"
    assert haystack(Subject(text=str(tmp_path / "mine.txt"))).name == "mine.txt"
    with pytest.raises(ValueError, match=r"none\.txt"):
        haystack(Subject(text=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("niah_singel_1",)}, "niah_single_1"),
        ({"protocols": ("before",)}, "choices: after, inside"),
        ({"keeps": (1.5,)}, "--keeps: 1.5"),
        ({"lengths": ()}, "--lengths is empty"),
        ({"lengths": (0,)}, "--lengths 0"),
        ({"samples": 0}, "--samples 0"),
        ({"policies": ("snapkw",)}, "snapkv"),
        ({"kv_dtypes": ("auto", "int5")}, "--kv-dtypes 'int5' is unknown; did you mean 'int"),
        ({"kv_dtypes": ()}, "--kv-dtypes is empty"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run_ruler(plan(**changes), tmp_path / "x.json")


def test_a_length_too_short_says_how_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="niah_single_1 needs at least"):
        run_ruler(plan(lengths=(100,)), tmp_path / "x.json")


def test_the_command_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "SCREEN", 0.0)
    words = [
        "--policies",
        "full,snapkv",
        "--kv-dtypes",
        "auto,int4",
        "--keeps",
        ".5",
        "--lengths",
        "500",
        "--tasks",
        "niah_single_1",
        "--samples",
        "1",
        "--kv-memory",
        "32MiB",
    ]
    out = tmp_path / "r.json"
    command = ["pyramidinfer", "study", "ruler", *words, "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert "inside" in shown and "snapkv int4" in shown and str(out.name) in shown.replace("\n", "")


def test_where_the_full_cache_can_do_nothing_there_is_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model finds none of RULER's needles: that is written, and no other is asked."""
    out = tmp_path / "r.json"
    words = [
        "--policies",
        "full,tova",
        "--keeps",
        ".5",
        "--lengths",
        "500",
        "--tasks",
        "niah_single_1",
        "--samples",
        "1",
        "--kv-memory",
        "32MiB",
    ]
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "study", "ruler", *words, "--json", str(out)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert "the full cache solves none of the tasks on this model: nothing to compare" in shown
    written = json.loads(out.read_text())
    assert written["meta"]["means"] == []
    assert {(row["policy"], row["score"]) for row in written["rows"]} == {("full", 0)}
    assert not out.with_suffix(".png").exists()
    assert (tmp_path / "r_tasks.png").stat().st_size > 5000


# --- the chat's form ------------------------------------------------------------------------------


class Templated:
    """A tokenizer of single characters with a template of the usual kind."""

    chat_template = "yes"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        said = "".join(f"<{m['role'][0]}>{m['content'].strip()}~" for m in messages)
        return said + "<a>"


def words(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_prompt_in_two_pieces_is_the_template_around_the_whole() -> None:
    asked = Chat(Templated()).ask("A long text.", "\nWhat is it? ", " It is ")
    assert (words(asked.context), words(asked.rest)) == (
        "<u>A long text.",
        "\nWhat is it?~<a>It is",
    )
    assert words(asked.whole) == "<u>A long text.\nWhat is it?~<a>It is"
    assert isinstance(asked, Asked)


def test_a_further_turn_closes_the_answer_once() -> None:
    chat = Chat(Templated())
    assert words(chat.begin("Hello")) == "<u>Hello~<a>"
    assert words(chat.go_on([ord("x")], "More?")) == "~<u>More?~<a>"
    assert words(chat.go_on([ord("x"), ord("~")], "More?")) == "<u>More?~<a>"
