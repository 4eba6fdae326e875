"""The study of heads beside layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from pyramidinfer.cli.app import main
from pyramidinfer.engine import passages
from pyramidinfer.lab import heads
from pyramidinfer.lab.heads import HeadsPlan, measure_profile, passages_of, run_heads
from pyramidinfer.lab.icr import WindowScores, measure_passage
from pyramidinfer.lab.samples import Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Full
from tests.lab import english_model

SHIPPED = Subject(shipped_model(), kv_memory="32MiB")
PLAN = HeadsPlan(SHIPPED, context=200, samples=2, pruned_to=0.1)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "LENGTH", 200)


def test_the_study_puts_heads_beside_layers(tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    rows, picture = run_heads(PLAN, out)
    written = json.loads(out.read_text())
    meta = written["meta"]
    assert written["rows"] == json.loads(json.dumps(rows)) and len(rows) == 12
    assert meta["commit"] and meta["machine"] and meta["configuration"]["pruned_to"] == 0.1
    assert picture == tmp_path / "heads.png" and picture.stat().st_size > 20_000

    profile = measure_profile(SHIPPED.llm(Full()), SHIPPED, progress=False)
    llm = SHIPPED.llm(WindowScores())
    losses = [
        measure_passage(llm, each, (3, 4), (0.1,))
        for each in SHIPPED.corpus().passages(0, 2, 200, 64)
    ]
    tokens = sum(rows[0]["tokens"] for rows in losses)
    for place, layer in enumerate((3, 4)):
        row = rows[layer]
        assert row["shares"] == list(profile.share[layer])
        assert row["mean"] == pytest.approx(np.mean(profile.share[layer]))
        assert row["kl"] == pytest.approx(sum(each[place]["kl"] for each in losses) / tokens)
        lost = sum(each[place]["nll"] - each[place]["full_nll"] for each in losses)
        assert row["lost"] == pytest.approx(lost / tokens)
    order = spearmanr([row["mean"] for row in rows], [row["kl"] for row in rows]).statistic
    assert meta["follows_icr"] == pytest.approx(order) and meta["agreement"] == profile.agreement
    assert meta["text"] == "generated text"


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "h.json", heads._work
    monkeypatch.setattr(heads, "_work", _but(work, "icr"))
    with pytest.raises(pytest.fail.Exception):
        run_heads(PLAN, out)
    monkeypatch.setattr(heads, "_work", _but(work, "profile"))
    assert len(run_heads(PLAN, out)[0]) == 12


class _but:  # noqa: N801
    """A study's work that fails at one part; can be given to ``partial``."""

    def __init__(self, work: object, part: str) -> None:
        self.work, self.part = work, part

    def __call__(self, plan: HeadsPlan, cell: dict[str, object]) -> object:
        if cell["part"] == self.part:
            pytest.fail("stop")
        return self.work(plan, cell)  # type: ignore[operator]


def test_passages_are_in_the_models_own_language(tmp_path: Path) -> None:
    llm = SHIPPED.llm(Full())
    found = passages_of(llm, SHIPPED)
    assert found is not None and found.name == "generated text" and found.head == 1
    assert len({tuple(each) for each in found.all}) == 4
    assert all(len(each) == 200 for each in found.all)
    unknown = llm.tokenizer.unk_token_id
    assert not any(unknown in each for each in found.all)
    other = Subject(english_model.save(tmp_path / "model"), kv_memory="8MiB")
    assert passages_of(other.llm(Full()), other) is None  # real English


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "1"], "--share 1.0 must lie between 0 and 1"),
        (["--samples", "0"], "--samples 0"),
        (["--context", "5"], "--context 5"),
        (["--text", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["pyramidinfer", "study", "heads", *words, "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", [*line, "--kv-memory", "32MiB"])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]  # type: ignore[assignment]
    assert stopped.value.code == 2 and message in line


def test_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "pyramidinfer",
        "study",
        "heads",
        "--context",
        "100",
        "--samples",
        "1",
        "--json",
        str(tmp_path / "x.json"),
        "--kv-memory",
        "32MiB",
    ]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr().out
    assert not stopped.value.code and str(tmp_path / "x.png") in shown and "KL" in shown
