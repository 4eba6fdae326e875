"""Quality against bytes, on a tiny grid of the shipped model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cli.app import main
from pyramidinfer.lab import quality
from pyramidinfer.lab.fields import split_specs
from pyramidinfer.lab.quality import (
    Grid,
    divergence,
    interval,
    nearest_policy,
    run_quality,
)
from pyramidinfer.lab.samples import Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES, Full, PyramidInfer, SnapKV
from pyramidinfer.types import RequestMetrics, Score

SUBJECT = Subject(kv_memory="64MiB")
LATE = "pyramidinfer:start_layer=8"
OURS = "pyramid:window=8,min_context=1"
GRID = Grid(
    SUBJECT,
    ("full", OURS, "snapkv", LATE),
    (0.9, 0.3),
    (300,),
    samples=5,
    passages=0.5,
    long_samples=2,
    continuation=8,
    seed=3,
)
FIELDS = {
    "policy",
    "keep",
    "context",
    "kv_share",
    "prefill_share",
    "recall",
    "recall_ci",
    "perplexity",
    "kl",
    "agreement",
    "samples",
    "reachable",
}
Rows = dict[tuple[str, float], dict[str, Any]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    entry = json.loads(path.read_text())
    assert entry["meta"]["commit"] and entry["meta"]["machine"] and entry["meta"]["configuration"]
    rows: list[dict[str, Any]] = entry["rows"]
    return rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, list[Path]]:
    """The grid's rows by policy and keep, and the pictures."""
    out = tmp_path_factory.mktemp("quality") / "deep" / "quality.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "AGREED", 12)
        pictures = run_quality(GRID, out)
    rows = rows_of(out)
    assert [(row["policy"], row["keep"]) for row in rows] == [
        (cell["policy"], cell["keep"]) for cell in GRID.cells()
    ]
    return {(row["policy"], row["keep"]): row for row in rows}, pictures


def test_every_row_is_complete(measured: tuple[Rows, list[Path]]) -> None:
    for row in measured[0].values():
        assert row.keys() >= FIELDS
        assert row["context"] == 300
        assert row["samples"] == len(row["right"]) == 5
        assert row["recall"] == sum(row["right"]) / 5
        for name in ("recall", "perplexity", "kl", "agreement"):
            low, high = row[f"{name}_ci"]
            assert low - 1e-9 <= row[name] <= high + 1e-9
        assert 0 < row["kv_share"] <= 1 and 0 < row["prefill_share"] <= 1
        assert set(row["recall_by_depth"]) == {"0.10", "0.30", "0.50", "0.70", "0.90"}
        assert row["perplexity"] >= 1 and row["kl"] >= 0


def test_the_full_cache_is_what_others_are_measured_by(measured: tuple[Rows, list[Path]]) -> None:
    rows = measured[0]
    full = rows["full", 1.0]
    assert [key for key in rows if key[0] == "full"] == [("full", 1.0)]
    assert full["kl"] == 0 and full["agreement"] == 1
    assert full["kv_share"] == full["kv_share_end"] == full["prefill_share"] == 1
    assert full["reachable"] is True
    assert full["recall"] == 1, "the shipped model answers within 300 tokens"


def test_less_is_kept_as_keep_falls(measured: tuple[Rows, list[Path]]) -> None:
    rows = measured[0]
    for spec in GRID.policies[1:]:
        mine = [rows[spec, keep] for keep in GRID.keeps]
        shares = [row["kv_share"] for row in mine]
        assert shares == sorted(shares, reverse=True)
        if spec != LATE:
            assert len(set(shares)) == len(shares)
            assert all(row["reachable"] for row in mine)
            for keep, row in zip(GRID.keeps, mine, strict=True):
                assert row["kv_share"] <= keep + 0.06
                exact = spec == "snapkv"  # a start that is found leaves deep layers with less
                assert not exact or row["kv_share"] == pytest.approx(keep, abs=0.06)
    assert all(rows["snapkv", keep]["prefill_share"] == 1 for keep in GRID.keeps)
    assert rows["snapkv", 0.3]["kl"] > rows["snapkv", 0.9]["kl"]


def test_a_budget_out_of_reach_says_so(measured: tuple[Rows, list[Path]]) -> None:
    """The policy then keeps the least that it can."""
    rows = measured[0]
    assert rows[LATE, 0.9]["reachable"] is True
    row = rows[LATE, 0.3]
    assert row["reachable"] is False
    assert row["keep"] == 0.3 < 9 / 12 <= row["kv_share"]
    assert row["prefill_share"] < rows[LATE, 0.9]["prefill_share"] < 1


