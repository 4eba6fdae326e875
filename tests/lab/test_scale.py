"""What ``bench scale`` says by formula is what ranks send and hold, and what the page shows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.lab.bench.scale_page import PAGE, render_scale
from pyramidinfer.lab.bench.scale_plan import (
    Split,
    Work,
    cache_bytes,
    simulate,
    weight_bytes,
    wire_bytes,
)
from pyramidinfer.lab.bench.scaling_plans import ScalePlan, pairs_of
from pyramidinfer.lab.shapes import empty_shape
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.stages import ranges_of
from tests.engine.build import policy_named
from tests.scale.build import CONFIG
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_model

ROOT = Path(__file__).parents[2]
WORK = Work(70, 10)


SPLITS = [(2, None), (4, None), (1, [2, 2]), (1, [1, 1, 2]), (2, [1, 3])]


@pytest.mark.parametrize("tensor, layers", SPLITS)
def test_the_formula_is_what_is_sent_and_held(tensor: int, layers: list[int] | None) -> None:
    """To the byte, in prefill and while decoding, with KV heads that ranks share and without, on
    every stage."""
    model = tiny_model("llama", torch.float32)
    with split_engine(model, policy_named("pyramid"), CONFIG, tensor, layers=layers) as engine:
        split = Split(tensor, engine.runner.stages.layers)
        for name in ("full", "snapkv", "pyramid"):
            before = engine.holding()
            params = SamplingParams(max_tokens=WORK.new, ignore_eos=True, temperature=0.0)
            prompt, policy = random_prompt(1, WORK.prompt), policy_named(name)
            request = engine.make(prompt, params, policy=policy, hold=True)
            engine.run([request])
            sent, lens = simulate(engine.runner, request.policy, WORK, split)
            after = engine.holding()
            for stage, (old, new) in enumerate(zip(before, after, strict=True)):
                found = Counter(new.sent) - Counter(old.sent)
                assert found == +sent[stage], (name, stage)
            assert request.kv is not None
            assert lens == [list(heads) for heads in request.kv.kept_len]
            engine.release(request)


def test_weights_and_cache_of_more_ranks_than_anybody_has() -> None:
    def of(tensor: int, stages: int = 1) -> tuple[int, int]:
        empty = empty_shape("llama3-70b")
        runner = ModelRunner(empty, "reference")
        lens = [[1000] * 8] * runner.depth
        split = Split(tensor, ranges_of([runner.depth // stages] * stages))
        return weight_bytes(empty, runner, split), max(cache_bytes(runner, lens, split))

    whole, parts = of(1), {ranks: of(ranks) for ranks in (8, 64)}
    assert 140e9 < whole[0] < 142e9
    assert whole[0] / 8 < parts[8][0] < whole[0] / 8 * 1.01
    assert parts[8][1] * 8 == whole[1] and parts[64][1] == parts[8][1]
    assert parts[64][0] > whole[0] / 64 * 1.05  # each KV head's weights are there eight times
    both = of(8, 8)
    assert both[1] * 64 == whole[1]
    assert whole[0] / 64 < both[0] < whole[0] / 64 * 1.1  # the first stage has the embedding, too


def test_what_is_put_on_a_link() -> None:
    sent = Counter(layers=100, embedding=20, logits=7, policy=3, rows=11, prompts=2, results=1)
    assert wire_bytes(sent, 4) == 120 * 1.5 + 30 + 14


def test_sizes_are_held_to_one_rank() -> None:
    assert pairs_of("--sizes", "1x1, 2x4") == ((1, 1), (2, 4))
    with pytest.raises(ValueError, match="--sizes 2x1: the first must be 1x1"):
        ScalePlan(sizes=((2, 1),))
    with pytest.raises(ValueError, match="'2,4' must be a list such as 1x1,2x1"):
        pairs_of("--sizes", "2,4")


def test_the_page_shows_the_committed_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    page = (ROOT / PAGE).read_text()
    dealt = json.loads((ROOT / "benchmarks" / "results" / "stages.json").read_text())
    assert render_scale(page, entry, dealt) == page
    for row in dealt["result"]["rows"]:
        assert row["same_tokens"]
    ranks = {row["tensor"] * row["stages"] for row in entry["result"]["rows"]}
    assert ranks == {1, 2, 4}
    for row in entry["result"]["rows"]:
        assert row["same_tokens"]
        for name in ("cache", "weights"):
            assert row[f"{name}_bytes"] == row[f"{name}_by_formula"]
        assert row["sent"] == row["sent_by_formula"]
