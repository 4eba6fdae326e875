"""Requests side by side: nobody's tokens depend on neighbours, memory or arrival."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidinfer import LLM, PyramidInfer, SamplingParams
from pyramidinfer.policies import POLICIES
from tests.engine.build import alone, build
from tests.tiny import of_layers, random_prompt, tiny_model

GREEDY_14 = SamplingParams(max_tokens=14, ignore_eos=True)
#: Below, at and above pages, chunks and windows.
LENGTHS = (1, 2, 5, 16, 17, 33, 48, 70)


@cache
def alone_of_length(name: str, family: str, length: int) -> list[int]:
    return alone(name, family, random_prompt(length, length), GREEDY_14)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "phi3"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_neighbours(name: str, family: str, data: st.DataObject) -> None:
    """Random arrivals, lengths, aborts, chunk sizes and budgets (float64)."""
    some = st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=6, unique=True)
    lengths = data.draw(some)
    gaps = data.draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    doomed = data.draw(st.integers(-1, 1))
    llm = build(
        name,
        family,
        prefill_chunk=data.draw(st.sampled_from([5, 16, 1024])),
        step_tokens=data.draw(st.sampled_from([1, 8, 300])),
        max_requests=data.draw(st.sampled_from([2, 64])),
        kv_memory=data.draw(st.sampled_from(["300KiB", "4MiB"])),
    )
    requests = []
    for length, gap in zip(lengths, gaps, strict=False):
        requests.append(llm.engine.add(random_prompt(length, length), GREEDY_14))
        for _ in range(gap):
            llm.engine.step()
    if doomed >= 0:
        llm.engine.abort(requests[doomed])
    while not llm.engine.scheduler.idle:
        llm.engine.step()
        llm.engine.pool.check()
    llm.engine.check()
    for index, request in enumerate(requests):
        expected = alone_of_length(name, family, lengths[index])
        if index == doomed and request.finish_reason == "abort":
            assert request.output == expected[: len(request.output)]
        else:
            assert request.output == expected


def test_a_long_prompt_does_not_stall_the_others() -> None:
    """While one prompt takes many steps, running requests get a token in each of them."""
    llm = build("pyramidinfer", prefill_chunk=16, step_tokens=17)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    runner = llm.engine.add(random_prompt(1, 10), params)
    while not runner.output:
        llm.engine.step()
    long = llm.engine.add(random_prompt(2, 400), SamplingParams(max_tokens=2))
    steps = 0
    while not long.output:
        before = len(runner.output)
        llm.engine.step()
        steps += 1
        assert len(runner.output) == before + 1
    assert steps > 10
    llm.engine.abort(runner)


def test_layer_major_prefill_holds_one_full_layer() -> None:
    """Peak pages in prefill: what earlier layers kept, and the layer in progress."""
    policy = PyramidInfer(keep=0.3, min_context=4)
    llm = LLM(
        tiny_model("llama", num_hidden_layers=12),
        policy=policy,
        kv_memory="8MiB",
        page_size=4,
        prefill_chunk=32,
        step_tokens=32,
    )
    request = llm.engine.add(random_prompt(3, 400), SamplingParams(max_tokens=2))
    most = 0
    while request.finish_reason is None:
        llm.engine.step()
        most = max(most, llm.engine.pool.budget_used)
    assert request.kv is not None
    assert most <= request.kv.bytes * 1.05
    assert request.kv.bytes < 0.35 * request.kv.full_bytes


def test_first_come_first_served_without_starvation() -> None:
    """A big request at the head waits for room, and later small ones do not overtake it."""
    llm = build("full", kv_memory="450KiB", dtype=torch.float32)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    small = [llm.engine.add(random_prompt(i, 60), params) for i in range(3)]
    llm.engine.step()
    big = llm.engine.add(random_prompt(9, 400), params)
    late = [llm.engine.add(random_prompt(i, 20), params) for i in range(20, 23)]
    llm.engine.step()
    assert list(llm.engine.scheduler.waiting) == [big, *late]
    assert llm.engine.ledger.fits(late[0].cost), "there is room for the small ones"
    while not llm.engine.scheduler.idle:
        llm.engine.step()
    assert all(request.finish_reason == "length" for request in [*small, big, *late])
    assert big.times.started is not None
    assert all(each.times.started and each.times.started >= big.times.started for each in late)
    llm.engine.check()


def test_a_short_prompt_is_not_held_up_by_a_long_one() -> None:
    llm = build("full", step_tokens=32, prefill_chunk=16, dtype=torch.float32)
    long = llm.engine.add(random_prompt(1, 500), SamplingParams(max_tokens=2))
    llm.engine.step()
    short = llm.engine.add(random_prompt(2, 5), SamplingParams(max_tokens=2, ignore_eos=True))
    steps = 0
    while not short.output:
        llm.engine.step()
        steps += 1
    assert steps <= 2
    assert not long.output
    llm.engine.abort(long)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_steps_budget_is_used_up(name: str) -> None:
    """What is dropped is not paid for: prefill takes as many steps as its layer-tokens need."""
    llm = build(name, step_tokens=256, prefill_chunk=64, dtype=torch.float32)
    requests = [
        llm.engine.add(random_prompt(i, 300), SamplingParams(max_tokens=1)) for i in range(6)
    ]
    steps = 0
    while not llm.engine.scheduler.idle:
        llm.engine.step()
        steps += 1
    work = sum(sum(request.computed) for request in requests)
    assert steps <= work / (256 * 4) + 2


def test_reservation_is_an_upper_bound() -> None:
    """What a request holds never exceeds what was reserved for it, and the budget holds."""
    for name in sorted(POLICIES):
        for family in ("llama", "gemma2", "opt"):
            llm = build(name, family, prefill_chunk=16, step_tokens=32, dtype=torch.float32)
            params = SamplingParams(max_tokens=25, ignore_eos=True)
            requests = [llm.engine.add(random_prompt(i, 30 * i + 1), params) for i in range(5)]
            costs = [request.cost.bytes for request in requests]
            while not llm.engine.scheduler.idle:
                llm.engine.step()
            peaks = []
            for request, cost in zip(requests, costs, strict=True):
                assert request.kv is not None
                assert request.kv.bytes <= request.kv.peak_bytes <= cost, (name, family)
                peaks.append(request.kv.peak_bytes)
            assert max(peaks) <= llm.engine.peak_bytes <= llm.engine.pool.budget


def test_abort_frees_pages_at_once() -> None:
    """Waiting, prefilling, running, and waiting with a cache in hand."""
    llm = build("full", prefill_chunk=8, step_tokens=12, kv_memory="350KiB", dtype=torch.float32)
    params, engine = SamplingParams(max_tokens=60, ignore_eos=True), llm.engine
    held = engine.add(random_prompt(9, 9), SamplingParams(max_tokens=2), hold=True)
    while held.finish_reason is None:
        engine.step()
    running = engine.add(random_prompt(1, 12), params)
    while not running.output:
        engine.step()
    other = engine.add(random_prompt(7, 5), params)
    prefilling = engine.add(random_prompt(2, 150), params)
    waiting = engine.add(random_prompt(3, 300), params)
    engine.step()
    turn = engine.extend(held, random_prompt(4, 200), params)
    engine.step()
    states = engine.scheduler
    assert running in states.running
    assert prefilling in states.prefilling
    assert list(states.waiting) == [waiting, turn]
    for request in (waiting, prefilling, running, turn):
        before = engine.pool.budget_used
        owned = request.cache is not None
        engine.abort(request)
        assert request.finish_reason == "abort"
        assert request.cache is None
        assert (engine.pool.budget_used < before) == owned
        engine.pool.check()
    while not states.idle:
        engine.step()
    expected = build("full", dtype=torch.float32).generate([other.prompt], params)[0]
    assert other.output == expected.token_ids
    assert engine.pool.budget_used == 0
    engine.check()


@pytest.mark.parametrize("where", ["layer", "head", "commit"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_step_that_fails_leaves_the_others_unharmed(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C (or an error) at any point of a step: afterwards tokens are as if it never was."""
    llm = build(name, prefill_chunk=16, step_tokens=24)
    params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=3)
    requests = [llm.engine.add(random_prompt(i, n), params) for i, n in enumerate((9, 70, 33))]
    runner = llm.engine.runner
    name_of = {"layer": "_run_layer", "head": "_logits", "commit": "commit"}[where]
    real, calls = getattr(runner, name_of), [0]

    def failing(*values: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 5:
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(runner, name_of, failing)
    interrupts = 0
    for _ in range(3000):
        if llm.engine.scheduler.idle:
            break
        if where == "layer" and interrupts > 30:
            monkeypatch.setattr(runner, name_of, real)
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            interrupts += 1
        llm.engine.pool.check()
    assert interrupts >= 3
    for request in requests:
        assert request.output == alone(name, "llama", request.prompt, params)
    llm.engine.check()


def test_sliding_layers_hold_their_window_only() -> None:
    llm = build("full", "gemma3_text", dtype=torch.float32)
    out = llm.generate([random_prompt(1, 100)], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    kinds = llm.engine.runner.config.layer_types
    for kind, kept in zip(kinds, of_layers(out.kv.kept_len), strict=True):
        if kind == "full_attention":
            assert kept == 139
        else:
            assert kept < 16 + llm.engine.pool.page_size
    assert out.kv.full_len == tuple(of_layers(out.kv.kept_len))


@pytest.mark.parametrize("new", [1, 2, 5, 6, 20])
@pytest.mark.parametrize("length", [5, 15, 16, 17, 100])
def test_shares_are_of_a_full_cache_which_in_sliding_layers_is_the_window(
    length: int, new: int
) -> None:
    """So the full cache is 100 %, and nothing is more."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    for name in ("full", "pyramidinfer", "snapkv"):
        llm = build(name, "gemma3_text", dtype=torch.float32)
        kv = llm.generate([random_prompt(1, length)], params)[0].kv
        assert kv.bytes <= kv.full_bytes and kv.kept_share <= 1
        if name == "full":
            assert kv.bytes == kv.full_bytes and kv.kept_share == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_dtype_runs(dtype: str, name: str) -> None:
    llm = build(name, dtype=getattr(torch, dtype))
    prompts = [random_prompt(i, n) for i, n in enumerate((90, 3, 41))]
    outs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert [len(out.token_ids) for out in outs] == [20] * 3
    llm.engine.check()
