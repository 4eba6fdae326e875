"""Tokens, kept entries and work are the same on one rank and on several (float64)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.dealing import deal_layers, layer_work
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.scheduler import Counts
from pyramidinfer.engine.surviving import survival
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.families import FAMILIES, find_family
from pyramidinfer.models.loading import load_model
from pyramidinfer.models.ranks import Ranks, check_heads
from pyramidinfer.models.sharding import plan_of
from pyramidinfer.models.stages import Stages, check_stages, keep_stage, ranges_of, share_layers
from pyramidinfer.policies import POLICIES, Full, Policy, SnapKV, make_policy
from pyramidinfer.types import AttentionShape, Needs, Reduce, View
from tests.engine.build import alone, policy_named
from tests.scale.build import CONFIG, FOUR, TWO, answers
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
#: Policies that rest on a head profile.
PROFILED = {"duo", "pyramid", "triattention"}
#: Policies that look at KV heads in different ways; with four ranks two share a KV head.
SHARING = ["h2o", "kvzip", "pyramid", "rkv", "scissorhands", "tova"]


def equal(
    family: str,
    size: int,
    policies: list[str],
    dtype: torch.dtype = torch.float64,
    layers: list[int] | None = None,
    **changes: Any,
) -> None:
    model = tiny_model(family, dtype, **changes)
    expected = answers(Engine(model, policy_named("full"), CONFIG), policies)
    with split_engine(model, policy_named("full"), CONFIG, size, layers=layers) as engine:
        found = answers(engine, policies)
        engine.check()
        for name in policies:
            assert found[name] == expected[name], name


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
def test_keys_and_values_of_8_bits_on_two_ranks(tensor: int, layers: list[int] | None) -> None:
    """Scales belong to a head, so it does not matter which rank has it."""
    model, config, names = (
        tiny_model("llama", torch.float64),
        replace(CONFIG, kv_dtype="int8"),
        ["full", "h2o"],
    )
    expected = answers(Engine(model, policy_named("full"), config), names)
    with split_engine(model, policy_named("full"), config, tensor, layers=layers) as engine:
        assert engine.pool.groups[0].spec.codec is not None
        assert answers(engine, names) == expected
        engine.check()


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
def test_every_policy_on_two_ranks(tensor: int, layers: list[int] | None) -> None:
    equal("llama", tensor, sorted(set(POLICIES) - PROFILED), layers=layers)


@pytest.mark.parametrize("tensor, layers", [(1, FOUR), (2, TWO)])
def test_four_ranks_that_are_stages(tensor: int, layers: list[int]) -> None:
    equal("llama", tensor, ["h2o", "kvzip", "pyramidinfer", "streaming_llm"], layers=layers)


def test_ranks_that_share_a_kv_head() -> None:
    equal("llama", 4, [name for name in SHARING if name != "pyramid"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_on_two_ranks(family: str) -> None:
    equal(family, 2, ["full", "snapkv"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_in_two_stages(family: str) -> None:
    depth = tiny_config(family).num_hidden_layers
    equal(family, 1, ["full", "pyramidinfer"], layers=[1, depth - 1])


@pytest.mark.parametrize(
    "family, tensor, layers",
    [("llama", 2, None), ("llama", 1, TWO), ("gemma3_text", 2, None)],
)
def test_packed_layers(family: str, tensor: int, layers: list[int] | None) -> None:
    """In float32 the C++ kernels multiply and choose, and read embeddings from the packed head if
    both are one tensor; tokens are those of one rank."""
    names = ["full", "snapkv", "pyramidinfer", "h2o"]
    equal(family, tensor, names, torch.float32, layers, tie_word_embeddings=True)


@pytest.mark.parametrize("size, layers", [(2, None), (4, None), (1, TWO), (2, TWO)])
def test_profiles_are_measured_together(size: int, layers: list[int] | None) -> None:
    """A head profile is that of one rank, and so are tokens of policies that rest on it."""
    model = tiny_model("llama", torch.float64)
    one = Engine(model, policy_named("pyramid"), CONFIG)
    expected = answers(one, ["pyramid", "duo"])
    with split_engine(model, policy_named("pyramid"), CONFIG, size, layers=layers) as engine:
        assert engine.policy == one.policy
        assert answers(engine, ["pyramid", "duo"]) == expected


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, [5, 7])])
def test_a_golden_case(tensor: int, layers: list[int] | None) -> None:
    """Every kept position of the official code, traced on two ranks."""
    loaded = load_model(GOLDEN / "gqa12", dtype="float64", device="cpu")
    prompt, policy = random_prompt(1, 90), policy_named("pyramidinfer")
    expected = trace(Engine(loaded.model, policy, CONFIG), prompt, 12, ())
    with split_engine(loaded.model, policy, CONFIG, tensor, layers=layers) as engine:
        found = trace(engine, prompt, 12, ())
    assert found.token_ids == expected.token_ids
    assert found.kept_len_by_step == expected.kept_len_by_step
    for mine, theirs in zip(found.kept_positions, expected.kept_positions, strict=True):
        assert [head.tolist() for head in mine] == [head.tolist() for head in theirs]
    torch.testing.assert_close(found.final_logits, expected.final_logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
@pytest.mark.parametrize("policy", ["snapkv", "streaming_llm"])
def test_what_else_is_done_together(tensor: int, layers: list[int] | None, policy: str) -> None:
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

    expected = run(Engine(model, policy_named(policy), config))
    if policy == "snapkv":
        assert expected[-1][0] > 0, "memory must run short"
    with split_engine(model, policy_named(policy), config, tensor, layers=layers) as engine:
        assert run(engine) == expected


def short_of_memory(
    kibibytes: int, options: dict[str, Any], sizes: list[tuple[Policy, int, int]]
) -> tuple[list[Request], Counts]:
    """Requests of a policy, a prompt and an answer each, on two stages with too little memory."""
    config = EngineConfig(
        kv_memory=f"{kibibytes}KiB",
        page_size=4,
        slot_scores=True,
        admission="overcommit",
        expected_output=0.1,
        **options,
    )
    model = tiny_model("llama", torch.float64)
    with split_engine(model, policy_named("full"), config, 1, layers=[2, 2]) as engine:
        asked = []
        for seed, (policy, length, new) in enumerate(sizes):
            params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0)
            asked.append(engine.make(random_prompt(seed, length), params, policy=policy))
        engine.run(asked)
        engine.check()
        return asked, engine.scheduler.counts


def test_caches_computed_anew_in_stages() -> None:
    asked, counts = short_of_memory(
        96, {"preempt": "recompute"}, [(policy_named("full"), 20, 60)] * 5
    )
    assert counts.recomputed > 0
    for each in asked:
        assert each.output == alone("full", "llama", each.prompt[:20], each.params)


def test_budgets_lowered_in_stages() -> None:
    full, cut = policy_named("full"), make_policy("h2o", 0.7)
    asked, counts = short_of_memory(56, {"elastic": 0.2}, [(full, 6, 80), *[(cut, 24, 75)] * 2])
    assert counts.tightened > 0 and counts.swapped == 0
    assert asked[0].output == alone("full", "llama", asked[0].prompt[:6], asked[0].params)
    for each in asked[1:]:
        assert each.lowered_to is not None and 0.2 <= each.lowered_to < 0.7
        assert each.kv is not None and len(each.output) == 75
        assert max(map(max, each.kv.kept_len)) < 0.7 * 24 + 75


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
def test_what_a_caller_does_wrong_is_said_and_harms_nobody(
    tensor: int, layers: list[int] | None
) -> None:
    """Rank 0 says so; the other ranks go on."""
    model, params = tiny_model("llama", torch.float64), SamplingParams(max_tokens=4)
    prompt = random_prompt(1, 20)

    class Mine(Full):
        name = "mine"

    with split_engine(model, policy_named("snapkv"), CONFIG, tensor, layers=layers) as engine:
        ended = engine.add(prompt, params)
        engine.run([ended])
        for wrong in (lambda: engine.truncate(ended, 3), lambda: engine.recompress(ended)):
            with pytest.raises(ValueError, match=f"request {ended.id} holds no cache"):
                wrong()
        held = engine.add(prompt, params, hold=True)
        engine.run([held])
        branch = engine.branch(held, [5, 6], params)
        engine.release(held)
        with pytest.raises(ValueError, match=f"request {held.id} no longer holds its cache"):
            engine.submit(branch)
        for wrong, why in (
            (lambda: survival(engine, "a", prompt, engine.policy, 9), "shown on one rank only"),
            (engine.recompressor, "compress_idle .* works on one rank only"),
        ):
            with pytest.raises(ValueError, match=why):
                wrong()
        Mine.__module__ = "__main__"
        with pytest.raises(ValueError, match="policy 'mine' is defined in the program itself"):
            engine.make(prompt, params, policy=Mine())
        Mine.__module__ = __name__
        with pytest.raises(ValueError, match="policy 'mine' cannot be sent to other ranks"):
            engine.make(prompt, params, policy=Mine())
        many = engine.make(prompt, params, samples=3)
        engine.submit(many)
        engine.abort(many.samples[0])
        engine.run([many])
        assert many.samples[0].finish_reason == "abort" and len(many.samples[1].output) == 4
        early = engine.make(prompt, params, samples=3)
        engine.submit(early)
        engine.abort(early)
        assert {each.finish_reason for each in (early, *early.samples)} == {"abort"}
        assert not engine._known, "what has ended is forgotten"
        engine.check()


@dataclass(frozen=True)
class TopOfSums(SnapKV):
    """By a score that ranks with a part of the heads each cannot work out."""

    name = "top_of_sums"

    def needs(self, view: View) -> Needs:
        return replace(super().needs(view), reduce=Reduce("max", "sum"))


def test_scores_that_ranks_cannot_have_are_refused_before_they_run() -> None:
    model, policy = tiny_model("llama", torch.float64), TopOfSums(keep=0.5, window=4)
    with split_engine(model, policy_named("full"), CONFIG, 2, layers=TWO) as engine:
        with pytest.raises(ValueError, match="tensor_parallel_size=2 ask for 'kv_mean'"):
            engine.make([5, 6, 7], SamplingParams(), policy=policy)
        assert len(answers(engine, ["snapkv"])["snapkv"]) == 3


def test_long_answers_are_cut_alike_in_stages() -> None:
    """A layer's budget may hang on the first layer's length, which another stage has."""
    model, found = tiny_model("llama", torch.float64), []
    policy = make_policy("pyramidinfer", 0.4, min_context=4, gen_chunk=16)
    params = SamplingParams(max_tokens=90, ignore_eos=True, temperature=0.0)

    def run(engine: Engine) -> list[object]:
        asked = [engine.make(random_prompt(s, 30 + 9 * s), params) for s in range(3)]
        engine.run(asked)
        return [(each.output, each.kv and each.kv.kept_len) for each in asked]

    expected = run(Engine(model, policy, CONFIG))
    with split_engine(model, policy, CONFIG, 1, layers=[1, 2, 1]) as engine:
        found = run(engine)
    assert found == expected


def test_several_steps_are_on_their_way_at_once() -> None:
    """Stages work on different requests; ends, aborts, scores, samples, reuse and prompts' logits
    of requests that are on their way are those of one rank."""
    model = tiny_model("llama", torch.float64)
    config = EngineConfig(kv_memory="4MiB", page_size=4, prefill_chunk=16, step_tokens=64)

    def run(engine: Engine) -> list[object]:
        def ask(seed: int, new: int, **params: Any) -> SamplingParams:
            return SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, **params)

        full, snapkv = policy_named("full"), policy_named("snapkv")
        asked = [engine.make(random_prompt(s, 9 * s), ask(s, 3 * s)) for s in range(1, 8)]
        asked.append(engine.make(random_prompt(8, 30), ask(8, 9), samples=3))
        asked.append(engine.make(random_prompt(9, 30), ask(9, 4, prompt_logprobs=2), policy=full))
        scored = Scoring(random_prompt(10, 12), False)
        asked.append(engine.make(random_prompt(10, 30), ask(10, 1), policy=full, scoring=scored))
        begun = random_prompt(11, 30)
        asked.append(engine.make(begun, ask(11, 5), owner="a"))
        lost = engine.make(random_prompt(12, 50), ask(12, 30))
        for each in (*asked, lost):
            engine.submit(each)
        most = 0
        for step in range(200):
            engine.step()
            most = max(most, len(getattr(engine, "_flights", ())))
            if step == 12:
                engine.abort(lost)
        assert engine.scheduler.idle
        text = [*begun, *asked[-1].output, 5, 6, 7]
        further = engine.make(text, ask(13, 6), owner="a")
        engine.run([further])
        assert further.reused > 0
        held = engine.make(random_prompt(14, 150), ask(14, 4), policy=snapkv, hold=True)
        engine.run([held])
        assert engine.recompress(held)
        turn = engine.extend(held, random_prompt(15, 9), ask(15, 6))
        engine.run([turn])
        engine.check()
        assert most == engine.runner.stages.size - 1
        everyone = [*asked, *asked[7].samples, further, turn]
        logprobs = [[round(each.logprob, 9) for each in r.prompt_logprobs] for r in everyone]
        return [*(each.output for each in everyone), logprobs, scored.greedy, len(lost.output) > 0]

    expected = run(Engine(model, policy_named("pyramidinfer"), config))
    for tensor, layers in ((1, TWO), (1, [1, 2, 1]), (2, TWO)):
        with split_engine(model, policy_named("pyramidinfer"), config, tensor, layers=layers) as on:
            assert run(on) == expected, (tensor, layers)


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
def test_prefixes_are_shared_on_all_ranks_alike(tensor: int, layers: list[int] | None) -> None:
    """By a request that still runs, and by what a policy kept of a prefix taken in alone."""
    model = tiny_model("llama", torch.float64)
    config = EngineConfig(kv_memory="4MiB", page_size=4, prefill_chunk=16, step_tokens=64)
    system = random_prompt(1, 50)

    def run(engine: Engine) -> list[tuple[int, list[int]]]:
        def ask(seed: int, new: int, prefix: int) -> Request:
            params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0)
            policy = policy_named("snapkv" if prefix else "full")
            prompt = system + random_prompt(seed, 9)
            request = engine.make(prompt, params, policy=policy, owner="a", prefix=prefix)
            engine.submit(request)
            return request

        asked = [ask(2, 40, 0), ask(3, 40, 50)]
        while any(each.status != "running" for each in asked):
            engine.step()
        asked += [ask(seed, 8, prefix) for seed in (4, 5) for prefix in (0, 50)]
        while not engine.scheduler.idle:
            engine.step()
        engine.check()
        return [(each.reused, each.output) for each in asked]

    expected = run(Engine(model, policy_named("full"), config))
    assert [reused for reused, _ in expected] == [0, 0, 48, 50, 48, 50]
    with split_engine(model, policy_named("full"), config, tensor, layers=layers) as engine:
        assert run(engine) == expected


# --- what cannot be ----------------------------------------------------------------------------


def test_a_stage_that_cannot_turn_keys_refuses_policies_that_stream() -> None:
    model = tiny_model("gemma2", torch.float64)
    refused = pytest.raises(ValueError, match="one of these has none: pipeline_layers=1,3; give")
    with split_engine(model, policy_named("full"), CONFIG, 1, layers=[1, 3]) as engine, refused:
        engine.make([5, 6], SamplingParams(), policy=policy_named("streaming_llm"))


def test_layers_are_dealt_so_that_the_costliest_stage_costs_least() -> None:
    assert share_layers([1.0] * 6, 2) == ranges_of([3, 3])
    assert share_layers([1.0] * 6, 2, last=2.0) == ranges_of([4, 2])
    assert share_layers([4.0, 1.0, 1.0, 1.0, 1.0], 2) == ranges_of([1, 4])
    assert share_layers([1.0, 1.0], 2, last=9.0) == ranges_of([1, 1])
    with pytest.raises(ValueError, match="pipeline_parallel_size=5: this model has 4 layers"):
        check_stages(5, 4)


def test_layers_go_by_what_the_policy_forecasts() -> None:
    """A policy that drops tokens between layers has its early layers cost more."""
    empty = tiny_model("llama", num_hidden_layers=12)
    runner = ModelRunner(empty, "reference")
    full, dropping = make_policy("full"), make_policy("pyramidinfer", 0.3, min_context=4)
    work, head = layer_work(empty, runner, full)
    assert len(set(work)) == 1 and head > 0
    even, uneven = (len(deal_layers(empty, runner, p, 2, None)[0]) for p in (full, dropping))
    assert uneven < even
    assert deal_layers(empty, runner, full, 3, "2,3,7") == ranges_of([2, 3, 7])


def test_a_stage_has_its_own_weights_alone() -> None:
    for family in sorted(FAMILIES):
        whole = tiny_model(family)
        parts = [copy.deepcopy(whole) for _ in range(2)]
        stages = ranges_of([1, len(whole.get_submodule(find_family(whole.config).body).layers) - 1])
        for index, part in enumerate(parts):
            keep_stage(part, Stages(stages, index))
        sizes = [{n: p.numel() for n, p in part.named_parameters()} for part in parts]
        for name, weight in whole.named_parameters():
            held = [size[name] for size in sizes if size.get(name)]
            shared = whole.get_output_embeddings().weight is weight and len(held) == 2
            assert held == [weight.numel()] or shared, (family, name)


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
