"""Recent attention consistency, against loops over the model's own attention."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import LLM
from pyramidinfer.lab import rac
from pyramidinfer.lab.rac import MODES, Newest, RacPlan, measure_text, watch
from pyramidinfer.lab.samples import Subject
from pyramidinfer.models.loading import shipped_model
from tests.tiny import SPECIFIC, random_prompt, tiny_model

PLAN = RacPlan(
    Subject(shipped_model(), kv_memory="16MiB"), context=200, samples=2, tops=(1.0, 0.2), bins=5
)


def attention(model: Any, prompt: list[int]) -> list[np.ndarray]:
    """The model's own weights, mean over heads, ``[n, n]`` a layer."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        layers = plain(torch.tensor([prompt]), output_attentions=True).attentions
    return [each[0].mean(0).double().numpy() for each in layers]


def brute_force(weights: np.ndarray, top: float, bins: int) -> dict[str, list[float]]:
    """Overlaps by bin, one token at a time."""
    n = len(weights)
    recent = [i for i in range(n) if (n - 1 - i) / n < 0.3]
    context, window = recent[0], int(0.2 * n)
    count = int(top * context)
    ramp = [1 + 0.2 * j / (window - 1) for j in range(window)]

    def best(scores: np.ndarray) -> set[int]:
        return set(sorted(range(context), key=lambda column: (-scores[column], column))[:count])

    def ensemble(i: int) -> np.ndarray:
        rows = weights[i - window + 1 : i + 1, :context]
        mean: np.ndarray = sum(w * row for w, row in zip(ramp, rows, strict=True)) / sum(ramp)
        return mean

    found: dict[str, list[float]] = {}
    for mode, score in (("single", lambda i: weights[i, :context]), ("ensemble", ensemble)):
        binned: list[list[float]] = [[] for _ in range(bins)]
        for i in recent[:-1]:
            overlap = len(best(score(i)) & best(score(n - 1))) / count
            binned[min(bins - 1, int((n - 1 - i) / n / 0.3 * bins))].append(overlap)
        found[mode] = [sum(each) / len(each) for each in binned]
    return found


@pytest.mark.parametrize("chunk", [16, 1024])
def test_overlaps_are_those_of_a_loop(chunk: int) -> None:
    model, prompt = tiny_model("llama", torch.float64), random_prompt(5, 90)
    llm = LLM(model, policy="full", kv_memory="4MiB", prefill_chunk=chunk, page_size=4)
    rows = measure_text(llm, prompt, (0.8, 0.3), 4)
    assert len(rows) == 4 * 2 * 2
    layers = attention(model, prompt)
    for row in rows:
        wanted = brute_force(layers[row["layer"]], row["top"], 4)
        assert row["overlaps"] == pytest.approx(wanted[row["mode"]], abs=1e-12)
        assert row["chance"] == int(row["top"] * 63) / 63


@pytest.mark.parametrize("family", sorted(SPECIFIC))
def test_rows_are_the_models_attention_in_every_family(family: str) -> None:
    model, prompt = tiny_model(family, torch.float64), random_prompt(6, 50)
    llm = LLM(model, policy="full", kv_memory="4MiB", prefill_chunk=24)
    found: dict[int, np.ndarray] = {}

    def take(seen: Newest) -> None:
        if len(seen.weights):
            into = found.setdefault(seen.layer, np.zeros((50, 50)))
            rows = seen.reached[seen.reached >= 20]
            into[np.ix_(rows.numpy(), seen.positions.numpy())] = seen.weights.numpy()

    backend = llm.engine.runner.backend
    with watch(llm, 20, 50, take):
        llm.trace(prompt)
    assert llm.engine.runner.backend is backend
    wanted = attention(model, prompt)
    assert sorted(found) == list(range(len(wanted)))
    for layer, weights in found.items():
        np.testing.assert_allclose(weights[20:], wanted[layer][20:], atol=1e-6)
    measured = {row["layer"] for row in measure_text(llm, prompt, (0.5,), 3)}
    governed = llm.engine.runner.layers_for(50).governed
    assert measured == {layer for layer, yes in enumerate(governed) if yes}


def test_the_study(tmp_path: Path) -> None:
    picture = rac.run_rac(PLAN, tmp_path / "rac.json")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "rac.json").read_text())["rows"]
    assert len(rows) == 12 * 2 * 2 * 5
    for row in rows:
        assert row["mode"] in MODES and row["samples"] == 2
        assert row["distance_high"] - row["distance_low"] == pytest.approx(0.06)
        assert row["low"] <= row["overlap"] <= row["high"]
        if row["top"] == 1:
            assert row["overlap"] == row["chance"] == 1
        else:
            assert row["chance"] == math.floor(0.2 * 140) / 140
            assert 0 <= row["overlap"] <= 1
    assert max(row["distance_high"] for row in rows) == pytest.approx(0.3)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, context=120)
    rac.run_rac(plan, tmp_path / "whole.json")
    done: list[int] = []

    def stop(*arguments: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return measure_text(*arguments)

    monkeypatch.setattr(rac, "measure_text", stop)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 done"):
        rac.run_rac(plan, tmp_path / "rac.json")
    done.clear()
    rac.run_rac(plan, tmp_path / "rac.json")
    assert len(done) == 1
    whole, again = (
        json.loads((tmp_path / name).read_text())["rows"] for name in ("whole.json", "rac.json")
    )
    assert again == whole


def test_mistakes() -> None:
    subject = Subject(shipped_model())
    for options, message in (
        ({"tops": (1.5,)}, "--top: 1.5 must be above 0"),
        ({"samples": 0}, "--samples 0"),
        ({"context": 30}, "--context 30 is too short for 10 bins"),
    ):
        with pytest.raises(ValueError, match=message):
            RacPlan(subject, **options)  # type: ignore[arg-type]
