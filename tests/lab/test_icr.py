"""Inference context redundancy: one layer pruned at a time."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import LLM
from pyramidinfer.cli.app import main
from pyramidinfer.lab import icr
from pyramidinfer.lab.icr import IcrPlan, WindowScores, bootstrap, measure_passage, top_entries
from pyramidinfer.lab.samples import Passage, Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Policy
from pyramidinfer.types import Keep, Needs, Observation, Reduce, State, View
from tests.tiny import random_prompt, tiny_model

SHIPPED = Subject(shipped_model(), kv_memory="32MiB")
PLAN = IcrPlan(SHIPPED, context=300, samples=3, shares=(0.1, 1.0))


@dataclass(frozen=True)
class OneLayer(Policy):
    """The measurement as a policy of its own, without shared prefills."""

    layer: int = 0
    share: float = 1.0

    def needs(self, view: View) -> Needs:
        if view.phase != "prefill" or view.layer != self.layer:
            return Needs()
        window = int(view.prompt_len * 0.2) + 1
        return Needs(window=window, reduce=Reduce("mean", "mean", 1.2), retain=True)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        assert seen.scores is not None
        return Keep(top_entries(seen.scores[0], self.share)), state


def rows_of(path: Path) -> list[dict[str, Any]]:
    entry = json.loads(path.read_text())
    assert entry["meta"]["commit"] and entry["meta"]["machine"] and entry["meta"]["configuration"]
    rows: list[dict[str, Any]] = entry["rows"]
    return rows


def test_the_newest_stay_and_the_best_of_the_others() -> None:
    scores = torch.rand(100, generator=torch.Generator().manual_seed(1))
    window = set(range(79, 100))  # 20 % and one
    for share, newest in ((0.5, 21), (0.42, 21), (0.3, 15), (0.02, 1), (1.0, 21)):
        kept = top_entries(scores, share)[0].tolist()
        forced = set(range(100 - newest, 100))
        others = sorted(set(range(100)) - forced, key=lambda entry: -float(scores[entry]))
        assert kept == sorted(forced | set(others[: round(share * 100) - newest]))
    assert window <= set(top_entries(scores, 0.5)[0].tolist())
    assert top_entries(scores, 0.001).tolist() == [[int(scores.argmax())]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_is_what_the_engine_scores_on_such_a_cache(family: str) -> None:
    """Shared prefills and copied caches change nothing: a policy that prunes says the same."""
    model = tiny_model(family, torch.float64)
    passage = Passage(random_prompt(1, 60), random_prompt(2, 7))
    governed = LLM(model, policy="full", kv_memory="4MiB").engine.runner.layers_for(67).governed
    layers = tuple(layer for layer, yes in enumerate(governed) if yes)
    llm = LLM(model, policy=WindowScores(), kv_memory="4MiB", page_size=4)
    rows = measure_passage(llm, passage, layers, (0.1, 0.5))
    llm.engine.check()
    assert len(rows) == 2 * len(layers)
    whole = score(model, WindowScores(), passage)
    for row in rows:
        assert row["full_nll"] == pytest.approx(-whole.sum(), rel=1e-9)
        found = score(model, OneLayer(row["layer"], row["share"]), passage)
        assert row["nll"] == pytest.approx(-found.sum(), rel=1e-9)
        assert row["tokens"] == 7
        assert row["kl"] > 0
        assert row["kept_share"] == round(row["share"] * 59) / 59


def score(model: Any, policy: Policy, passage: Passage) -> np.ndarray:
    llm = LLM(model, policy=policy, kv_memory="4MiB", page_size=4)
    continuation = passage.context[-1:] + passage.continuation
    return np.array(llm.score([passage.context[:-1]], [continuation])[0].logprobs[1:])


def test_the_shipped_model_needs_its_first_layers(tmp_path: Path) -> None:
    """Nothing pruned is exactly the full cache, and its recall lives in layers 0 to 4."""
    picture = icr.run_icr(PLAN, tmp_path / "sub" / "icr.json")
    assert picture == tmp_path / "sub" / "icr.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = rows_of(tmp_path / "sub" / "icr.json")
    assert [(row["layer"], row["share"]) for row in rows] == [
        (layer, share) for layer in range(12) for share in PLAN.shares
    ]
    for row in rows:
        assert row["samples"] == 3
        assert row["kept_share"] == pytest.approx(row["share"], abs=0.002)
        assert row["log_ratio_low"] <= row["log_ratio"] <= row["log_ratio_high"]
        if row["share"] == 1:
            assert row["perplexity"] == row["full_perplexity"]
            assert row["ratio"] == 1 and row["kl"] == 0 and row["kept_share"] == 1
    pruned = {row["layer"]: row for row in rows if row["share"] == 0.1}
    for name in ("kl", "log_ratio"):
        circuit = max(pruned[layer][name] for layer in range(1, 5))
        assert circuit > 10 * max(pruned[layer][name] for layer in range(5, 12))


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, layers=(4, 0), shares=(0.2,))
    icr.run_icr(plan, tmp_path / "whole.json")
    done: list[Passage] = []

    def stop(llm: LLM, passage: Passage, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(passage)
        return measure_passage(llm, passage, *rest)

    monkeypatch.setattr(icr, "measure_passage", stop)
    with pytest.raises(KeyboardInterrupt, match="2 of 3 done"):
        icr.run_icr(plan, tmp_path / "icr.json")
    assert not (tmp_path / "icr.json").exists()
    done.clear()
    icr.run_icr(plan, tmp_path / "icr.json")
    assert len(done) == 1
    assert rows_of(tmp_path / "icr.json") == rows_of(tmp_path / "whole.json")
    assert [row["layer"] for row in rows_of(tmp_path / "icr.json")] == [0, 4]


def test_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old baker walked slowly to the market near the river . " * 30)
    out = tmp_path / "icr.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "pyramidinfer",
            "study",
            "icr",
            "--text",
            str(text),
            "--context",
            "80",
            "--continuation",
            "9",
            "--samples",
            "1",
            "--layers",
            "3",
            "--shares",
            ".1,1",
            "--json",
            str(out),
            "--kv-memory",
            "8MiB",
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    rows = rows_of(out)
    assert [row["tokens"] for row in rows] == [9, 9]
    assert rows[0]["log_ratio_low"] is None  # one passage says nothing about others
    assert rows[0]["perplexity"] > 1.0001


def test_intervals() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.normal(2.0, 1.0, 400), np.ones(400)
    low, high = bootstrap(values, weights)
    assert low is not None and high is not None
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap(np.full(5, 3.0), np.full(5, 2.0)) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "0"], "--shares: 0.0 must be above 0"),
        (["--shares", "half"], "--shares 'half'"),
        (["--layers", "12"], "--layers: 12 is not one of the layers"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--context", "5"], "--context 5 must be at least 20"),
        (["--text", "no/such/file"], "No such file"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "icr.json")
    monkeypatch.setattr(
        sys,
        "argv",
        ["pyramidinfer", "study", "icr", "--json", out, "--kv-memory", "8MiB", *arguments],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
