"""Tokens, kept entries and work are the same on one rank and on several (float64)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import load_model
from pyramidinfer.models.ranks import Ranks, check_heads
from pyramidinfer.models.sharding import plan_of
from pyramidinfer.policies import POLICIES
from pyramidinfer.types import AttentionShape, Needs, Reduce
from tests.engine.build import policy_named
from tests.scale.build import CONFIG, answers
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
#: Policies that look at KV heads in different ways; with four ranks two share a KV head.
SHARING = ["h2o", "kvzip", "pyramid", "rkv", "scissorhands", "tova"]


def equal(family: str, size: int, policies: list[str], dtype: torch.dtype = torch.float64) -> None:
    model = tiny_model(family, dtype)
    expected = answers(Engine(model, policy_named("full"), CONFIG), policies)
    with split_engine(model, policy_named("full"), CONFIG, size) as engine:
        found = answers(engine, policies)
        engine.check()
        for name in policies:
            assert found[name] == expected[name], name


def test_every_policy_on_two_ranks() -> None:
    equal("llama", 2, sorted(set(POLICIES) - {"duo", "pyramid", "triattention"}))


def test_ranks_that_share_a_kv_head() -> None:
    equal("llama", 4, [name for name in SHARING if name != "pyramid"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_on_two_ranks(family: str) -> None:
    equal(family, 2, ["full", "snapkv"])


def test_packed_layers() -> None:
    """In float32 the C++ kernels multiply and choose; tokens are those of one rank."""
    equal("llama", 2, ["full", "snapkv", "pyramidinfer"], torch.float32)


@pytest.mark.parametrize("size", [2, 4])
def test_profiles_are_measured_together(size: int) -> None:
    """A head profile is that of one rank, and so are tokens of policies that rest on it."""
    model = tiny_model("llama", torch.float64)
    one = Engine(model, policy_named("pyramid"), CONFIG)
    expected = answers(one, ["pyramid", "duo"])
    with split_engine(model, policy_named("pyramid"), CONFIG, size) as engine:
        assert engine.policy == one.policy
        assert answers(engine, ["pyramid", "duo"]) == expected


def test_a_golden_case() -> None:
    """Every kept position of the official code, traced on two ranks."""
    loaded = load_model(GOLDEN / "gqa12", dtype="float64", device="cpu")
    prompt, policy = random_prompt(1, 90), policy_named("pyramidinfer")
    expected = trace(Engine(loaded.model, policy, CONFIG), prompt, 12, ())
    with split_engine(loaded.model, policy, CONFIG, 2) as engine:
        found = trace(engine, prompt, 12, ())
    assert found.token_ids == expected.token_ids
    assert found.kept_len_by_step == expected.kept_len_by_step
    for mine, theirs in zip(found.kept_positions, expected.kept_positions, strict=True):
        assert [head.tolist() for head in mine] == [head.tolist() for head in theirs]
    torch.testing.assert_close(found.final_logits, expected.final_logits, atol=1e-9, rtol=0)


def test_what_else_is_done_together() -> None:
    """Held caches, further turns, branches, samples, scores, aborts, pressure and reuse leave all
    ranks in the same state (each step compares) and every page accounted for."""
    model = tiny_model("llama", torch.float64)
    config = EngineConfig(
        kv_memory="256KiB", page_size=4, prefill_chunk=16, admission="overcommit", max_requests=8
    )
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)

    def run(engine: Engine) -> list[list[int]]:
        held = engine.add(random_prompt(1, 40), params, hold=True)
        engine.run([held])
        turn = engine.extend(held, random_prompt(2, 9), params, hold=True)
        engine.run([turn])
        engine.truncate(turn, 60)
        branch = engine.branch(turn, random_prompt(3, 5), params)
        many = engine.make(random_prompt(4, 20), params, samples=3)
        lost = engine.make(random_prompt(5, 30), params)
        others = [engine.make(random_prompt(seed, 40), params) for seed in range(6, 12)]
        for each in (branch, many, lost, *others):
            engine.submit(each)
        for _ in range(4):
            engine.step()
        engine.abort(lost)
        while not engine.scheduler.idle:
            engine.step()
        engine.release(turn)
        engine.check()
        done = [held, turn, branch, many, *many.samples, *others]
        return [each.output for each in done] + [[engine.scheduler.counts.swapped]]

    expected = run(Engine(model, policy_named("snapkv"), config))
    assert expected[-1][0] > 0, "memory must run short"
    with split_engine(model, policy_named("snapkv"), config, 2) as engine:
        assert run(engine) == expected


# --- what cannot be ----------------------------------------------------------------------------


def test_heads_that_do_not_divide_are_refused_with_sizes_that_work() -> None:
    with pytest.raises(ValueError, match="9 query heads over 3 KV heads .* work: 1, 3, 9$"):
        check_heads(2, AttentionShape(9, 3, 64, 64))
    check_heads(8, AttentionShape(8, 2, 64, 64))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_a_plan(family: str) -> None:
    assert {"rowwise"} < set(plan_of(tiny_config(family)).values())


def test_scores_that_no_rank_can_have_are_refused() -> None:
    needs = Needs(window=4, reduce=Reduce("max", "sum"), retain=True)
    Ranks().check(needs)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 ask for 'kv_mean' or 'kv_max'"):
        Ranks(0, 2).check(needs)


def test_parts_cover_everything_once() -> None:
    for size, count in ((3, 10), (4, 4), (8, 5)):
        parts = [Ranks(rank, size).part(count) for rank in range(size)]
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
