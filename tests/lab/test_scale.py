"""What ``bench scale`` says by formula is what ranks send and hold, and what the page shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.lab.bench.scale import ScalePlan
from pyramidinfer.lab.bench.scale_page import PAGE, render_scale
from pyramidinfer.lab.bench.scale_plan import Work, cache_bytes, simulate, weight_bytes, wire_bytes
from pyramidinfer.lab.shapes import empty_shape
from pyramidinfer.models import ModelRunner
from tests.engine.build import policy_named
from tests.scale.build import CONFIG
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_model

ROOT = Path(__file__).parents[2]
WORK = Work(70, 10)


@pytest.mark.parametrize("size", [2, 4])
def test_the_formula_is_what_is_sent_and_held(size: int) -> None:
    """To the byte, in prefill and while decoding, with KV heads that ranks share and without."""
    model = tiny_model("llama", torch.float32)
    with split_engine(model, policy_named("pyramid"), CONFIG, size) as engine:
        for name in ("full", "snapkv", "pyramid"):
            engine.runner.ranks.sent.clear()
            params = SamplingParams(max_tokens=WORK.new, ignore_eos=True, temperature=0.0)
            prompt, policy = random_prompt(1, WORK.prompt), policy_named(name)
            request = engine.make(prompt, params, policy=policy, hold=True)
            engine.run([request])
            sent, lens = simulate(engine.runner, request.policy, WORK, size)
            assert dict(engine.runner.ranks.sent) == {k: v for k, v in sent.items() if v}, name
            assert request.kv is not None
            assert lens == [list(heads) for heads in request.kv.kept_len]
            engine.release(request)


def test_weights_and_cache_of_more_ranks_than_anybody_has() -> None:
    def of(ranks: int) -> tuple[int, int]:
        empty = empty_shape("llama3-70b")
        runner = ModelRunner(empty, "reference")
        lens = [[1000] * 8] * runner.depth
        return weight_bytes(empty, runner, ranks), max(cache_bytes(runner, lens, ranks))

    whole, parts = of(1), {ranks: of(ranks) for ranks in (8, 64)}
    assert 140e9 < whole[0] < 142e9
    assert whole[0] / 8 < parts[8][0] < whole[0] / 8 * 1.01
    assert parts[8][1] * 8 == whole[1] and parts[64][1] == parts[8][1]
    assert parts[64][0] > whole[0] / 64 * 1.05  # each KV head's weights are there eight times


def test_what_a_ring_sends() -> None:
    from collections import Counter

    assert wire_bytes(Counter(layers=100, embedding=20, logits=7, policy=3), 4) == 120 * 1.5 + 30


def test_ranks_are_held_to_one() -> None:
    with pytest.raises(ValueError, match="the first must be 1"):
        ScalePlan(ranks=(2, 4))


def test_the_page_shows_the_committed_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    page = (ROOT / PAGE).read_text()
    assert render_scale(page, entry) == page
    assert {row["ranks"] for row in entry["result"]["rows"]} == {1, 2, 4}
    for row in entry["result"]["rows"]:
        assert row["same_tokens"]
        assert row["cache_bytes"] == row["cache_by_formula"]
        if row["ranks"] > 1:
            assert row["sent"] == {k: v for k, v in row["sent_by_formula"].items() if v}
