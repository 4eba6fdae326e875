"""Finished conversations: whoever goes on with one takes its cache up; nobody else ever sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import Policy, make_policy
from tests.engine.build import build, policy_named
from tests.engine.serving import NAMES, after, finish, queue, start, talk
from tests.tiny import of_layers, random_prompt


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "phi3"])
def test_turns_on_the_full_cache_equal_those_from_scratch(family: str) -> None:
    """Every turn takes the one before it up and computes its own tokens only (float64)."""
    engine, fresh = start("full", family), start("full", family)
    text, held = random_prompt(1, 21), 0
    for number in range(2, 5):
        turn = talk(engine, text)
        scratch = talk(fresh, text, owner=None)
        assert turn.output == scratch.output
        assert turn.reused == held
        assert turn.computed == [len(text) - held] * engine.runner.depth
        assert scratch.computed == [len(text)] * engine.runner.depth
        assert turn.cost.bytes < scratch.cost.bytes or not held
        held, text = len(turn.text) - 1, after(turn, number)
    conversations = engine.conversations
    assert (conversations.hits, conversations.misses, conversations.dropped) == (2, 1, 0)
    assert conversations.reused_tokens == 26 + 26 + 15
    assert len(conversations.held) == 1, "a turn takes the cache of the one before it"
    conversations.clear()
    engine.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_taken_up_cache_is_an_extended_one(name: str) -> None:
    """The same tokens as when the caller holds the cache and extends it."""
    engine, other = start(name), start(name)
    first = talk(engine, random_prompt(1, 40))
    more = random_prompt(2, 20)
    turn = talk(engine, first.text + more)
    assert turn.reused == 45
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    held = other.add(random_prompt(1, 40), params, hold=True)
    finish(other)
    extended = other.extend(held, more, params)
    finish(other)
    assert extended.output == turn.output
    assert extended.kv == turn.kv
    engine.conversations.clear()
    engine.check()


def misses(
    engine: Engine,
    prompt: list[int],
    owner: str | None,
    policy: Policy | None = None,
    protect: tuple[tuple[int, int], ...] = (),
) -> Request:
    """A turn that begins from scratch and leaves what is held alone."""
    before, held = engine.conversations.hits, list(engine.conversations.held)
    request = engine.make(prompt, SamplingParams(max_tokens=3), policy=policy, protect=protect)
    request.owner = owner
    engine.submit(request)
    finish(engine)
    assert engine.conversations.hits == before
    assert request.reused == 0
    assert request.computed[0] == len(prompt)
    assert set(held) <= set(engine.conversations.held)
    return request


def test_only_the_same_owner_policy_and_text_takes_a_cache_up() -> None:
    policy = policy_named("pyramid")
    engine = start(policy, reuse_share=1.0, slot_scores=True)
    turn = talk(engine, random_prompt(1, 40))
    text = after(turn, 2)
    misses(engine, text, None)
    misses(engine, text, "bob")
    misses(engine, text, "ann", policy_named("full"))
    misses(engine, text, "ann", policy_named("h2o"))
    misses(engine, text, "ann", make_policy("pyramid", 0.6))
    misses(engine, text, "ann", replace(policy, kernel=9))  # type: ignore[call-arg]
    misses(engine, text, "ann", protect=((2, 5),))
    for place in (0, 20, 39, 43):
        changed = list(text)
        changed[place] = (changed[place] + 1) % 100 + 3
        assert changed != text
        misses(engine, changed, "ann")
    misses(engine, text[:45], "ann")  # nothing beyond what is held is asked for
    assert talk(engine, text).reused == 45, "the cache was there all the time"
    engine.conversations.clear()
    engine.check()


def test_the_last_token_is_not_part_of_what_is_held() -> None:
    """A caller may change it (an end token that its template writes otherwise)."""
    engine = start("full")
    turn = talk(engine, random_prompt(1, 20))
    text = [*turn.text[:-1], (turn.text[-1] + 1) % 100 + 3, 7, 8]
    again = talk(engine, text)
    assert again.reused == len(turn.text) - 1
    assert again.output == talk(start("full"), text).output


def test_the_longest_beginning_is_taken() -> None:
    engine = start("full", reuse_share=1.0)
    short = talk(engine, random_prompt(1, 20), 4, samples=2)  # the same text twice
    turn = talk(engine, after(short, 2))
    assert turn.reused == 23
    assert sorted(len(each.text) for each in engine.conversations.held) == [24, 39]
    again = talk(engine, after(turn, 3))
    assert again.reused == 38
    assert len(engine.conversations.held) == 2
    engine.conversations.clear()
    engine.check()


def test_the_least_recently_finished_goes_first_and_the_limit_holds() -> None:
    engine = start("full", kv_memory="200KiB", reuse_share=0.5)
    limit = engine.conversations.limit
    assert limit == 100 * 1024
    turns = []
    for number in range(8):
        turns.append(talk(engine, random_prompt(number, 20)))
        held = engine.conversations.held
        assert held == turns[-len(held) :]
        assert engine.conversations.cost.bytes <= limit
        assert engine.pool.budget_used <= limit
    assert 1 < len(engine.conversations.held) < 8
    assert engine.conversations.dropped == 8 - len(engine.conversations.held)
    again = talk(engine, after(engine.conversations.held[0], 99, 2), 2)
    assert again.reused, "what is used again is the most recent"
    assert engine.conversations.held[-1] is again
    engine.conversations.clear()
    engine.check()


def test_no_reuse_where_no_memory_is_set_aside() -> None:
    engine = start("full", reuse_share=0.0)
    turn = talk(engine, random_prompt(1, 20))
    assert not engine.conversations.held and not engine.pool.tables
    assert talk(engine, after(turn, 2)).reused == 0


def test_what_is_held_blocks_nobody() -> None:
    """Requests get the memory of held caches as if nothing were held."""
    engine = start("full", kv_memory="200KiB", reuse_share=1.0)
    for number in range(4):
        talk(engine, random_prompt(number, 20))
    held = len(engine.conversations.held)
    assert held > 1
    big = talk(engine, random_prompt(50, 90), 6, owner=None)
    assert len(engine.conversations.held) < held
    free = start("full", kv_memory="200KiB")
    assert big.output == talk(free, random_prompt(50, 90), 6, owner=None).output
    for number in range(60, 64):
        queue(engine, random_prompt(number, 30), 20)
        queue(free, random_prompt(number, 30), 20)
    finish(engine)
    finish(free)
    assert engine.peak_in_flight == free.peak_in_flight
    engine.conversations.clear()
    engine.check()


def test_a_turn_that_does_not_fit_on_its_cache_begins_from_scratch() -> None:
    """Taking a cache up may cost more than the text anew, where what is held is left alone: nothing
    tells then how much of a long answer is evicted beside it."""
    engine = start("pyramidinfer", kv_memory="256KiB", reuse_share=1.0)
    turn = talk(engine, random_prompt(1, 30), 6)
    text = after(turn, 2, 3)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    with pytest.raises(ValueError, match="raise kv_memory"):
        engine.make(text, params, on=turn.table)
    again = talk(engine, text, 200)
    assert again.reused == 0
    assert again.output == talk(start("pyramidinfer"), text, 200).output


def test_a_turn_goes_on_with_its_cache_where_the_text_anew_would_fit() -> None:
    """Where what is held is cut again, taking it up never costs more."""
    engine = start("streaming_llm", kv_memory="60KiB", reuse_share=1.0)
    text = after(talk(engine, random_prompt(1, 30), 6), 2, 3)
    again = talk(engine, text, 60)
    assert again.reused == 35 and len(again.output) == 60


@pytest.mark.parametrize("name", ["full", "pyramid"])
def test_every_sample_is_held(name: str) -> None:
    engine = start(name, reuse_share=1.0)
    request = queue(engine, random_prompt(1, 40), 6, None, 3, "ann", temperature=1.0, seed=5)
    finish(engine)
    everyone = [request, *request.samples]
    assert set(engine.conversations.held) == set(everyone)
    one = engine.pool.bytes(request.table)
    if name == "full":
        assert engine.pool.budget_used < 2 * one, "on shared pages"
    for number, each in enumerate(everyone):
        turn = talk(engine, after(each, number))
        assert turn.reused == 45
        if name == "full":
            assert turn.output == talk(start(name), after(each, number)).output
    engine.conversations.clear()
    engine.check()


def test_a_turn_with_samples_takes_a_cache_up() -> None:
    engine, fresh = start("full"), start("full")
    text = after(talk(engine, random_prompt(1, 30)), 2)
    turn = talk(engine, text, 6, samples=3)
    scratch = talk(fresh, text, 6, samples=3)
    assert turn.reused == 35
    assert [e.output for e in turn.samples] == [e.output for e in scratch.samples]
    assert turn.output == scratch.output


def test_a_taken_up_stream_goes_on_past_the_models_positions() -> None:
    """Its text must be one that could be taken in anew: the cache may be gone any time."""
    policy = make_policy("streaming_llm", sinks=4, window=28)
    engine = start(policy)
    turn = talk(engine, after(talk(engine, random_prompt(1, 440), 40), 2, 20), 40)
    assert turn.reused == 479
    assert turn.kv is not None and turn.kv.seen_len > engine.runner.max_positions
    assert max(of_layers(turn.kv.kept_len)) <= 33 + 21
    with pytest.raises(ValueError, match="at most 511 tokens can be prefilled at a time"):
        talk(engine, after(turn, 3))
    engine.conversations.clear()
    engine.check()


def test_a_regime_of_rotary_positions_is_not_changed_in_mid_text() -> None:
    """Phi-3's long text has other positions than its short one: such a turn begins anew."""
    engine, fresh = start("full", "phi3"), start("full", "phi3")
    turn = talk(engine, random_prompt(1, 40))
    long = after(turn, 2, 30)
    again = talk(engine, long)
    assert again.reused == 0
    assert again.output == talk(fresh, long).output


