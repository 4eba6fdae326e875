"""Several answers to one prompt: taken in once, on shared pages, each as if asked for alone."""

from __future__ import annotations

import pytest
import torch

from pyramidinfer import SamplingParams
from tests.engine.serving import NAMES, alone, finish, queue, start, step
from tests.tiny import random_prompt

HOT = {"temperature": 1.0, "seed": 11}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_answer_is_that_of_a_request_of_its_own(name: str, family: str) -> None:
    """Sample i has the seed plus i; others run beside them, prompts go in in parts (float64)."""
    engine = start(name, family, prefill_chunk=8, step_tokens=24)
    other = queue(engine, random_prompt(9, 20), 15)
    request = queue(engine, random_prompt(1, 37), 12, samples=3, **HOT)
    finish(engine)
    answers = [each.output for each in (request, *request.samples)]
    expected = [
        alone(name, family, 1, 37, 12, temperature=1.0, seed=11 + index) for index in range(3)
    ]
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == 3, "seeds of this case must differ"
    assert other.output == alone(name, family, 9, 20, 15)
    for each in request.samples:
        assert each.computed == request.computed
        assert each.kv is not None and each.times.first_token is not None
    assert not engine.pool.tables


def test_samples_without_a_seed_differ() -> None:
    engine = start("full")
    request = queue(engine, random_prompt(1, 20), 20, samples=3, temperature=1.0)
    finish(engine)
    assert len({tuple(each.output) for each in (request, *request.samples)}) == 3


def test_seeds_wrap_around() -> None:
    engine = start("full")
    request = queue(engine, random_prompt(1, 20), 2, samples=2, temperature=1.0, seed=2**63 - 1)
    assert request.samples[0].params.seed == 0
    finish(engine)


def test_pages_are_shared_until_somebody_writes() -> None:
    engine = start("full")
    request = queue(engine, random_prompt(1, 42), 12, samples=4, **HOT)
    while not request.output:
        step(engine)
    one = engine.pool.bytes(request.table)
    tables = [each.table for each in (request, *request.samples) if each.cache]
    assert len(tables) == 4
    assert engine.pool.budget_used == one, "right after the split they hold the prompt's pages"
    step(engine)
    own = one * 4 // 11  # 42 entries are 10 full pages and a shared one that each has to copy
    assert engine.pool.budget_used == one * 10 // 11 + own
    finish(engine)


@pytest.mark.parametrize("name", ["h2o", "pyramid", "streaming_llm", "tova"])
def test_an_eviction_in_one_is_not_seen_by_the_others(name: str) -> None:
    """Evicting moves entries inside pages that others own, too."""
    engine = start(name)
    request = queue(engine, random_prompt(3, 41), 25, samples=3, **HOT)
    finish(engine)
    for index, each in enumerate((request, *request.samples)):
        assert each.output == alone(name, "llama", 3, 41, 25, temperature=1.0, seed=11 + index)


def test_abort_of_the_leader_while_its_prompt_goes_in_ends_all() -> None:
    for waits in (True, False):
        engine = start("full", prefill_chunk=8, step_tokens=8)
        request = queue(engine, random_prompt(1, 37), 12, samples=3, **HOT)
        if not waits:
            step(engine)
            assert request in engine.scheduler.prefilling
        engine.abort(request)
        assert [each.finish_reason for each in request.samples] == ["abort", "abort"]
        assert engine.scheduler.idle
        engine.check()
        assert not engine.pool.tables


@pytest.mark.parametrize(
    ("when", "who"),
    [(when, who) for when in ("waiting", "prefilling", "running") for who in (1, 2)]
    + [("running", 0)],
)
def test_abort_of_one_leaves_the_others(when: str, who: int) -> None:
    engine = start("full", prefill_chunk=8, step_tokens=8)
    request = queue(engine, random_prompt(1, 37), 12, samples=3, **HOT)
    everyone = [request, *request.samples]
    while when == "prefilling" and request not in engine.scheduler.prefilling:
        step(engine)
    while when == "running" and len(request.output) < 3:
        step(engine)
    engine.abort(everyone[who])
    finish(engine)
    for index, each in enumerate(everyone):
        if index == who:
            assert each.finish_reason == "abort"
        else:
            assert each.finish_reason == "length"
            assert each.output == alone(
                "full", "llama", 1, 37, 12, temperature=1.0, seed=11 + index
            )


