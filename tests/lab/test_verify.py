"""What verify finds, and what it makes of it."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyramidinfer.cli import serve as serve_module
from pyramidinfer.cli import verify as cli_verify
from pyramidinfer.cli.app import main
from pyramidinfer.lab import checks as checking
from pyramidinfer.lab import verify as verifying
from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.checks import Bench, Turns
from pyramidinfer.lab.retrieval import Retrieval
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.turns import make_talks, measure_turns
from pyramidinfer.lab.verify import ROUND, Check, VerifyPlan, jeffreys, judge, verify
from pyramidinfer.policies import Full, Policy, StreamingLLM
from tests.lab import english_model

PLAN = VerifyPlan(300, 0.1)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long answers that are not so long."""
    monkeypatch.setattr(checking, "LONG", 16)


QUICK = ("--length", "300", "--seconds", ".1", "--kv-memory", "32MiB")


def test_the_full_cache_keeps_all_of_itself() -> None:
    machine = Asker(Subject(kv_memory="32MiB"))
    checks = verify(machine, Subject(kv_memory="32MiB"), Full(), PLAN)
    counted = [each for each in checks if each.share is not None]
    assert [each.name for each in counted] == [
        "retrieval, question inside",
        "retrieval, question after",
        "text",
        "128 tokens generated",
    ]
    assert all(each.share == 1 and each.high == 1 and each.samples >= 3 for each in counted)
    assert judge(checks, 0.8)[0] == []
    assert machine.llm.engine.pool.budget_used == 0


