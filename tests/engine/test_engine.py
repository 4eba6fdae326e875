"""Requests side by side: nobody's tokens depend on neighbours, memory or arrival."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidinfer import LLM, PyramidInfer, SamplingParams
from pyramidinfer.policies import POLICIES, Policy, make_policy
from tests.tiny import random_prompt, tiny_model

SMALL = {"min_context": 4, "gen_chunk": 4}


def policy_named(name: str) -> Policy:
    if name == "full":
        return make_policy(name)
    return make_policy(name, 0.5, **(SMALL if name == "pyramidinfer" else {}))


def build(
    name: str, family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any
) -> LLM:
    options = {"kv_memory": "4MiB", "page_size": 4, "poison": True, **options}
    return LLM(tiny_model(family, dtype), policy=policy_named(name), **options)


def alone(name: str, family: str, prompt: list[int], params: SamplingParams) -> list[int]:
    return build(name, family).generate([prompt], params)[0].token_ids


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "phi3"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_neighbours(name: str, family: str, data: st.DataObject) -> None:
    """Random arrivals, lengths, aborts, chunk sizes and budgets (float64)."""
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=6))
    gaps = data.draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    doomed = data.draw(st.integers(-1, 1))
    llm = build(
        name, family,
        prefill_chunk=data.draw(st.sampled_from([5, 16, 1024])),
        step_tokens=data.draw(st.sampled_from([1, 8, 300])),
        max_requests=data.draw(st.sampled_from([2, 64])),
        kv_memory=data.draw(st.sampled_from(["300KiB", "4MiB"])),
    )  # fmt: skip
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    requests = []
    for seed, length in enumerate(lengths):
        requests.append(llm.engine.add(random_prompt(seed, length), params))
        for _ in range(gaps[seed]):
            llm.engine.step()
    if doomed >= 0:
        llm.engine.abort(requests[doomed])
    while not llm.engine.scheduler.idle:
        llm.engine.step()
        llm.engine.pool.check()
    llm.engine.check()
    for index, request in enumerate(requests):
        expected = alone(name, family, request.prompt, params)
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
    llm = LLM(tiny_model("llama", num_hidden_layers=12), policy=policy, kv_memory="8MiB",
              page_size=4, prefill_chunk=32, step_tokens=32)  # fmt: skip
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
    assert big.started is not None
    assert all(each.started and each.started >= big.started for each in late)
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
    """What a request holds never exceeds what was promised to it, and the budget holds."""
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
        owned = request.sequence is not None
        engine.abort(request)
        assert request.finish_reason == "abort"
        assert request.sequence is None
        assert (engine.pool.budget_used < before) == owned
        engine.pool.check()
    while not states.idle:
        engine.step()
    expected = build("full", dtype=torch.float32).generate([other.prompt], params)[0]
    assert other.output == expected.token_ids
    assert engine.pool.budget_used == 0
    engine.check()


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_extend_with_the_full_cache_equals_one_long_prompt(family: str, chunk: int) -> None:
    """Turns joined onto a kept cache give the tokens of the whole text prefilled at once."""
    llm = build("full", family, prefill_chunk=chunk)
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def finish(request: Any) -> Any:
        while request.finish_reason is None:
            llm.engine.step()
        return request

    turn = finish(llm.engine.add(random_prompt(1, 40), params, hold=True))
    text = turn.prompt + turn.output
    for seed, length in ((2, 11), (3, 1), (4, 30)):
        more = random_prompt(seed, length)
        turn = finish(llm.engine.extend(turn, more, params, hold=True))
        text += more
        assert turn.output == alone("full", family, text, params)
        text += turn.output
    assert turn.kv.seen_len == len(text) - 1
    llm.engine.release(turn)
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()


def test_extend_on_a_compressed_cache_keeps_its_entries() -> None:
    """Propagation applies to the new tokens; what was kept before stays."""
    llm = build("pyramidinfer", dtype=torch.float32)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    turn = llm.engine.add(random_prompt(1, 120), params, hold=True)
    while turn.finish_reason is None:
        llm.engine.step()
    table = turn.sequence.table  # type: ignore[union-attr]
    before = [set(llm.engine.pool.positions(table, layer)[0].tolist()) for layer in range(4)]
    again = llm.engine.extend(turn, random_prompt(2, 100), params)
    while len(again.output) < 1:
        llm.engine.step()
    assert again.sequence is not None
    after = [llm.engine.pool.positions(table, layer)[0] for layer in range(4)]
    for layer in range(4):
        assert before[layer] <= set(after[layer].tolist())
        fresh = int((after[layer] >= 122).sum())
        assert (fresh == 101) if layer == 0 else (fresh < 101)
    llm.engine.abort(again)
    llm.engine.check()


def test_extend_needs_a_held_request() -> None:
    llm = build("full")
    request = llm.engine.add(random_prompt(1, 5), SamplingParams(max_tokens=1))
    llm.engine.step()
    with pytest.raises(ValueError, match="hold=True"):
        llm.engine.extend(request, [5], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_truncate_then_go_on_equals_never_having_seen_it(family: str) -> None:
    """A rejected draft leaves no trace."""
    llm = build("full", family)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    turn = llm.engine.add(random_prompt(1, 14), params, hold=True)
    while turn.finish_reason is None:
        llm.engine.step()
    llm.engine.truncate(turn, 11)
    again = llm.engine.extend(turn, random_prompt(5, 9), SamplingParams(max_tokens=8))
    while again.finish_reason is None:
        llm.engine.step()
    text = random_prompt(1, 14)[:11] + random_prompt(5, 9)
    assert again.output == alone("full", family, text, SamplingParams(max_tokens=8))


def test_truncate_forgets_protected_spans_beyond_it() -> None:
    llm = build("full")
    turn = llm.engine.add(
        random_prompt(1, 40), SamplingParams(max_tokens=1), hold=True, protect=[(5, 9), (20, 40)]
    )
    while turn.finish_reason is None:
        llm.engine.step()
    for wrong in ("3", 2.5, 99):
        with pytest.raises(ValueError, match="seen_len="):
            llm.engine.truncate(turn, wrong)  # type: ignore[arg-type]
    llm.engine.truncate(turn, 30)
    assert turn.protect == ((5, 9), (20, 30))
    again = llm.engine.extend(turn, [5, 6], SamplingParams(max_tokens=2))
    while again.finish_reason is None:
        llm.engine.step()
    llm.engine.check()


def test_truncate_refuses_what_a_window_has_let_go_of() -> None:
    llm = build("full", "gemma3_text")
    turn = llm.engine.add(random_prompt(1, 40), SamplingParams(max_tokens=1), hold=True)
    while turn.finish_reason is None:
        llm.engine.step()
    with pytest.raises(ValueError, match="cannot go back to 25 tokens: layer 0 keeps its window"):
        llm.engine.truncate(turn, 25)
    llm.engine.truncate(turn, 40)
    llm.engine.release(turn)
    llm.engine.check()


def test_truncate_brings_policy_state_and_ring_along() -> None:
    llm = build("pyramidinfer")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    turn = llm.engine.add(random_prompt(1, 80), params, hold=True)
    while turn.finish_reason is None:
        llm.engine.step()
    assert turn.sequence is not None
    table = turn.sequence.table
    llm.engine.truncate(turn, 60)
    assert (table.state["marker"].numpy() <= table.kept).all()
    assert table.ring is not None
    assert (table.ring.newest(0, 999)[2] < 60).all()
    again = llm.engine.extend(turn, random_prompt(2, 30), params)
    while again.finish_reason is None:
        llm.engine.step()
    assert len(again.output) == 20
    llm.engine.check()


def test_a_held_cache_does_not_lock_the_queue() -> None:
    """Its next turn goes ahead of a request that waits for those very pages."""
    llm = build("full", kv_memory="200KiB", dtype=torch.float32)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    held = llm.engine.add(random_prompt(1, 150), params, hold=True)
    while held.finish_reason is None:
        llm.engine.step()
    blocked = llm.engine.add(random_prompt(2, 200), params)
    with pytest.raises(ValueError, match="held by finished requests.*release some"):
        llm.engine.step()
    turn = llm.engine.extend(held, random_prompt(3, 5), params)
    while not llm.engine.scheduler.idle:
        llm.engine.step()
    assert turn.finish_reason == blocked.finish_reason == "length"
    llm.engine.check()


@pytest.mark.parametrize("where", ["layer", "head", "settle"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_step_that_fails_leaves_the_others_unharmed(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C (or an error) at any point of a step: afterwards tokens are as if it never was."""
    llm = build(name, prefill_chunk=16, step_tokens=24)
    params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=3)
    requests = [llm.engine.add(random_prompt(i, n), params) for i, n in enumerate((9, 70, 33))]
    adapter = llm.engine.adapter
    name_of = {"layer": "_run_layer", "head": "_logits", "settle": "settle"}[where]
    real, calls = getattr(adapter, name_of), [0]

    def failing(*values: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 5:
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(adapter, name_of, failing)
    interrupts = 0
    for _ in range(3000):
        if llm.engine.scheduler.idle:
            break
        if where == "layer" and interrupts > 30:
            monkeypatch.setattr(adapter, name_of, real)
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            interrupts += 1
        llm.engine.pool.check()
    assert interrupts >= 3
    for request in requests:
        assert request.output == alone(name, "llama", request.prompt, params)
    llm.engine.check()


def test_phi3_turns_may_go_back_below_the_switch() -> None:
    """A first turn that could have become long keeps its regime in a short second turn."""
    llm = build("full", "phi3")
    turn = llm.engine.add(random_prompt(1, 20), SamplingParams(max_tokens=100), hold=True)
    turn.max_new = 3
    while turn.finish_reason is None:
        llm.engine.step()
    again = llm.engine.extend(turn, random_prompt(2, 5), SamplingParams(max_tokens=4))
    while again.finish_reason is None:
        llm.engine.step()
    assert again.finish_reason in ("length", "stop")
    short = llm.engine.add(random_prompt(1, 20), SamplingParams(max_tokens=4), hold=True)
    while short.finish_reason is None:
        llm.engine.step()
    with pytest.raises(ValueError, match="outgrows the rotary range"):
        llm.engine.extend(short, random_prompt(2, 60), SamplingParams(max_tokens=4))
    llm.engine.release(short)
    llm.engine.check()


def test_sliding_layers_hold_their_window_only() -> None:
    llm = build("full", "gemma3_text", dtype=torch.float32)
    out = llm.generate([random_prompt(1, 100)], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    kinds = llm.engine.adapter.config.layer_types
    for kind, kept in zip(kinds, out.kv.kept_len, strict=True):
        if kind == "full_attention":
            assert kept == 139
        else:
            assert kept < 16 + llm.engine.pool.page_size
    per_page = llm.engine.pool.page_bytes[0]
    sliding = sum(kind != "full_attention" for kind in kinds)
    assert out.kv.full_bytes == per_page * (sliding * 4 + (6 - sliding) * 35)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_dtype_runs(dtype: str, name: str) -> None:
    llm = build(name, dtype=getattr(torch, dtype))
    prompts = [random_prompt(i, n) for i, n in enumerate((90, 3, 41))]
    outs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert [len(out.token_ids) for out in outs] == [20] * 3
    llm.engine.check()