def test_a_sample_may_end_with_its_first_token() -> None:
    """The leader's first token ends it; the others go on."""
    first = alone("full", "llama", 1, 37, 1, **HOT)[0]
    engine = start("full")
    params = SamplingParams(max_tokens=6, ignore_eos=True, stop_token_ids=(first,), **HOT)  # type: ignore[arg-type]
    request = engine.make(random_prompt(1, 37), params, samples=3)
    engine.submit(request)
    finish(engine)
    assert request.finish_reason == "stop" and request.output == [first]
    assert all(len(each.output) > 1 for each in request.samples)


def test_what_can_never_be_served_is_refused() -> None:
    engine = start("full", kv_memory="100KiB", max_requests=4)
    for wrong in (0, -1, 5):
        with pytest.raises(ValueError, match=f"{wrong} samples of one prompt: .*max_requests=4"):
            engine.make(random_prompt(1, 8), SamplingParams(), samples=wrong)
    params = SamplingParams(max_tokens=24)
    engine.make(random_prompt(1, 8), params, samples=2)
    with pytest.raises(
        ValueError, match="a prompt of 8 tokens with 24 generated ones in each of 4 answers needs"
    ):
        engine.make(random_prompt(1, 8), params, samples=4)


def test_a_prompt_stands_for_all_its_samples_in_flight() -> None:
    engine = start("full", max_requests=4, prefill_chunk=8, step_tokens=8)
    request = queue(engine, random_prompt(1, 37), 12, samples=3, **HOT)
    small, late = (queue(engine, random_prompt(seed, 4), 3) for seed in (2, 3))
    step(engine)
    assert engine.scheduler.in_flight == 4
    assert late.times.started is None
    while not request.output:
        step(engine)
        assert engine.scheduler.in_flight <= 4
    finish(engine)
    assert engine.peak_in_flight == 4
    assert small.finish_reason == late.finish_reason == "length"


@pytest.mark.parametrize("name", ["full", "pyramid", "snapkv"])
def test_tokens_in_sixteen_bits_do_not_depend_on_who_shares(name: str) -> None:
    """Greedy samples walk side by side on shared pages and stay equal to the last bit."""
    engine = start(name, "llama", torch.bfloat16)
    request = queue(engine, random_prompt(5, 50), 20, samples=3, logprobs=2)
    finish(engine)
    for each in request.samples:
        assert each.output == request.output
        assert each.logprobs == request.logprobs


def test_a_running_score_is_not_shared() -> None:
    """Scores sit in the pages: adding to one answer's leaves the others' as they are."""
    engine = start("h2o")
    request = queue(engine, random_prompt(3, 41), 9, samples=2)
    while not request.output:
        step(engine)
    mine, other = (each.table for each in (request, *request.samples) if each.cache)
    before = [engine.pool.scores(other, layer) for layer in range(4)]
    assert all(bool((scores > 0).any()) for scores in before)
    for layer in range(4):
        engine.pool.add_scores(mine, layer, torch.ones_like(before[layer]))
        assert torch.equal(engine.pool.scores(other, layer), before[layer])
        assert torch.equal(engine.pool.scores(mine, layer), before[layer] + 1)
    engine.pool.check()
    finish(engine)


def test_a_run_waits_for_every_answer() -> None:
    """Also where the request that led them has ended."""
    engine = start("full")
    params = SamplingParams(max_tokens=9, ignore_eos=True, **HOT)
    request = engine.make(random_prompt(1, 20), params, samples=3)
    for _ in engine.steps([request]):
        if all(each.output for each in request.samples):
            engine.abort(request)
    assert request.finish_reason == "abort"
    assert [each.finish_reason for each in request.samples] == ["length", "length"]
    assert engine.scheduler.idle
    engine.check()
