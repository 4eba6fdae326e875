"""The official legacy code's outputs, reproduced in float64 (see tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, PyramidInfer
from tests.tiny import of_layers

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.json"))


def official(parameters: dict[str, Any]) -> PyramidInfer:
    """The policy with the official option names translated."""
    prefill, generation = parameters["prefill_stage"], parameters["generation_stage"]
    assert generation["gen_decay_strategy"] == "cosine"
    return PyramidInfer(
        recent_ratio=prefill["recent_ratio"],
        prefill_decay=prefill["prefill_decay_ratio"],
        decay_curve=prefill["prefill_decay_strategy"],
        interval=prefill["layerwise_downsample_interval"],
        min_context=prefill["min_context_length"],
        sinks=prefill["streamingllm_sink_len"],
        distance_weight=prefill["distance_weight"],
        gen_decay=generation["gen_decay_ratio"],
        gen_keep=generation["gen_compress_ratio"],
        gen_chunk=generation["exceed_length_to_compress"],
    )


def test_cases_are_there() -> None:
    assert CASES == ["gqa12", "mha10", "mha8"]


@pytest.mark.parametrize("chunk", [1024, 37])
@pytest.mark.parametrize("case", CASES)
def test_official_code_is_reproduced(case: str, chunk: int) -> None:
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    llm = LLM(
        str(GOLDEN / case),
        policy=official(golden["parameters"]),
        dtype="float64",
        kv_memory="16MiB",
        prefill_chunk=chunk,
    )
    trace = llm.trace(golden["prompt"], max_tokens=len(golden["tokens"]))
    for mine, theirs in (
        (trace.prefill_positions, golden["prefill_positions"]),
        (trace.kept_positions, golden["final_positions"]),
    ):
        for layer, (positions, expected) in enumerate(zip(mine, theirs, strict=True)):
            for head in positions:
                assert head.tolist() == expected, f"layer {layer}"
    assert trace.token_ids == golden["tokens"]
    assert list(map(of_layers, trace.kept_len_by_step)) == golden["kept_len_by_step"]
    for logits, name in (
        (trace.prefill_logits, "prefill_logits"),
        (trace.final_logits, "final_logits"),
    ):
        expected = torch.tensor(golden[name], dtype=torch.float64)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    llm.engine.check()


def test_forecast_is_exact_on_golden_cases() -> None:
    """Lengths depend on lengths only, so the bound admission rests on is met exactly."""
    for case in CASES:
        golden = json.loads((GOLDEN / case / "golden.json").read_text())
        policy = official(golden["parameters"])
        llm = LLM(str(GOLDEN / case), policy=policy, kv_memory="16MiB")
        layers = llm.engine.runner.layers_for(1000)
        forecast = policy.forecast(len(golden["prompt"]), len(golden["tokens"]), layers)
        assert forecast.reach == [len(p) for p in golden["prefill_positions"]]
        peaks = [max(column) for column in zip(*golden["kept_len_by_step"], strict=True)]
        # entries are counted before a thinning, lists after it: at most one chunk apart
        chunk = policy.gen_chunk
        for bound, peak in zip(forecast.kept, peaks, strict=True):
            assert peak <= bound <= peak + chunk