def test_errors_and_aborts_leave_nothing_to_be_taken_up() -> None:
    engine = start("full")
    request = queue(engine, random_prompt(1, 20), 30, owner="ann")
    while len(request.output) < 5:
        engine.step()
    engine.abort(request)
    assert not engine.conversations.held and not engine.pool.tables
    request = queue(engine, random_prompt(1, 20), 30, owner="ann")
    while len(request.output) < 5:
        engine.step()
    engine.fail(request, "error", "why")
    assert (request.finish_reason, request.error) == ("error", "why")
    assert not engine.conversations.held and not engine.pool.tables
    engine.check()


def test_log_probabilities_of_a_prompt_are_never_from_a_part_of_it() -> None:
    """They need every token's logits, so such a request takes nothing up."""
    engine = start("full")
    turn = talk(engine, random_prompt(1, 20))
    request = engine.make(after(turn, 2), SamplingParams(max_tokens=2, prompt_logprobs=2))
    request.owner = "ann"
    engine.submit(request)
    finish(engine)
    assert request.reused == 0
    assert len(request.prompt_logprobs) == len(request.prompt) - 1


@pytest.mark.parametrize("name", NAMES)
def test_one_request_never_reads_anothers_pages(name: str) -> None:
    """Pages go from hand to hand among requests of all policies, freed entries are NaN: tokens are
    those of a fresh engine, and every page that was read is the request's own."""
    policies = ["full", name, "streaming_llm", "pyramid"]
    engine = start(name, kv_memory="144KiB", slot_scores=True, reuse_share=0.4)
    group = engine.pool.groups[0]
    assert torch.isnan(group.keys).all(), "nothing is written yet"
    requests = []
    for number in range(8):
        policy = policy_named(policies[number % 4])
        owner = f"owner {number}" if number % 3 == 0 else None
        requests.append(
            queue(engine, random_prompt(number, 12 + 3 * number), 10, policy, 1 + number % 2, owner)
        )
    while not engine.scheduler.idle:
        engine.step()
        engine.pool.check()
        owned = {
            int(page)
            for table in engine.pool.tables
            for layer in range(4)
            for page in engine.pool.owned(table, layer)
        }
        free = np.array(sorted(set(range(len(group.counts))) - owned))
        assert torch.isnan(group.keys[free]).all(), "what nobody owns is poisoned"
    taken = sum(each.kv.bytes for each in requests if each.kv)
    assert taken > engine.pool.budget, "pages went from hand to hand"
    engine.conversations.clear()
    engine.check()
    for number, request in enumerate(requests):
        fresh = start(policies[number % 4])
        expected = talk(fresh, request.prompt, 10, None).output
        for each in (request, *request.samples):
            assert each.finish_reason == "length"
            assert each.output == expected


