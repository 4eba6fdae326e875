"""The official legacy code's outputs, reproduced in float64 (see tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, PyramidInfer
from pyramidinfer.codec import Codec
from pyramidinfer.types import Trace
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


#: Of the entries that reach a layer, and of those held in the end, what share int8 has in common
#: with the official code at least, over all layers.
REACH, HELD = 0.94, 0.9


def shared(mine: list[list[Tensor]], theirs: list[list[int]]) -> float:
    """Of the official code's entries, the share that one head of ours has."""
    both = [len({*heads[0].tolist()} & {*each}) for heads, each in zip(mine, theirs, strict=True)]
    return sum(both) / sum(map(len, theirs))


def in_eight_bits(case: str, backend: str) -> tuple[Trace, dict[str, Any]]:
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    llm = LLM(
        str(GOLDEN / case),
        policy=official(golden["parameters"]),
        dtype="float64" if backend == "reference" else "float32",
        kv_memory="16MiB",
        backend=backend,
        kv_dtype="int8",
    )
    trace = llm.trace(golden["prompt"], max_tokens=len(golden["tokens"]))
    llm.engine.check()
    return trace, golden


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_official_code_is_followed_in_eight_bits(case: str, backend: str) -> None:
    """As many entries at every step, and nearly the same ones.  (Random models are chaotic: what
    is a little different in one layer makes other tokens.)"""
    trace, golden = in_eight_bits(case, backend)
    assert list(map(of_layers, trace.kept_len_by_step)) == golden["kept_len_by_step"]
    assert shared(trace.prefill_positions, golden["prefill_positions"]) >= REACH
    assert shared(trace.kept_positions, golden["final_positions"]) >= HELD


@pytest.mark.parametrize("case", CASES)
def test_scales_of_another_entry_are_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These bounds can fail: every entry gets the scales of the one before it."""
    encode = Codec.encode

    def shifted(self: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = encode(self, x)
        return codes, scales.roll(1, 0)

    monkeypatch.setattr(Codec, "encode", shifted)
    trace, golden = in_eight_bits(case, "reference")
    assert shared(trace.prefill_positions, golden["prefill_positions"]) < REACH


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