def test_pictures_are_drawn(measured: tuple[Rows, list[Path]]) -> None:
    pictures = measured[1]
    assert [path.name for path in pictures] == ["quality.png", "quality_needles.png"]
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_the_engine(measured: tuple[Rows, list[Path]]) -> None:
    """One cell worked out by hand, from the same samples."""
    row = measured[0]["snapkv", 0.3]
    corpus = SUBJECT.corpus()
    needles, passages = corpus.needles(3, 5, 300), corpus.passages(3, 5, 300, 8)
    assert row["passages"] == len(passages)
    llm, whole = (
        LLM(shipped_model(), policy=policy, keep=keep, kv_memory="64MiB", dtype="float32")
        for policy, keep in (("snapkv", 0.3), ("full", None))
    )
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    outs, wholes = (each.generate([n.prompt for n in needles], params) for each in (llm, whole))
    assert row["right"] == [
        int(out.text.strip().startswith(needle.answer))
        for needle, out in zip(needles, outs, strict=True)
    ]
    same = [
        [a == b for a, b in zip(mine.token_ids, theirs.token_ids, strict=True)]
        for mine, theirs in zip(outs[:2], wholes[:2], strict=True)
    ]
    assert row["agreement"] == pytest.approx(sum(map(sum, same)) / 24)
    contexts, answers = [p.context for p in passages], [p.continuation for p in passages]
    apart, loss = [], []
    for context, answer in zip(contexts, answers, strict=True):
        (mine,), (theirs,) = (each.score([context], [answer], logits=True) for each in (llm, whole))
        assert mine.logits is not None and theirs.logits is not None
        p, q = theirs.logits.softmax(-1).double(), mine.logits.softmax(-1).double()
        apart.append(float((p * (p / q).log()).sum() / len(answer)))
        loss.append(-sum(mine.logprobs) / len(answer))
    assert row["kl"] == pytest.approx(sum(apart) / 5, rel=1e-3)
    assert row["perplexity"] == pytest.approx(math.exp(sum(loss) / 5), rel=1e-4)
    usages = [score.kv for score in llm.score(contexts, answers)]
    assert row["kv_share"] == sum(u.bytes for u in usages) / sum(u.full_bytes for u in usages)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(quality, "AGREED", 4)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "pyramidinfer",
            "study",
            "quality",
            "--policies",
            "full,snapkv",
            "--keeps",
            ".5",
            "--contexts",
            "300",
            "--samples",
            "3",
            "--json",
            str(out),
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    rows = rows_of(out)
    assert [(row["policy"], row["keep"]) for row in rows] == [("full", 1.0), ("snapkv", 0.5)]
    assert all(row.keys() >= FIELDS and row["samples"] == 3 for row in rows)
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / f"result{end}") for end in (".json", ".png", "_needles.png")]
    assert all(Path(path).is_file() for path in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "full,snapkw"], "unknown policy 'snapkw'; did you mean 'snapkv'"),
        (["--policies", "snapkv:windw=3"], "no option 'windw'; did you mean 'window'"),
        (["--policies", "snapkv:window"], "write NAME=VALUE"),
        (["--keeps", "0.5,0"], "--keeps: 0.0 must be above 0 and at most 1"),
        (["--keeps", "1.5"], "--keeps: 1.5 must be above 0 and at most 1"),
        (["--keeps", "half"], "--keeps 'half': write numbers"),
        (["--contexts", ""], "--contexts is empty"),
        (["--contexts", "4999", "--samples", "1"], "4096 positions"),
        (["--model", "no/such/model"], "does not exist"),
        (["--text", "no/such/text"], "No such file"),
        (["--schedule", "f"], "No such option"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "pyramidinfer",
            "study",
            "quality",
            "--json",
            str(tmp_path / "result.json"),
            *arguments,
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]


# --- small parts ------------------------------------------------------------------------------


def test_specs() -> None:
    assert split_specs("full,snapkv") == split_specs("full snapkv") == ("full", "snapkv")
    assert split_specs("full snapkv:window=8,kernel=5 tova,h2o") == (
        "full",
        "snapkv:window=8,kernel=5",
        "tova",
        "h2o",
    )
    assert Grid(SUBJECT).policies == tuple(POLICIES)


def test_longer_contexts_get_fewer_samples() -> None:
    """So that every length costs alike; never fewer than five."""
    grid = Grid(SUBJECT, contexts=(1000, 3000, 50_000), samples=60, passages=0.5)
    assert [grid.questions_at(context) for context in grid.contexts] == [60, 20, 5]
    assert [grid.passages_at(context) for context in grid.contexts] == [30, 10, 5]
    few = Grid(SUBJECT, contexts=(1000, 3000), samples=3)
    assert [few.questions_at(1000), few.questions_at(3000), few.passages_at(3000)] == [3, 3, 3]


def test_the_nearest_budget_a_policy_can_reach() -> None:
    assert nearest_policy("full", 0.5, SUBJECT) == Full()
    assert nearest_policy("snapkv", 0.01, SUBJECT) == SnapKV(keep=0.01)
    assert nearest_policy(LATE, 0.8, SUBJECT) == PyramidInfer(keep=0.8, start_layer=8)
    found = nearest_policy(LATE, 0.2, SUBJECT)
    assert isinstance(found, PyramidInfer) and found.keep is not None
    assert 9 / 12 < found.keep < 9 / 12 + 0.01


def scored(logits: torch.Tensor) -> Score:
    metrics = RequestMetrics(None, None, 0.0, 0.0, 1.0)
    return Score([1], [2], [], [], metrics, None, logits)  # type: ignore[arg-type]


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), torch.tensor([[0.25, 0.5, 0.25]] * 2)
    by_hand = [
        sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(one, other, strict=True))
        for one, other in zip(p, q, strict=True)
    ]
    found = divergence(scored(p.log() + 3.0), scored(q.log()))  # a shift of logits is none
    assert found == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert divergence(scored(p.log()), scored(p.log())) == 0
    assert divergence(scored(q.log()), scored(p.log())) != pytest.approx(found, abs=1e-3)


def test_intervals_of_a_mean() -> None:
    assert interval([0.3]) == [0.3, 0.3]
    assert interval([0.3, 0.3, 0.3]) == [0.3, 0.3]
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).tolist()
    low, high = interval(values)
    mean = sum(values) / 400
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
