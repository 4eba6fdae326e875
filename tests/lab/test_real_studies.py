"""Studies of chats, text and long answers: on a tiny model that speaks English words."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyramidinfer.cli.app import main
from pyramidinfer.engine.english import english
from pyramidinfer.engine.memory import full_bytes
from pyramidinfer.engine.profiling import profile_model
from pyramidinfer.lab.asking import Asker
from pyramidinfer.lab.invented import hide_facts, invent
from pyramidinfer.lab.long import LongPlan, first_difference, repetition, run_long
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.text import TextPlan, measure_text, run_text
from pyramidinfer.lab.turns import MORE, TurnsPlan, in_groups, make_talks, measure_turns, run_turns
from pyramidinfer.lab.ways import Ways, paired
from pyramidinfer.policies import Full, Pyramid, SnapKV, StreamingLLM
from tests.lab import english_model

WAYS = (("full", "streaming_llm"), (0.2,))


@pytest.fixture(scope="module", params=[True, False], ids=["chats", "base"])
def where(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("model")
    return Subject(english_model.save(folder, request.param), kv_memory="32MiB")


@pytest.fixture(scope="module")
def machine(where: Subject) -> Asker:
    return Asker(where)


def two(rows: list[Any]) -> tuple[Any, Any]:
    """The full cache's row and the other's."""
    full, other = rows
    assert full["policy"] == "full" and other["policy"] == "streaming_llm"
    assert full["kv_share"] == pytest.approx(1, abs=0.02) and 0.1 < other["kv_share"] < 0.5
    return full, other


# --- what is told and asked -----------------------------------------------------------------------


def test_facts_are_all_different_and_stand_once_in_the_text() -> None:
    facts = invent(random.Random(3), 20)
    assert [fact.kind for fact in facts[:5]] == ["code", "town", "colour", "name", "date"]
    assert len({fact.value for fact in facts}) == len({f.question for f in facts}) == 20
    few = facts[:6]
    text = hide_facts(random.Random(4), few, 6000)
    assert 5800 < len(text) < 7500
    at = sorted(text.index(fact.statement) for fact in few)
    for fact in few:
        assert text.count(fact.statement) == text.count(fact.value) == 1
        assert fact.value.lower() not in english().lower()
        assert fact.statement == f"{fact.opening} {fact.value}."
        assert fact.is_in(f"It is {fact.value.upper()}!") and not fact.is_in("It is nothing.")
    assert max(at) - min(at) > 3000  # spread over the whole
    date = next(fact for fact in facts if fact.kind == "date")
    assert not date.is_in(f"on 1{date.value}") and not date.is_in(f"{date.value}s")
    with pytest.raises(ValueError, match="99 facts"):
        invent(random.Random(1), 99)


def test_a_profile_may_be_given_by_its_file(machine: Asker, tmp_path: Path) -> None:
    profile = profile_model(machine.llm.engine.shared, progress=False)
    path = tmp_path / "profile.json"
    profile.save(path)
    for keep in (None, 0.5):
        policy = machine.policy(f"pyramid:profile={path},min_context=8", keep)
        assert isinstance(policy, Pyramid) and policy.profile == profile


def test_a_chat_takes_its_cache_up_and_gives_it_back(machine: Asker) -> None:
    talks = make_talks(machine, 1, 2, 400)
    assert all(0.85 * 400 < len(machine.chat.begin(talk.notes)) <= 400 for talk in talks)
    assert make_talks(machine, 1, 3, 400)[:2] == talks
    for talk in talks:
        assert len({fact.value for fact in talk.asked}) == 3
        assert all(talk.notes.count(fact.statement) == 1 for fact in talk.asked)
    engine, fed = machine.llm.engine, []
    forward = engine.runner.forward

    def counted(pool: Any, batch: Any) -> Any:
        fed.append(sum(len(work.prefill.tokens) for work in batch.works))
        return forward(pool, batch)

    engine.runner.forward = counted  # type: ignore[method-assign]
    try:
        full = measure_turns(machine, Full(), talks)
    finally:
        engine.runner.forward = forward  # type: ignore[method-assign]
    assert 0 < [n for n in fed if n][-1] < 150  # the last turn, not the notes again
    assert engine.pool.budget_used == 0
    assert all(len(each.scores) == 3 and each.kv_shares[-1] == 1 for each in full)
    small = measure_turns(machine, StreamingLLM(keep=0.2), talks)
    assert all(each.kv_shares[0] < 0.4 for each in small)
    assert [each.answers for each in small] != [each.answers for each in full]


def test_caches_are_recompressed_between_turns(
    where: Subject, machine: Asker, tmp_path: Path
) -> None:
    """Other entries, in about the same bytes (answers need not be equally long)."""
    talks, policy = make_talks(machine, 0, 2, 300), SnapKV(keep=0.3)
    plain, idle = (measure_turns(machine, policy, talks, each) for each in (False, True))
    assert [each.recompressed for each in (*plain, *idle)] == [0, 0, 3, 3]
    for mine, other in zip(idle, plain, strict=True):
        assert mine.kv_shares == pytest.approx(other.kv_shares, abs=0.05)
    assert [each.answers for each in plain] != [each.answers for each in idle]
    assert machine.llm.engine.pool.budget_used == 0
    plan = TurnsPlan(("full", "snapkv"), (0.3,), where, 2, 0, 300, compress_idle=True)
    rows, _ = run_turns(plan, tmp_path / "turns.json")
    assert [row["recompressed"] for row in rows] == [0, 6]
    assert rows[1]["kv_by_turn"] == np.mean([each.kv_shares for each in idle], axis=0).tolist()


def test_chats_that_do_not_fit_together_go_one_after_the_other(
    where: Subject, machine: Asker
) -> None:
    talks, policy = make_talks(machine, 2, 5, 300), StreamingLLM(keep=0.3)
    whole = full_bytes(machine.llm.engine.pool.layout, machine.llm.engine.runner, 300 + MORE)
    small = Asker(replace(where, kv_memory=str(int(2.2 * whole))))  # of five, two never fit
    assert in_groups(small, policy, talks) == measure_turns(machine, policy, talks)
    assert in_groups(small, Full(), talks) == measure_turns(machine, Full(), talks)
    assert small.llm.engine.pool.budget_used == 0


@pytest.mark.parametrize("wanted", [1, 2, 3, 5])
def test_chats_that_are_cut_short_hold_nothing(
    machine: Asker, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    """Whichever turn is being taken up: those before it are held already."""
    engine, extend, held = machine.llm.engine, machine.llm.engine.extend, []

    def broken(*arguments: Any, **options: Any) -> Any:
        held.append(engine.pool.budget_used)
        if len(held) == wanted:
            raise KeyboardInterrupt
        return extend(*arguments, **options)

    monkeypatch.setattr(engine, "extend", broken)
    with pytest.raises(KeyboardInterrupt):
        measure_turns(machine, Full(), make_talks(machine, 1, 2, 300))
    assert len(held) == wanted and held[-1] > 0
    assert engine.pool.budget_used == 0 and engine.scheduler.idle
    engine.check()


# --- the studies ----------------------------------------------------------------------------------


def test_turns(where: Subject, tmp_path: Path) -> None:
    rows, picture = run_turns(TurnsPlan(*WAYS, where, 2, 0, 300), tmp_path / "turns.json")
    full, other = two(rows)
    assert full["lost_ci"] == [0, 0] and len(other["by_turn"]) == 3 and other["samples"] == 2
    assert picture.stat().st_size > 5000
    written = json.loads((tmp_path / "turns.json").read_text())
    assert "reference" in written["meta"]["configuration"]["subject"]["source"]


def test_text(where: Subject, tmp_path: Path) -> None:
    rows, picture = run_text(TextPlan(*WAYS, where, 4, 0, (100, 200)), tmp_path / "text.json")
    assert [(row["context"], row["samples"]) for row in rows[::2]] == [(100, 4), (200, 2)]
    for pair in (rows[:2], rows[2:]):
        full, other = two(pair)
        assert full["kl"] == 0 and full["ratio"] == 1
        assert other["kl"] > 1e-4 and other["ratio"] != 1
        assert other["ratio_ci"][0] <= other["ratio"] <= other["ratio_ci"][1]
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize("study", ["turns", "text", "long"])
def test_kv_dtypes(where: Subject, tmp_path: Path, study: str) -> None:
    """Each policy with each, against the one reference; the result says so."""
    stored: Any = ("int8", "auto")
    ways, out = (*WAYS, where, 2, 0), tmp_path / f"{study}.json"
    rows: list[Any]
    if study == "turns":
        rows, picture = run_turns(TurnsPlan(*ways, 300, kv_dtypes=stored), out)
    elif study == "text":
        rows, picture = run_text(TextPlan(*ways, (100,), kv_dtypes=stored), out)
    else:
        rows, picture = run_long(LongPlan(*ways, 150, 16, kv_dtypes=stored), out)
    assert [(row["policy"], row["kv_dtype"]) for row in rows] == [
        ("full", "auto"),
        ("full", "int8"),
        ("streaming_llm", "int8"),
        ("streaming_llm", "auto"),
    ]
    reference, full, coded, plain = rows
    assert full["kv_share"] < 0.75 * reference["kv_share"]
    assert coded["kv_share"] < 0.75 * plain["kv_share"]
    assert reference["kl" if study == "text" else "lost"] == 0
    written = json.loads(out.read_text())
    assert written["meta"]["configuration"]["kv_dtypes"] == list(stored)
    assert picture.stat().st_size > 5000


def test_scores_of_text_are_those_of_the_engine(where: Subject, machine: Asker) -> None:
    passages = where.corpus().passages(5, 2, 120, 16)
    mine = measure_text(machine, Full(), passages)
    direct = machine.llm.score([p.context for p in passages], [p.continuation for p in passages])
    assert [s.logprobs for s in mine] == [s.logprobs for s in direct]


def test_long(where: Subject, tmp_path: Path) -> None:
    rows, picture = run_long(LongPlan(*WAYS, where, 2, 0, 150, 40), tmp_path / "long.json")
    full, other = two(rows)
    assert full["first_difference"] == [40, 40] and full["lost"] == 0
    assert min(other["first_difference"]) < 40
    assert other["perplexity"] > full["perplexity"]
    assert picture.stat().st_size > 5000


def test_an_interrupted_study_goes_on(
    where: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyramidinfer.lab import text

    plan, out = TextPlan(*WAYS, where, 2, 0, (100,)), tmp_path / "t.json"
    measure = text.measure
    monkeypatch.setattr(
        text,
        "measure",
        lambda p, c: measure(p, c) if c["policy"] == "full" else pytest.fail("stop"),
    )
    with pytest.raises(pytest.fail.Exception):
        run_text(plan, out)
    monkeypatch.setattr(
        text,
        "measure",
        lambda p, c: measure(p, c) if c["policy"] != "full" else pytest.fail("again"),
    )
    rows, _ = run_text(plan, out)
    assert [row["policy"] for row in rows] == ["full", "streaming_llm"]


# --- by hand --------------------------------------------------------------------------------------


def test_repetition_and_first_difference() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2]) == 2 and first_difference([3, 2], [1, 2]) == 0


def test_what_is_lost_is_paired() -> None:
    row = paired("score", [0.0, 0.5, 1.0], [0.5, 1.0, 1.5])
    assert row["score"] == 0.5 and row["lost"] == 0.5 and row["lost_ci"] == [0.5, 0.5]
    assert row["score_ci"][0] < 0.5 < row["score_ci"][1]


def test_ways(where: Subject) -> None:
    ways = Ways(("snapkv", "full", "tova:keep=.3"), (0.5, 0.2), where, 1, 0)
    assert [(c["policy"], c["keep"]) for c in ways.cells()] == [
        ("full", 1.0),
        ("snapkv", 0.5),
        ("snapkv", 0.2),
        ("tova:keep=.3", 0.3),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["turns", "--length", "20"], "--length 20 is too short"),
        (["turns", "--samples", "0"], "--samples 0"),
        (["turns", "--compress-idle", "--length", "20"], "--length 20 is too short"),
        (["turns", "--samples", "1"], "give another, such as --model smollm2"),
        (["text", "--policies", "full snapkv:keep=abc"], "keep=abc is no number"),
        (["text", "--policies", "full snapkv:keep=0"], "keep=0 must be above 0"),
        (["text", "--contexts", "9"], "at least 60"),
        (["text", "--keeps", "2"], "--keeps: 2.0"),
        (["long", "--tokens", "1"], "--tokens 1"),
        (["long", "--tokens", "3500"], "--context 1000 and --tokens 3500 exceed the model's 4096"),
        (["long", "--policies", "snapkw"], "snapkv"),
        (["long", "--kv-dtypes", "auto,imt4"], "'imt4' is unknown; did you mean 'int4'?"),
        (["text", "--kv-dtypes", ","], "--kv-dtypes is empty"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        "pyramidinfer",
        "study",
        *words,
        "--json",
        str(tmp_path / "x.json"),
        "--kv-memory",
        "32MiB",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line