def test_what_is_held_is_counted_as_it_comes_and_goes() -> None:
    """Sums, page counts and the index agree with the held caches after every change."""
    llm = build("full", kv_memory="1MiB", reuse_share=0.4)
    engine, held = llm.engine, llm.engine.conversations
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=1)
    taken = 0
    for turn in range(24):
        prompt = random_prompt(turn, 20 + turn % 7)
        if turn % 3 == 2 and held.held:  # go on with a conversation
            prompt = [*held.held[turn % len(held.held)].text, 5, 6]
        request = engine.make(prompt, params, samples=1 + turn % 2)
        for each in (request, *request.samples):
            each.owner = f"owner {turn % 2}"
        if turn % 3 == 2 and held.held:
            request.owner = held.held[turn % len(held.held)].owner
        engine.submit(request)
        while not engine.scheduler.idle:
            engine.step()
        taken += request.reused > 0
        owned = set()
        for each in held.held:
            table = each.table
            for layer in range(engine.runner.depth):
                owned |= set(engine.pool.owned(table, layer).tolist())
        reserved = [each.reserved for each in held.held if each.reserved]
        assert held.page_count == len(owned)
        assert held.cost.bytes == sum(each.bytes for each in reserved) <= held.limit
        assert (held.cost.pages == sum(each.pages for each in reserved)).all()
    assert taken >= 4 and held.dropped > 0
    held.clear()
    assert held.page_count == held.cost.bytes == 0 and not list(held.index)
