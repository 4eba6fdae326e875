"""More reserved than there is: every request comes to its end, with the tokens it has alone."""

from __future__ import annotations

from dataclasses import replace
from operator import le
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import POLICIES, Policy, make_policy
from pyramidinfer.policies.by_head import ALL, ByHead
from pyramidinfer.types import Layers
from tests.engine.build import policy_named
from tests.engine.serving import NAMES, alone, finish, queue, start, step
from tests.tiny import random_prompt

FAMILIES = ("llama", "gemma3_text", "opt", "phi3")
#: Policies that hold a budget while decoding, and can be held to a lower one.
ELASTIC = (
    "duo",
    "h2o",
    "pyramid",
    "rkv",
    "scissorhands",
    "streaming_llm",
    "tova",
    "triattention",
)
SMALL: dict[str, dict[str, Any]] = {
    "duo": {"recent": 8, "min_context": 8},
    "pyramid": {"min_context": 8, "recent": 4, "window": 4},
    "rkv": {"window": 4, "buffer": 6},
    "scissorhands": {"window": 8, "recent": 4},
    "triattention": {"buffer": 6, "pin_prompt": False},
}


def crowded(
    name: str, family: str, sizes: list[tuple[int, int]], room: float = 1.0, **options: Any
) -> Engine:
    """An overcommitted engine with ``room`` times what the largest (prompt, new) can need."""
    roomy = start(name, family)
    most = max(
        roomy.make(random_prompt(0, length), SamplingParams(max_tokens=new)).cost.bytes
        for length, new in sizes
    )
    size = roomy.pool.layout.page_bytes[0]
    options = {"expected_output": 0.0, **options}
    return start(
        name,
        family,
        admission="overcommit",
        kv_memory=(int(most * room) // size + 1) * size,
        **options,
    )


def held_to(policy: Any, length: int, layers: Layers) -> list[tuple[int, ...]]:
    """Entries that each head of each layer may hold while decoding."""
    if isinstance(policy, ByHead):
        limits = policy.limits(length, layers)
        return [tuple(limit + policy.slack for limit in row) for row in limits]
    budgets = [policy.budget(i, length, layers) + policy.slack for i in range(layers.count)]
    return [(budget,) * layers.kv_heads for budget in budgets]


#: Policy (None: full), prompt and new tokens of a request.
Plan = tuple[Policy | None, int, int]


def squeezed(
    family: str, plans: list[Plan], share: float = 0.4, **options: Any
) -> tuple[Engine, list[Request]]:
    """An engine with requests that all can begin, and memory for ``share`` of what they grow by."""

    def add(engine: Engine) -> list[Request]:
        return [
            queue(engine, random_prompt(seed, length), new, policy)
            for seed, (policy, length, new) in enumerate(plans)
        ]

    options = {"admission": "overcommit", "expected_output": 0.0, "slot_scores": True, **options}
    roomy = start("full", family, **{**options, "step_tokens": 4096})
    requests = add(roomy)
    step(roomy)
    assert len(roomy.scheduler.running) == len(plans)
    now, alone = roomy.ledger.bytes, max(each.cost.bytes for each in requests)
    most = sum(each.cost.after_prefill.bytes for each in requests if each.cost.after_prefill)
    size = roomy.pool.layout.page_bytes[0]
    budget = max(alone, int(now + share * (most - now)))
    engine = start("full", family, kv_memory=(budget // size + 1) * size, **options)
    return engine, add(engine)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_nothing_runs_short_and_nothing_is_lost(name: str, data: st.DataObject) -> None:
    """Random arrivals, lengths, samples, aborts and budgets: no pass ever lacks a page (it would
    raise), all requests end, and with the tokens they have in a roomy pool (float64), unless
    their budgets were lowered."""
    family = data.draw(st.sampled_from(FAMILIES))
    count = data.draw(st.integers(3, 6))
    sizes = [(data.draw(st.integers(1, 50)), data.draw(st.integers(1, 30))) for _ in range(count)]
    samples = [data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(count)]
    engine = crowded(
        name,
        family,
        sizes,
        data.draw(st.sampled_from([1.0, 1.5])),
        expected_output=data.draw(st.sampled_from([0.0, 0.5])),
        preempt=data.draw(st.sampled_from(["swap", "recompute"])),
        elastic=data.draw(st.sampled_from([None, None, 0.2])),
        prefill_chunk=data.draw(st.sampled_from([5, 1024])),
        step_tokens=data.draw(st.sampled_from([8, 300])),
        max_requests=data.draw(st.sampled_from([3, 64])),
    )
    requests: list[Request] = []
    for seed, (length, new) in enumerate(sizes):
        params = {"temperature": 0.9, "seed": 10 * seed}
        try:
            request = queue(engine, random_prompt(seed, length), new, None, samples[seed], **params)
        except ValueError:  # its samples could never be served
            samples[seed] = 1
            request = queue(engine, random_prompt(seed, length), new, **params)
        requests.append(request)
        for _ in range(data.draw(st.integers(0, 6))):
            if not engine.scheduler.idle:
                step(engine)
    doomed = data.draw(st.sampled_from([None, *requests]))
    if doomed is not None:
        engine.abort(doomed)
    finish(engine)
    counts, pairs = engine.scheduler.counts, []
    assert counts.resumed <= counts.swapped + counts.recomputed + counts.restarted
    roomy = start(name, family)
    for request in requests:
        for each in (request, *request.samples):
            twin = roomy.make(each.prompt, each.params)
            roomy.submit(twin)
            pairs.append((request, each, twin))
    while not roomy.scheduler.idle:
        roomy.step()
    for request, each, twin in pairs:
        aborted = each.finish_reason == "abort"
        assert each.finish_reason == "length" or (aborted and request is doomed)
        assert each.kv is not None and each.kv.keep_lowered_to == each.lowered_to
        if each.lowered_to is None:
            assert each.output == (twin.output[: len(each.output)] if aborted else twin.output)
        else:
            assert 0.2 <= each.lowered_to < 0.5 and engine.config.elastic


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_is_moved_or_computed_anew(family: str, preempt: str) -> None:
    sizes = [(14, 40), (9, 40), (11, 40)]
    engine = crowded("full", family, sizes, 1.4, preempt=preempt)
    requests = [queue(engine, random_prompt(i, n), new) for i, (n, new) in enumerate(sizes)]
    finish(engine)
    counts = engine.scheduler.counts
    assert counts.resumed > 0
    if preempt == "swap":
        assert counts.resumed == counts.swapped
    else:
        assert counts.recomputed > 0
        assert counts.resumed == counts.recomputed + counts.restarted + counts.swapped
    for seed, (request, (length, new)) in enumerate(zip(requests, sizes, strict=True)):
        assert request.output == alone("full", family, seed, length, new)
        assert request.computed[0] == length, "computing it anew is not its prompt's work"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Moved out and back every few steps, in the middle of its prompt too: same logits."""

    def answer(every: int | None) -> tuple[Request, Engine]:
        options = {"admission": "overcommit", "prefill_chunk": 8, "step_tokens": 8}
        engine = start(name, "llama", dtype, **options)
        request = queue(engine, random_prompt(3, 50), 30, logprobs=3)
        steps = 0
        while request.finish_reason is None:
            step(engine)
            steps += 1
            if every and steps % every == 0 and request.finish_reason is None:
                before = engine.usage(request)
                engine.scheduler._preempt()
                assert engine.usage(request) == before
                assert engine.pool.budget_used == 0
                assert engine.scheduler.host_bytes >= before.bytes
        engine.check()
        return request, engine

    (here, _), (moved, engine) = answer(None), answer(3)
    assert engine.scheduler.counts.swapped == engine.scheduler.counts.resumed >= 10
    assert moved.output == here.output
    assert moved.logprobs == here.logprobs
    assert moved.kv == here.kv
    assert moved.computed == here.computed


@pytest.mark.parametrize("name", NAMES)
def test_whoever_is_preempted_gives_way_to_the_oldest(name: str) -> None:
    """A full cache grows; requests of every policy beside it come and go, and lose nothing."""
    other = (policy_named(name), 24, 75)
    engine, (oldest, *others) = squeezed("llama", [(None, 6, 80), other, other])
    while not engine.scheduler.idle:
        step(engine)
        assert oldest not in engine.scheduler.preempted
    engine.check()
    assert engine.scheduler.counts.swapped > 0
    assert oldest.output == alone("full", "llama", 0, 6, 80)
    for seed, request in zip((1, 2), others, strict=True):
        assert request.output == alone(name, "llama", seed, 24, 75)


def test_a_text_too_long_to_be_taken_in_again_is_moved() -> None:
    """Hidden states of the whole text would not fit where those of the prompt did."""
    sizes = [(4, 60), (4, 60)]
    engine = crowded("full", "llama", sizes, preempt="recompute")
    requests = [queue(engine, random_prompt(i, n), new) for i, (n, new) in enumerate(sizes)]
    finish(engine)
    assert engine.scheduler.counts.swapped > 0
    for seed, request in enumerate(requests):
        assert request.output == alone("full", "llama", seed, 4, 60)


def test_more_begin_than_under_reservation() -> None:
    peaks = {}
    for admission in ("reserve", "overcommit"):
        engine = start("full", kv_memory="120KiB", admission=admission)
        for seed in range(5):
            queue(engine, random_prompt(seed, 8), 40)
        finish(engine)
        peaks[admission] = engine.peak_in_flight
    assert peaks["overcommit"] > peaks["reserve"]


def test_what_is_reserved_is_what_is_expected() -> None:
    """The prompt in full, half the tokens; under reservation there is no difference."""
    engine = start("full", admission="overcommit", expected_output=0.5)
    params = SamplingParams(max_tokens=40)
    request = engine.make(random_prompt(1, 20), params)
    assert (
        request.likely.after_prefill is not None
        and request.likely.after_prefill.entries is not None
    )
    assert request.likely.after_prefill.entries.tolist() == [[40] * 2] * 4
    assert request.cost.after_prefill is not None and request.cost.after_prefill.entries is not None
    assert request.cost.after_prefill.entries.tolist() == [[60] * 2] * 4
    assert (request.likely.pages < request.cost.pages).all()
    plain = start("full").make(random_prompt(1, 20), params)
    assert plain.likely is plain.cost
    assert plain.cost.bytes == request.cost.bytes


def test_expectations_give_way_and_come_back() -> None:
    """Down to what one step needs while others need the rest, and no further; nobody is
    preempted for what is only expected."""

    class Other:
        reserved: Cost | None = None

    engine = start("full", admission="overcommit", expected_output=1.0)
    request, ledger = queue(engine, random_prompt(1, 20), 40), engine.ledger
    while len(request.output) < 3:
        step(engine)
    assert request.reserved is not None and request.reserved.pages.tolist() == [2 * 4 * 15]
    ledger.reserve(Other(), Cost(ledger.layout.page_counts - 2 * 4 * 8, 0))
    for entries in range(22, 32):
        step(engine)
        assert request.reserved.pages.tolist() == [2 * 4 * -(-(entries + 1) // 4)]
    assert not engine.scheduler.preempted
    with pytest.raises(ValueError, match="held by finished requests"):
        step(engine)
    assert engine.scheduler.preempted == [request]


def test_what_is_expected_is_promised_again_before_anybody_else_begins() -> None:
    engine = start("full", admission="overcommit", expected_output=1.0)
    request = queue(engine, random_prompt(1, 20), 40)
    step(engine)
    engine.ledger.reserve(request, engine.scheduler._needed(request))
    engine.scheduler._trimmed.append(request)
    engine.scheduler.relieve()
    assert request.reserved is not None and request.reserved.pages.tolist() == [2 * 4 * 15]
    finish(engine)


def test_what_could_never_be_served_alone_is_refused_at_once() -> None:
    engine = start("full", kv_memory="40KiB", admission="overcommit", expected_output=0.0)
    with pytest.raises(ValueError, match="raise kv_memory"):
        engine.make(random_prompt(1, 8), SamplingParams(max_tokens=80))


def test_who_is_away_comes_before_who_never_began_and_is_no_request_in_flight() -> None:
    engine = crowded("full", "llama", [(10, 60)], 1.3, max_requests=2)
    first, second = (queue(engine, random_prompt(i, 10), 60) for i in range(2))
    third = queue(engine, random_prompt(2, 3), 2)
    scheduler = engine.scheduler
    while not scheduler.preempted:
        step(engine)
        assert third.times.started is None
    assert scheduler.preempted == [second]
    assert scheduler.in_flight == 1
    assert second.output, "it was decoding"
    while scheduler.preempted:
        assert third.times.started is None, "nobody overtakes who is away"
        assert not scheduler.idle
        step(engine)
    finish(engine)
    assert first.times.ended and second.times.ended and third.times.started
    assert third.times.started > first.times.ended


def test_abort_while_away_frees_everything() -> None:
    for preempt in ("swap", "recompute"):
        engine = crowded("full", "llama", [(10, 60)], 1.3, preempt=preempt)
        first, second = (queue(engine, random_prompt(i, 10), 60) for i in range(2))
        while not engine.scheduler.preempted:
            step(engine)
        said = engine.output(second)
        engine.abort(second)
        assert second.finish_reason == "abort"
        assert second.preempted is None and second.cache is None and second.reserved is None
        assert second.kv == said.kv
        assert engine.scheduler.host_bytes == 0
        finish(engine)
        assert first.output == alone("full", "llama", 0, 10, 60)
        assert not engine.pool.tables


def test_a_prompt_in_progress_is_preempted_too() -> None:
    """It is the youngest; the oldest decodes on."""
    for preempt in ("swap", "recompute"):
        engine = crowded(
            "full", "llama", [(6, 70)], 1.05, preempt=preempt, step_tokens=2, prefill_chunk=1
        )
        oldest = queue(engine, random_prompt(0, 6), 70)
        while len(oldest.output) < 24:
            step(engine)
        late = queue(engine, random_prompt(1, 26), 3)
        preempted = False
        while not engine.scheduler.idle:
            step(engine)
            preempted |= late in engine.scheduler.preempted and not late.output
        engine.check()
        assert preempted
        counts = engine.scheduler.counts
        assert (counts.restarted if preempt == "recompute" else counts.swapped) > 0
        assert oldest.output == alone("full", "llama", 0, 6, 70)
        assert late.output == alone("full", "llama", 1, 26, 3)


def test_samples_that_wait_for_a_preempted_prompt() -> None:
    for preempt in ("swap", "recompute"):
        engine = start(
            "full", admission="overcommit", step_tokens=8, prefill_chunk=8, preempt=preempt
        )
        request = queue(engine, random_prompt(1, 30), 12, None, 3, temperature=0.8, seed=4)
        step(engine)
        engine.scheduler._preempt()
        step(engine)
        while len(request.output) < 4:
            step(engine)
        for _ in range(3):
            engine.scheduler._preempt()
        assert len(engine.scheduler.preempted) == 3
        finish(engine)
        for index, each in enumerate((request, *request.samples)):
            assert each.output == alone("full", "llama", 1, 30, 12, temperature=0.8, seed=4 + index)


def test_a_failed_step_in_which_a_prompt_is_computed_anew_spares_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others run already, while the leader's text is taken in once more."""
    engine = start("full", admission="overcommit", preempt="recompute")
    request = queue(engine, random_prompt(1, 30), 12, None, 3, temperature=0.8, seed=4)
    while len(request.output) < 4:
        step(engine)
    for _ in range(3):
        engine.scheduler._preempt()
    for each in (request, *request.samples):
        assert each.preempted is not None and each.preempted.cache is None
    engine.config = engine.scheduler.config = replace(engine.config, max_requests=2)
    real = engine.runner._logits
    monkeypatch.setattr(engine.runner, "_logits", _raise)
    with pytest.raises(OSError, match="a hiccup"):
        engine.step()
    monkeypatch.setattr(engine.runner, "_logits", real)
    finish(engine)
    for index, each in enumerate((request, *request.samples)):
        assert each.output == alone("full", "llama", 1, 30, 12, temperature=0.8, seed=4 + index)


def _raise(hidden: torch.Tensor) -> torch.Tensor:
    raise OSError("a hiccup")


# --- caches that are held ------------------------------------------------------------------------


def test_conversations_go_before_anybody_is_preempted() -> None:
    engine = crowded("full", "llama", [(10, 60)], 2.2, reuse_share=1.0)
    for seed in range(3):
        queue(engine, random_prompt(seed, 10), 8, owner="someone")
    finish(engine)
    assert len(engine.conversations.held) == 3
    requests = [queue(engine, random_prompt(seed, 10), 60) for seed in range(5, 7)]
    finish(engine)
    assert engine.conversations.spills > 0, "to the same host memory"
    assert engine.scheduler.counts.swapped == 0
    for seed, request in zip(range(5, 7), requests, strict=True):
        assert request.output == alone("full", "llama", seed, 10, 60)
    engine.conversations.clear()
    engine.check()


@pytest.mark.parametrize("name", ["full", "pyramidinfer", "streaming_llm"])
def test_a_preempted_turn_goes_on_with_its_cache(name: str) -> None:
    """One that has taken up a conversation's cache, while its new tokens go in and later."""
    outputs = []
    for preempts in (False, True):
        engine = start(name, admission="overcommit", step_tokens=8, prefill_chunk=8)
        first = queue(engine, random_prompt(1, 40), 6, owner="someone")
        finish(engine)
        text = first.prompt + first.output + random_prompt(2, 30)
        turn = queue(engine, text, 12, owner="someone")
        while turn.finish_reason is None:
            step(engine)
            if preempts and turn.finish_reason is None:
                engine.scheduler._preempt()
        assert turn.reused == 45
        outputs.append(turn.output)
        engine.conversations.clear()
        engine.check()
    assert outputs[0] == outputs[1]


def test_a_cache_in_a_callers_hands_is_named_when_nobody_can_go_on() -> None:
    engine = crowded("full", "llama", [(10, 60)], 1.2)
    held = engine.add(random_prompt(5, 20), SamplingParams(max_tokens=2), hold=True)
    finish(engine)
    request = queue(engine, random_prompt(0, 10), 60)
    with pytest.raises(ValueError, match="held by finished requests.*release some"):
        finish(engine)
    assert engine.scheduler.preempted == [request] and request.output
    turn = engine.extend(held, [5, 6, 7], SamplingParams(max_tokens=2), hold=True)
    while turn.finish_reason is None:
        step(engine)
    engine.release(turn)
    finish(engine)
    assert request.output == alone("full", "llama", 0, 10, 60)


# --- elastic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in ELASTIC for family in ("llama", "gemma3_text")]
    + [("pyramid", "opt"), ("streaming_llm", "phi3")],
)
def test_budgets_are_lowered_before_anybody_is_preempted(name: str, family: str) -> None:
    """Compressed requests get less, never below the floor, and their usage says so; the full
    one beside them is left alone."""
    floor = 0.2
    policy = start("full", family).bind(make_policy(name, 0.7, **SMALL.get(name, {})))
    plans: list[Plan] = [(None, 6, 80), (policy, 24, 75), (policy, 24, 75)]
    engine, (whole, *others) = squeezed(family, plans, elastic=floor)
    finish(engine)
    assert engine.scheduler.counts.tightened > 0
    assert whole.output == alone("full", family, 0, 6, 80)
    assert whole.kv is not None and whole.kv.keep_lowered_to is None
    lowered = []
    for request in others:
        assert request.finish_reason == "length" and request.kv is not None
        to = request.kv.keep_lowered_to
        if to is None:
            assert request.policy == policy
            continue
        lowered.append(request)
        assert floor <= to < 0.7
        assert request.policy == replace(policy, keep=to)  # type: ignore[call-arg]
        layers = engine.runner.layers_for(99)
        for kept, most, governed in zip(
            request.kv.kept_len, held_to(request.policy, 24, layers), layers.governed, strict=True
        ):
            assert not governed or all(map(le, kept, most))
        assert request.kv.peak_bytes <= request.cost.bytes
    assert lowered


def test_a_keep_below_the_floor_and_policies_that_cannot_are_left_alone() -> None:
    policies = [make_policy("h2o", 0.4), make_policy("snapkv", 0.8), policy_named("pyramidinfer")]
    plans: list[Plan] = [(None, 30, 60), *((policy, 40, 50) for policy in policies)]
    engine, (whole, *others) = squeezed("llama", plans, elastic=0.5)
    finish(engine)
    assert engine.scheduler.counts.tightened == 0
    assert engine.scheduler.counts.swapped > 0
    assert whole.output == alone("full", "llama", 0, 30, 60)
    for request, policy in zip(others, policies, strict=True):
        assert request.policy == policy
        assert request.kv is not None and request.kv.keep_lowered_to is None


def test_lowering_stops_at_the_floor_and_then_somebody_is_preempted() -> None:
    plans: list[Plan] = [(None, 30, 90), (make_policy("streaming_llm", 0.9), 50, 80)]
    engine, (whole, other) = squeezed("llama", plans, 0.1, elastic=0.6)
    finish(engine)
    assert engine.scheduler.counts.tightened > 0
    assert engine.scheduler.counts.swapped > 0
    assert other.lowered_to == 0.6
    assert whole.output == alone("full", "llama", 0, 30, 90)


def test_a_lowered_cache_is_no_conversations() -> None:
    plans: list[Plan] = [(None, 30, 90), (make_policy("tova", 0.9), 50, 80)]
    engine, (_, other) = squeezed("llama", plans, elastic=0.6)
    other.owner = "someone"
    finish(engine)
    assert other.lowered_to is not None
    assert engine.conversations.held == []


def test_a_lowered_held_cache_says_so_in_its_next_turn() -> None:
    plans: list[Plan] = [(None, 30, 90), (make_policy("tova", 0.9), 50, 80)]
    engine, (_, held) = squeezed("llama", plans, 0.8, elastic=0.6)
    held.hold = True
    while held.finish_reason is None:
        step(engine)
    assert held.lowered_to is not None
    turn = engine.extend(held, [5, 6, 7], SamplingParams(max_tokens=2))
    finish(engine)
    assert turn.kv is not None and turn.kv.keep_lowered_to == held.lowered_to
    assert turn.policy == make_policy("tova", held.lowered_to)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_only_fall(name: str) -> None:
    """What a policy says of a lower keep: no layer's budget is raised, None where none falls."""
    engine = start(name)
    policy, layers = engine.policy, engine.runner.layers_for(100)
    state = policy.start(layers)
    if name not in ELASTIC:
        assert policy.tightened(0.1, state, layers) is None
        return
    kind, held = "limits", torch.tensor([[50] * 2, [20] * 2, [50] * 2, [50] * 2])
    if isinstance(policy, ByHead):
        held = torch.tensor([[50, ALL], [50, 20], [50, 50], [ALL, ALL]])
    state = {**state, "text": torch.tensor(100), kind: held.clone()}
    assert policy.tightened(0.5, state, layers) is None
    assert policy.tightened(0.9, state, layers) is None
    found = policy.tightened(0.25, state, layers)
    assert found is not None
    lower, after = found
    assert lower == replace(policy, keep=0.25)  # type: ignore[call-arg]
    assert (after[kind] <= held).all()
    if isinstance(policy, ByHead):
        assert after[kind].equal(held.minimum(torch.tensor(lower.limits(100, layers))))  # type: ignore[attr-defined]
        assert after[kind].clamp(max=100).float().mean() < 30
    else:
        assert np.mean(after[kind].tolist()) < 30
    assert state[kind].equal(held), "the old state is as it was"
    assert lower.tightened(0.25, after, layers) is None


def test_one_that_keeps_everything_can_be_lowered() -> None:
    """Its ring looks back, though nothing was to be evicted."""
    policy = make_policy("pyramid", 1.0, **SMALL["pyramid"])
    plans: list[Plan] = [(None, 6, 80), (policy, 24, 75)]
    engine, (whole, other) = squeezed("llama", plans, elastic=0.2)
    finish(engine)
    assert other.lowered_to is not None and other.kv is not None
    assert min(map(min, other.kv.kept_len)) < 50
    assert whole.output == alone("full", "llama", 0, 6, 80)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["export", "import_", "evict_now", "release"])
def test_relief_that_fails_leaks_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was to be moved ends with the error; the others go on as if nothing had been."""
    other = (make_policy("streaming_llm", 0.9), 24, 75)
    engine, (oldest, *others) = squeezed("llama", [(None, 6, 80), other, other], elastic=0.7)
    copier = engine.shared.copier
    places = {"evict_now": engine.runner, "export": copier, "import_": copier}
    target: Any = places.get(where, engine.pool)
    real, calls = getattr(target, where), [0]

    def failing(*values: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1 and (where != "release" or engine.ledger.is_over):
            raise MemoryError("no memory")
        return real(*values)

    monkeypatch.setattr(target, where, failing)
    with pytest.raises(MemoryError):
        finish(engine)
    engine.pool.check()
    finish(engine)
    assert calls[0] > 1
    assert oldest.output == alone("full", "llama", 0, 6, 80)
    lost = [each.finish_reason for each in others].count("error")
    assert lost == (0 if where == "evict_now" else 1)
    assert not engine.pool.tables


def test_options() -> None:
    with pytest.raises(ValueError, match="admission='over'"):
        EngineConfig(admission="over")
    with pytest.raises(ValueError, match="preempt='swop'.*did you mean 'swap'"):
        EngineConfig(preempt="swop")
    with pytest.raises(ValueError, match=r"expected_output=1.5 must lie between 0 and 1"):
        EngineConfig(expected_output=1.5)
    with pytest.raises(ValueError, match="elastic=0.3 needs admission='overcommit'"):
        EngineConfig(elastic=0.3)
    for wrong in (0, 1.5, True, "x", float("nan")):
        with pytest.raises(ValueError, match="elastic="):
            EngineConfig(elastic=wrong, admission="overcommit")  # type: ignore[arg-type]
    assert set(ELASTIC) < set(POLICIES)
