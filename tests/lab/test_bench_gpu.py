"""``make bench-gpu`` at toy size: every run is there, fails alone, and ratios are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer.codec import CODECS
from pyramidinfer.config import KV_DTYPES
from pyramidinfer.lab.bench import gpu, gpu_plan
from pyramidinfer.lab.bench.generate import CACHES, bytes_per_request, time_generate
from pyramidinfer.lab.bench.gpu import Bench, run_bench
from pyramidinfer.lab.bench.gpu_plan import bars, real_plan, toy_plan
from pyramidinfer.lab.shapes import make_model, shape_config

DYNAMIC, STATIC, COMPILED = CACHES
PYTHON_PLAN = toy_plan()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyramidinfer.lab.bench.timing.SAMPLE_SECONDS", 1e-4)


def plan_of(*wanted: tuple[str, str]) -> gpu_plan.GPUPlan:
    """The toy plan with some of its runs only, and no attention alone."""
    runs = tuple(run for run in PYTHON_PLAN.runs if (run.cell.name, run.engine) in wanted)
    assert len(runs) == len(wanted)
    return replace(PYTHON_PLAN, runs=runs, attention=())


def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench_gpu.json"
    gpu.main(["--toy", "--json", str(out), "--repeats", "1"])
    entry = json.loads(out.read_text())
    result, shown = entry["result"], capsys.readouterr().out
    assert entry["commit"] and entry["configuration"]["repeats"] == 1
    assert not result["not_run"] and result["is_toy"] and "TOY RUN" in shown
    assert [(row["cell"], row["engine"]) for row in result["rows"]] == [
        (run.cell.name, run.engine) for run in PYTHON_PLAN.runs
    ]
    for row in result["rows"]:
        assert "error" not in row, row
        made = row["output_tokens"] / row["seconds"]["median"]
        assert row["output_tokens_per_second"]["median"] == pytest.approx(made)
        assert row["output_tokens"] == row["batch"] * row["output_len"]
        assert row["seconds"]["median"] > 0 and row["prefill_seconds"]["median"] > 0
    assert all(row["bytes"] and row["share_of_copy_bandwidth"] > 0 for row in result["attention"])
    for row in result["attention"]:
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"])
    assert [row["kv_dtype"] for row in result["attention"]] == 2 * list(KV_DTYPES)
    sizes = {row["kv_dtype"]: row["bytes"] for row in result["attention"][: len(KV_DTYPES)]}
    assert sizes["auto"] == 2 * 40 * 4 * 2 * 16 * 2, "requests, entries, heads, K and V, numbers"
    for name in KV_DTYPES[1:]:
        assert sizes[name] == 2 * 40 * 4 * 2 * CODECS[name].entry_bytes(16)
        assert f", {name}" in shown
    assert set(result["roof"]) == {"read", "copy", "matrix"}
    assert all(bar["ratio"] and bar["met"] is None for bar in result["bars"]), "a toy meets nothing"
    largest = {row["engine"]: row for row in result["rows"] if row["cell"] == "largest"}
    assert all(row["is_largest"] for row in largest.values())


def test_one_failing_engine_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(
        ("paper", DYNAMIC), ("largest", DYNAMIC), ("paper", "full"), ("paper", "pyramid")
    )
    real, tried = gpu.run_pass, []

    def generate(model: Any, engine: str, prompts: list[Any], *rest: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) == 3:
            return time_generate(model, engine, prompts, *rest)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    def one_pass(engine: Any, *rest: Any) -> Any:
        if "Full" in repr(engine.policy):
            raise RuntimeError("a kernel failed")
        return real(engine, *rest)

    monkeypatch.setattr(gpu, "time_generate", generate)
    monkeypatch.setattr(gpu, "run_pass", one_pass)
    monkeypatch.setattr(gpu, "STEP_DOWN", 0.75)
    one = bytes_per_request(shape_config("toy-mha"), 2, 32, 4)
    weights = sum(each.numel() for each in make_model("toy-mha").parameters()) * 2
    result = Bench(replace(plan, memory=weights + 4 * one), tmp_path / "x.json").run()
    rows = {(row["cell"], row["engine"]): row for row in result["rows"]}
    assert rows["paper", DYNAMIC]["error"] == "out of memory: CUDA out of memory. Tried to allocate"
    assert tried == [2, 4, 3] and rows["largest", DYNAMIC]["batch"] == 3, "the largest steps down"
    assert rows["largest", DYNAMIC]["share"] == 0.75
    assert rows["paper", "full"]["error"] == "RuntimeError: a kernel failed"
    assert rows["paper", "pyramid"]["output_tokens"] == 8
    by_name = {(bar["cell"], bar["ours"]): bar for bar in result["bars"]}
    assert by_name["paper", "pyramid"]["ratio"] is None, "nothing to compare with"
    gpu.tables(result)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 10))
    plan = plan_of(("paper", DYNAMIC), ("paper", "full"), ("single", "full"))
    runs = tuple(run._replace(guess=15.0 * (run.engine == "full")) for run in plan.runs)
    plan = replace(plan, runs=runs, budget_seconds=45.0)
    result = Bench(plan, tmp_path / "x.json", now=lambda: float(next(clock))).run()
    assert [(row["cell"], row["engine"]) for row in result["rows"]] == [("paper", DYNAMIC)]
    assert result["not_run"] == ["paper: full", "single: full"]
    assert json.loads((tmp_path / "x.json").read_text())["result"]["not_run"]


def test_ratios_and_bars() -> None:
    def row(cell: str, engine: str, speed: float) -> dict[str, Any]:
        return {"cell": cell, "engine": engine, "output_tokens_per_second": {"median": speed}}

    rows = [
        row("paper", DYNAMIC, 10.0),
        row("paper", STATIC, 20.0),
        row("paper", "pyramid", 90.0),
        row("long", "full", 10.0),
        row("long", "pyramid", 15.0),
        row("long", "pyramidinfer", 16.0),
    ]
    attention = {"heads": 4, "kv_heads": 2, "batch": 1, "context": 8, "kv_dtype": "int4"}
    result = {
        "rows": rows,
        "is_toy": False,
        "attention": [
            {**attention, "backend": "triton", "share_of_copy_bandwidth": 0.71},
            {**attention, "error": "out of memory"},
        ],
    }
    found = {(bar["cell"], bar["ours"], bar["against"]): bar for bar in bars(result)}
    paper = found["paper", "pyramid", STATIC]
    assert (paper["ratio"], paper["bar"], paper["paper"], paper["met"]) == (4.5, 4.0, 2.24, True)
    assert found["long", "pyramid", "full"]["met"] is False
    assert found["long", "pyramidinfer", "full"]["met"] is True
    assert found["largest", "pyramid", None]["met"] is None
    assert found["decode attention 4/2, 1 x 8, int4", "triton", "copy"]["met"] is True
    assert found["decode attention 4/2, 1 x 8, int4", None, "copy"]["met"] is None


def test_the_real_plan_is_the_papers() -> None:
    plan = real_plan()
    cells = {run.cell.name: run.cell for run in plan.runs}
    assert cells["paper"][1:] == ("llama2-13b", 32, 512, 256)
    assert cells["largest"][1:] == ("llama2-13b", None, 512, 256)
    assert cells["long"][1:] == ("llama3-8b", 64, 2048, 256)
    assert cells["longer"][3:] == (8192, 256) and cells["single"][2:] == (1, 512, 256)
    assert len(set(plan.runs)) == len(plan.runs) and plan.budget_seconds < 600
    for name in cells:
        engines = {run.engine for run in plan.runs if run.cell.name == name}
        assert {"full", "pyramidinfer", "pyramid", DYNAMIC} <= engines
    # 13B at the paper's workload: a full cache of 0.6 GiB a request
    assert 0.58 < bytes_per_request(shape_config("llama2-13b"), 2, 512, 256) / 2**30 < 0.8


def test_weights_change_hands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, made = gpu.Weights(PYTHON_PLAN), []
    # float32: linears of 16 bits are packed only where the CPU multiplies them
    make = partial(make_model, "toy-mha", "float32")
    monkeypatch.setattr(gpu.Rig, "load", lambda self: made.append(1) or make())
    model = weights.as_model("toy-mha")
    packed = weights.as_packed("toy-mha")
    assert weights.as_packed("toy-mha") is packed and len(made) == 1
    assert packed.end_ids == {2} and weights.model is None
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0, "used up"
    assert weights.as_model("toy-mha") is not model and len(made) == 2
    assert "shared" not in vars(weights.of("toy-mha"))


def test_generate_is_asked_for_the_cache_of_a_row() -> None:
    seen: list[Any] = []

    class Model:
        device = torch.device("cpu")
        generation_config = type("Settings", (), {"eos_token_id": 2})()

        def generate(self, ids: Any, attention_mask: Any, generation_config: Any) -> Any:
            seen.append(generation_config)
            more = torch.zeros(len(ids), generation_config.max_new_tokens, dtype=ids.dtype)
            return torch.cat([ids, more], 1)

    for engine in CACHES:
        found = time_generate(Model(), engine, [[5, 6], [7, 8]], 9, 2)
        assert found["output_tokens"] == 18
    asked = [(each.cache_implementation, each.disable_compile) for each in seen]
    assert set(asked) == {(None, True), ("static", True), ("static", False)}
    assert [each.max_new_tokens for each in seen] == [4, 1, 1, 9, 9] * 2 + [1, 9, 1, 1, 9, 9]


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="cuda|GPU"):
        gpu.main(["--json", str(tmp_path / "x.json")])
    with pytest.raises(ValueError):
        run_bench(real_plan(), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