class Counted:
    """A check that takes its samples in no time, while the clock goes on by a second."""

    telling = "counting"

    def __init__(self, bench: Bench) -> None:
        self.seeds: list[int] = []

    def more(self, seed: int, count: int) -> None:
        self.seeds += [seed] * count

    def checks(self) -> list[Check]:
        assert len(set(self.seeds)) == len(self.seeds) / ROUND  # no samples twice
        return [Check("counting", "", "", 1.0, 1.0, 1.0, len(self.seeds))]


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.1, 1), (2.9, 1), (3, 2), (7, 4), (1e9, verifying.ROUNDS)]
)
def test_as_many_samples_as_the_time_has_room_for(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes 1 s here, and 1 s goes by before the next."""
    clock = SimpleNamespace(monotonic=partial(next, count()))
    monkeypatch.setattr(verifying, "time", clock)
    for name in ("Retrieval", "Turns", "Text", "LongAnswers"):
        monkeypatch.setattr(verifying, name, Counted)
    machine: Any = SimpleNamespace(
        llm=SimpleNamespace(engine=SimpleNamespace(runner=SimpleNamespace(max_positions=4096)))
    )
    found = verify(machine, Subject(), Full(), VerifyPlan(300, seconds))
    assert [each.samples for each in found] == [rounds * ROUND] * 4


@pytest.mark.usefixtures("short")
def test_a_cache_in_few_bits_is_held_against_the_full_one_in_the_models_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of the full cache is the same beside another kv dtype; what is measured of the
    policy has its bytes, and its losses where they can be told: in likelihoods."""
    found = {}
    for kv_dtype in ("auto", "int4"):
        out = tmp_path / f"{kv_dtype}.json"
        command = ["verify", "--policy", "streaming_llm", "--keep", ".5", *QUICK, "--floor", ".01"]
        assert run(monkeypatch, *command, "--json", str(out), "--kv-dtype", kv_dtype) == 0
        told = ", int4 against" if kv_dtype == "int4" else " against"
        assert f"streaming_llm, keep 0.5{told}" in " ".join(capsys.readouterr().out.split())
        written = json.loads(out.read_text())
        assert written["configuration"]["subject"]["kv_dtype"] == kv_dtype
        assert written["configuration"]["subject"]["kv_memory"] == "32MiB"
        found[kv_dtype] = {each["name"]: each for each in written["result"]["checks"]}
    counted = [name for name, each in found["auto"].items() if each["share"] is not None]
    assert len(counted) == 4
    for name in counted:
        plain, coded = found["auto"][name], found["int4"][name]
        assert coded["full"].split(",")[0] == plain["full"].split(",")[0]
        assert 0.25 < coded["kv_share"] / plain["kv_share"] < 0.45
    lost = [found[each]["text"]["mine"] for each in ("auto", "int4")]
    assert lost[0] != lost[1]


@pytest.mark.parametrize("option", ["kv_dtype", "weights"])
def test_full_and_coded_answers_come_from_machines_of_their_own(option: str) -> None:
    """... over one model, and from one machine where nothing is coded."""
    plain = Subject(kv_memory="8MiB")
    coded = replace(plain, **{option: "int8"})
    assert coded.plain == plain
    machine = asker(plain)
    assert Bench(machine, plain, Full(), 300).own is machine
    own = Bench(machine, coded, Full(), 300).own
    assert getattr(own.llm.engine.config, option) == "int8"
    assert getattr(machine.llm.engine.config, option) == "auto"
    asker.cache_clear()


@pytest.mark.usefixtures("short")
def test_a_ruinous_setting_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.json"
    command = ("verify", "--policy", "streaming_llm", "--keep", ".1", *QUICK, "--json", str(out))
    assert run(monkeypatch, *command) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not hold: below 0.8 of the full cache: retrieval, question inside" in shown
    result = json.loads(out.read_text())["result"]
    assert "retrieval, question inside" in result["below"]
    (inside,) = (c for c in result["checks"] if c["name"] == "retrieval, question inside")
    assert inside["share"] < 0.3 and inside["kv_share"] < 0.3
    assert inside["computed_share"] == 1  # this policy drops nothing between layers
    assert "the smallest number of samples, 3 per check" in shown


def test_a_model_that_can_do_nothing_is_not_blamed_on_the_policy(tmp_path: Path) -> None:
    where = Subject(english_model.save(tmp_path / "model"), kv_memory="32MiB")
    checks = verify(Asker(where), where, StreamingLLM(keep=0.3), VerifyPlan(700, 0.1))
    assert [each.share for each in checks[:3]] == [None] * 3  # a random model answers nothing
    assert checks[3].share is not None and checks[4].share is not None
    below, _ = judge([each for each in checks if each.share is None], 0.8)
    assert below == []


def test_jeffreys() -> None:
    assert jeffreys([1.0, 1.0, 1.0]) == (pytest.approx(0.4640, abs=1e-3), 1.0)
    assert jeffreys([0.0] * 10) == (0.0, pytest.approx(0.2172, abs=1e-3))
    low, high = jeffreys([1.0, 0.0, 1.0, 0.5])
    assert 0 < low < 0.625 < high < 1


def test_the_verdict_goes_by_the_interval() -> None:
    def check(low: float, high: float, share: float | None = 0.5) -> Check:
        return Check("x", "", "", share, low, high, 5)

    below, unsure, surely = check(0.1, 0.7), check(0.5, 0.9), check(0.85, 1.0)
    assert judge([below, unsure, surely, check(0, 0.1, None)], 0.8) == ([below], [unsure])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--floor", "0"], "--floor 0.0"),
        (["--length", "100"], "--length 100 is too short"),
        (["--length", "4090"], "4096 positions"),
        (["--seconds", "0"], "--seconds 0.0"),
        (["--kv-dtype", "imt8"], "--kv-dtype='imt8' is unknown; did you mean 'int8'"),
        (["--policy", "pyramidinfer", "--keep", "0.01"], "keep=0.01"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "verify", "--kv-memory", "32MiB", *words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_server_below_the_floor_does_not_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found is said on standard error, and what was asked is the policy to be served."""

    def found(machine: Asker, where: Subject, policy: Policy, *more: Any) -> list[Check]:
        assert policy == StreamingLLM(keep=0.1) and machine.llm.engine.pool.budget == 2**25
        return [
            Check("retrieval, question inside", "1.00", "0.10", 0.1, 0.0, 0.4, 3),
            Check("text", "perplexity 9", "9", 0.9, 0.7, 1.0, 3),
        ]

    monkeypatch.setattr(cli_verify, "verify", found)
    monkeypatch.setattr(signal, "signal", lambda *values: None)
    monkeypatch.setattr(serve_module, "serve", lambda *values: pytest.fail("it serves"))
    command = (
        "serve",
        "--port",
        "0",
        "--kv-memory",
        "32MiB",
        "--policy",
        "streaming_llm",
        "--keep",
        ".1",
        "--dtype",
        "float32",
    )
    assert run(monkeypatch, *command, "--verify") == 1
    said = capsys.readouterr()
    assert said.out == "" and "retrieval, question inside" in said.err
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: policy 'streaming_llm' keeps less than 0.8")
    assert "the server does not start: choose another --policy" in last


def serve_verified(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[list[Any], list[Any]]:
    """Run ``serve``, where every check passes; what was asked of them, and what was served."""
    asked: list[Any] = []
    served: list[Any] = []
    monkeypatch.setattr(cli_verify, "run_verify", lambda *a, **k: asked.append(a) or True)
    monkeypatch.setattr(signal, "signal", lambda *values: None)
    monkeypatch.setattr(serve_module, "serve", lambda *values: served.append(values))
    assert (
        run(
            monkeypatch,
            "serve",
            "--port",
            "0",
            "--kv-memory",
            "16MiB",
            "--dtype",
            "float32",
            *words,
        )
        == 0
    )
    return asked, served


@pytest.mark.parametrize(
    ("backend", "kv_dtype", "weights"), [("auto", "auto", "auto"), ("reference", "int4", "int8")]
)
def test_a_server_that_holds_is_served(
    backend: str, kv_dtype: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified with the server's own model, policy, memory, backend and bits, at the floor."""
    words = ["--backend", backend, "--kv-dtype", kv_dtype, "--weights", weights]
    words += ["--verify", "--verify-floor", ".9"]
    asked, served = serve_verified(monkeypatch, "--keep", ".3", *words)
    ((where, policy, floor, plan),) = asked
    memory = str(16 * 2**20)
    stored = {"backend": backend, "kv_dtype": kv_dtype, "weights": weights}
    assert where == Subject(kv_memory=memory, dtype="float32", **stored)
    assert (policy.name, policy.keep, floor, plan) == ("pyramid", 0.3, 0.9, VerifyPlan())
    assert len(served) == 1
    used = [llm.engine.runner.backend.name for llm in (served[0][0], where.llm(policy))]
    assert used[0] == used[1] and (backend == "auto" or used[0] == backend)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify-floor", ".5"], "--verify-floor 0.5 has no effect without --verify"),
        (["--verify", "--verify-floor", "2"], "--verify-floor 2.0 must be above 0"),
    ],
)
def test_a_servers_mistakes_are_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "serve", *words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_chats_are_held_in_as_many_groups_as_the_memory_asks_for() -> None:
    """Held caches stay while turns go on; all at once would not fit."""
    where = Subject(kv_memory="8MiB")
    machine = Asker(where)
    with pytest.raises(ValueError, match="held by finished requests"):
        measure_turns(machine, Full(), make_talks(machine, 0, 4, 700))
    turns = Turns(Bench(machine, where, Full(), 700))
    turns.more(0, 3)
    assert len(turns.pairs.kv) == 4 and machine.llm.engine.pool.budget_used == 0


def test_a_task_that_the_full_cache_cannot_do_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By all samples drawn so far: "sometimes" fails in the first round and passes in the end."""
    bench = Bench(Asker(Subject(kv_memory="8MiB")), Subject(), StreamingLLM(keep=0.5), 300)
    found = Retrieval(bench)
    full = {"always": [1.0, 1.0], "never": [0.0, 0.0], "sometimes": [0.0, 1.0]}
    monkeypatch.setattr(
        found, "_questions", lambda seed, count: {task: (task, seed) for task in full}
    )

    def answer(machine: Asker, protocol: str, asked: tuple[str, int], policy: Policy) -> Any:
        task, seed = asked
        own = isinstance(policy, StreamingLLM)
        assert not own or task != "never"  # costs time and tells nothing
        return ([0.5] if own else [full[task][seed]]), 0.5, 0.25

    monkeypatch.setattr(found, "_answer", answer)
    for seed in range(2):
        found.more(seed, ROUND)
    for check in found.checks():
        assert check.full == "1.00 (without never)" and check.mine == "0.50"
        assert (check.share, check.samples, check.kv_share, check.computed_share) == (
            0.5,
            3,
            0.5,
            0.25,
        )
