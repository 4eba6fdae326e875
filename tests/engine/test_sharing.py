"""Requests that begin with the same tokens share what was computed of them, and nothing else
changes: tokens are those of requests that share nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.recompress import Recompressor
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import KVzip, Lossless, Policy
from tests.engine.build import build, policy_named
from tests.engine.serving import NAMES, finish, queue, start, step, talk
from tests.tiny import random_prompt, tiny_model

#: What texts begin with: 26 tokens, which fill six pages of four.
SYSTEM = random_prompt(1, 26)


def begin_with(number: int, length: int = 9, system: list[int] = SYSTEM) -> list[int]:
    return system + random_prompt(100 + number, length)


def run_until_in(engine: Engine, request: Request) -> None:
    """Until a request's prompt is in and it decodes."""
    while request.status != "running":
        step(engine)


def ask(engine: Engine, prompt: list[int], new: int = 6, **options: Any) -> Request:
    """A request of a prefix, a salt or another owner, queued."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    request = engine.make(prompt, params, **{"owner": "ann", **options})
    engine.submit(request)
    return request


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("opt", {}), ("llama", {"kv_dtype": "int8"}), ("llama", {"prefill_chunk": 7})],
)
def test_a_running_request_lends_what_others_begin_with(
    family: str, options: dict[str, Any]
) -> None:
    engine, fresh = start("full", family, **options), start("full", family, **options)
    first = queue(engine, begin_with(1), 30, owner="ann")
    run_until_in(engine, first)
    second = queue(engine, begin_with(2), 8, owner="ann", samples=2)
    run_until_in(engine, second)
    shared = np.isin(first.table.pages[:, :, :6], second.table.pages[:, :, :6])
    assert shared.all(), "six pages of every head are one request's and the other's"
    finish(engine)
    assert (second.reused, second.computed) == (24, [35 - 24] * engine.runner.depth)
    for each in (first, second, *second.samples):
        assert each.output == talk(fresh, each.prompt, len(each.output), owner=None).output
    assert engine.conversations.hits_from == {"device": 1}
    assert (engine.conversations.queried_tokens, engine.conversations.reused_tokens) == (70, 24)
    engine.conversations.clear()
    engine.check()
    assert engine.pool.budget_used == 0


def test_the_same_bits_as_without() -> None:
    """In float32, where the C++ kernels run."""
    found = []
    for owner in ("ann", None):
        engine = start("full", dtype=torch.float32)
        first = queue(engine, begin_with(1, 40), 20, owner=owner)
        run_until_in(engine, first)
        second = queue(engine, begin_with(2, 40), 20, owner=owner, logprobs=5)
        finish(engine)
        assert second.reused == (24 if owner else 0)
        found.append((second.output, second.logprobs))
    assert found[0] == found[1]


def test_a_held_cache_lends_too_and_is_still_there_for_its_own_next_turn() -> None:
    engine, fresh = start("full", reuse_share=1.0), start("full")
    first = talk(engine, begin_with(1))
    other = talk(engine, begin_with(2))
    assert other.reused == 24 and len(engine.conversations.held) == 2
    for turn in (first, other):
        again = talk(engine, [*turn.text, 5, 6, 7])
        assert again.reused == len(turn.text) - 1
        assert again.output == talk(fresh, again.prompt, owner=None).output
    branch = talk(engine, [*first.text[:35], 8, 9])
    assert branch.reused == 32, "whole pages of the turn that went on"
    assert branch.output == talk(fresh, branch.prompt, owner=None).output
    engine.conversations.clear()
    engine.check()


def test_a_lender_may_end_while_others_go_on() -> None:
    """Aborted or dropped for want of room, its pages stay as long as others have them."""
    engine, fresh = start("full", reuse_share=0.0), start("full")
    first = queue(engine, begin_with(1), 40, owner="ann")
    run_until_in(engine, first)
    second = queue(engine, begin_with(2), 20, owner="ann")
    run_until_in(engine, second)
    engine.abort(first)
    third = queue(engine, begin_with(3), 20, owner="ann")
    finish(engine)
    assert (second.reused, third.reused) == (24, 24)
    for each in (second, third):
        assert each.output == talk(fresh, each.prompt, 20, owner=None).output
    assert not engine.pool.tables
    later = talk(engine, begin_with(4))
    assert later.reused == 0 and len(engine.conversations.offers.lenders) == 1


def test_prompts_that_arrive_together_are_begun_once() -> None:
    """Those behind the first wait for it, and compute what is theirs; another text goes by."""
    engine, fresh = start("full", step_tokens=16, prefill_chunk=8), start("full")
    asked = [queue(engine, begin_with(number), 6, owner="ann") for number in range(4)]
    other = queue(engine, random_prompt(50, 30), 6, owner="ann")
    step(engine)
    assert [each.status for each in asked[1:]] == ["waiting"] * 3
    assert other.status == "prefilling"
    finish(engine)
    assert [each.reused for each in asked] == [0, 24, 24, 24]
    for each in (*asked, other):
        assert each.output == talk(fresh, each.prompt, owner=None).output


def test_nobody_waits_for_a_prompt_that_shares_little() -> None:
    engine = start("full", step_tokens=16, prefill_chunk=8)
    queue(engine, begin_with(1, 80), 6, owner="ann")
    second = queue(engine, begin_with(2), 6, owner="ann")
    step(engine)
    assert second.status == "prefilling"


def test_never_for_another_owner_policy_or_salt() -> None:
    policy = policy_named("full")
    engine = start(policy, reuse_share=1.0)
    talk(engine, begin_with(1))
    lossless = Lossless(policy_named("snapkv"))
    others: list[dict[str, Any]] = [
        {"owner": "bob"},
        {"owner": None},
        {"salt": "x"},
        {"policy": policy_named("snapkv")},
        {"policy": lossless},
    ]
    for number, each in enumerate(others, 2):
        request = ask(engine, begin_with(number), **each)
        finish(engine)
        assert request.reused == 0, each
    for each in (*others[:1], *others[2:3], {"policy": lossless}):
        request = ask(engine, begin_with(9), **each)
        finish(engine)
        assert request.reused == 24, each
    params = SamplingParams(max_tokens=3, prompt_logprobs=1)
    request = engine.make(begin_with(10), params, owner="ann")
    engine.run([request])
    assert request.reused == 0 and len(request.prompt_logprobs) == 34
    engine.conversations.clear()
    engine.check()


def test_across_owners_where_the_operator_says_so() -> None:
    """What texts begin with; a conversation as it stands goes on with its owner alone."""
    engine, fresh = start("full", share_prefixes=True), start("full")
    first = talk(engine, begin_with(1))
    turn = talk(engine, [*first.text, 5, 6], owner="bob")
    assert turn.reused == 32 and first.cache is not None
    assert turn.output == talk(fresh, turn.prompt, owner=None).output
    salted = ask(engine, begin_with(2), owner="bob", salt="x")
    finish(engine)
    assert salted.reused == 0
    cut = policy_named("snapkv")
    for owner, reused in (("ann", 0), ("bob", 26)):
        request = ask(engine, begin_with(3), owner=owner, policy=cut, prefix=26)
        finish(engine)
        assert request.reused == reused
    with pytest.raises(ValueError, match="share_prefixes='yes' must be True or False"):
        EngineConfig(share_prefixes="yes")  # type: ignore[arg-type]


def test_a_window_that_has_moved_on_lends_nothing() -> None:
    """Layers with a window of 16 tokens: what a longer text left behind cannot be had again."""
    engine, fresh = start("full", "gemma3_text"), start("full", "gemma3_text")
    short = random_prompt(1, 9)
    for number, (system, new) in enumerate([(SYSTEM, 0), (SYSTEM, 0), (short, 0), (short, 8)]):
        request = queue(engine, begin_with(number, 5, system), 2, owner="ann")
        finish(engine)
        assert request.reused == new, number
        assert request.output == talk(fresh, request.prompt, 2, owner=None).output
    prompts = [begin_with(5, 30, short), begin_with(6, 30, short)]
    reused = [talk(engine, each).reused for each in prompts]
    assert reused == [8, 8], "a longer text may begin with what a short one left"
    for each in prompts:
        assert talk(engine, each).output == talk(fresh, each, owner=None).output


def test_keys_that_were_rotated_by_the_length_of_their_text_are_not_lent() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model("llama", torch.float64, rope_parameters=scaled, max_position_embeddings=32)
    config = EngineConfig(kv_memory="4MiB", page_size=4)
    engine = Engine(model, policy_named("full"), config)
    assert engine.runner.rotary.grows_from == 32
    for number in range(2):
        request = engine.make(
            begin_with(number)[:20], SamplingParams(max_tokens=3, ignore_eos=True), owner="ann"
        )
        engine.run([request])
        assert request.reused == 0


def test_lossless_requests_share_and_say_what_the_full_cache_says() -> None:
    engine = start(Lossless(policy_named("pyramid")), draft_tokens=3)
    system = random_prompt(1, 60)
    first = queue(engine, begin_with(1, 9, system), 40, owner="ann")
    run_until_in(engine, first)
    step(engine)
    second = queue(engine, begin_with(2, 9, system), 40, owner="ann")
    finish(engine)
    assert second.reused == 60 and second.drafting is not None and second.drafting.drafted
    fresh = start("full")
    for each in (first, second):
        assert each.output == talk(fresh, each.prompt, 40, owner=None).output


# --- a prefix that is taken in alone --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_taken_in_once_and_alone(name: str) -> None:
    """Tokens are those of ``LLM.prefill``, whoever comes first, and of a request that shares
    nothing."""
    llm = build(name)
    engine, system = llm.engine, random_prompt(1, 60)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = [random_prompt(100 + number, 20) for number in range(3)]
    with llm.prefill(system) as held:
        expected = [o.token_ids for o in llm.generate(texts, params, prefix=held)]
    asked = [ask(engine, system + text, 8, prefix=60) for text in texts[:2]]
    finish(engine)
    asked.append(ask(engine, system + texts[2], 8, prefix=60))
    asked.append(ask(engine, system + texts[2], 8, prefix=60, owner=None))
    finish(engine)
    assert [each.reused for each in asked] == [0, 60, 60, 0]
    assert [each.output for each in asked] == [*expected, expected[2]]
    assert asked[0].computed[0] == 80 and asked[1].computed[0] == 20
    plain = ask(engine, system + texts[0], 8)
    finish(engine)
    assert plain.reused == (76 if name == "full" else 0), "what was not asked for is not taken"
    turn = ask(engine, [*asked[0].text, 5, 6, 7], prefix=60)
    finish(engine)
    assert turn.reused == len(asked[0].text) - 1, "a conversation goes on"
    engine.conversations.clear()
    engine.check()
    assert not engine.pool.tables


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "phi3"])
def test_a_prefix_of_a_model_with_windows_or_two_regimes(family: str) -> None:
    """Held as it was once all of it was in, so a window has what it needs."""
    engine, fresh = start("full", family), start("full", family)
    system = random_prompt(1, 40)
    asked = [ask(engine, begin_with(number, 5, system), 6, prefix=40) for number in range(2)]
    finish(engine)
    assert [each.reused for each in asked] == [0, 40]
    for each in asked:
        assert each.output == talk(fresh, each.prompt, owner=None).output


def test_a_held_prefix_is_not_recompressed() -> None:
    """Answers are the same whether it was held for a while or is taken in anew; the conversation
    that began with it is chosen anew."""
    engine, fresh = start("full"), start("full")
    system, cut = random_prompt(1, 60), policy_named("snapkv")
    options: dict[str, Any] = {"policy": cut, "prefix": len(system)}
    ask(engine, begin_with(1, 9, system), **options)
    finish(engine)
    idle = Recompressor(engine.shared, engine.conversations, KVzip(min_text=1))
    while idle.step():
        engine.pool.check()
    assert idle.done == 1
    for number in range(2, 6):
        prompt = begin_with(number, 9, system)
        again = ask(engine, prompt, **options)
        anew = ask(fresh, prompt, **{**options, "owner": None})
        finish(engine)
        finish(fresh)
        assert (again.reused, again.output) == (len(system), anew.output)


def test_a_prefix_moves_down_and_comes_back(tmp_path: Path) -> None:
    """To host memory, to disk and over a restart; it stays for the next one each time."""
    rooms: dict[str, Any] = {"host_kv_memory": "4MiB", "reuse_share": 1.0}
    rooms |= {"disk_kv_cache": tmp_path, "disk_kv_memory": "64MiB"}
    engine = start("snapkv", **rooms)
    system, expected = random_prompt(1, 60), []
    for owner in (None, "ann"):
        request = ask(engine, begin_with(1, 20, system), prefix=60, owner=owner)
        finish(engine)
        expected.append(request.output)
    for place in ("device", "host", "disk"):
        if place == "host":
            while engine.conversations.make_room():
                pass
        if place == "disk":
            engine.conversations.close()
            engine = start("snapkv", **rooms)
        for _ in range(2):
            request = ask(engine, begin_with(1, 20, system), prefix=60)
            finish(engine)
            assert request.reused == 60, place
            expected.append(request.output)
        assert engine.conversations.hits_from[place] == (2 if place == "device" else 1)
        assert sum(each.tokens == 60 for each in engine.caches("ann")) == 1
    assert expected == expected[:1] * len(expected)
    engine.conversations.close()


def test_a_prefix_without_room_to_be_held_is_computed_anew() -> None:
    engine, system = start("snapkv", reuse_share=0.0), random_prompt(1, 60)
    asked = [ask(engine, begin_with(1, 20, system), prefix=60) for _ in range(2)]
    finish(engine)
    assert asked[0].output == asked[1].output
    assert not engine.conversations.held and not engine.pool.tables


@pytest.mark.parametrize("after", [1, 3])
def test_a_step_that_fails_in_a_prefix_is_taken_back(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start("snapkv", step_tokens=16, prefill_chunk=8)
    system = random_prompt(1, 60)
    request = ask(engine, begin_with(1, 5, system), prefix=60)
    for _ in range(after):
        step(engine)
    assert request.is_beginning
    forward = engine.runner.forward

    def fails(*values: Any) -> Any:
        forward(*values)
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", fails)
        with pytest.raises(RuntimeError, match="no"):
            engine.step()
    finish(engine)
    other = start("snapkv")
    expected = ask(other, begin_with(1, 5, system), prefix=60)
    finish(other)
    assert request.output == expected.output
    engine.conversations.clear()
    engine.check()


def test_what_cannot_be_a_prefix_is_refused() -> None:
    engine, prompt = start("full"), random_prompt(1, 10)
    params = SamplingParams(max_tokens=2)
    for prefix in (-1, 10, 11):
        with pytest.raises(ValueError, match=f"prefix={prefix}: of a prompt of 10 tokens"):
            engine.make(prompt, params, prefix=prefix)
    with pytest.raises(ValueError, match="has no prompt_logprobs; leave one of them out"):
        engine.make(prompt, SamplingParams(prompt_logprobs=1), prefix=3)


# --- all of it at once ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "options"),
    [(0, {}), (1, {"preempt": "recompute"}), (2, {"host_kv_memory": "1MiB"})],
)
def test_joins_and_aborts_in_any_order_leave_tokens_as_they_are(
    seed: int, options: dict[str, Any]
) -> None:
    """Little memory that is overcommitted, several owners and policies, every step checked."""
    chance = random.Random(seed)
    engine = start(
        "full",
        kv_memory="224KiB",
        step_tokens=24,
        prefill_chunk=8,
        admission="overcommit",
        expected_output=0.2,
        max_requests=6,
        reuse_share=0.6,
        **options,
    )
    systems = [random_prompt(number, 22 + number) for number in range(2)]
    policies: list[Policy] = [policy_named("full"), policy_named("snapkv")]
    asked: list[Request] = []
    for number in range(16):
        system, policy = chance.choice(systems), chance.choice(policies)
        text = begin_with(number % 5, chance.randrange(1, 20), system)
        done = [each for each in asked if each.finish_reason == "length"]
        if done and chance.random() < 0.25:
            text = [*chance.choice(done).text, 5, 6]
        prefix = len(system) if policy.name == "snapkv" or chance.random() < 0.3 else 0
        owner = chance.choice(["ann", "bob"])
        asked.append(
            ask(
                engine,
                text[:110],
                chance.randrange(2, 30),
                policy=policy,
                prefix=prefix,
                owner=owner,
            )
        )
        for _ in range(chance.randrange(6)):
            step(engine)
        if chance.random() < 0.15:
            engine.abort(chance.choice(asked))
    finish(engine)
    assert sum(each.reused for each in asked) > 50
    done = engine.scheduler.counts
    assert done.swapped + done.recomputed + done.restarted > 0, "memory must run short"
    engine.conversations.clear()
    engine.check()
    assert not engine.pool.tables and not engine.ledger.bytes
    fresh = start("full")
    for each in asked:
        whole = each.policy.name == "full"
        if each.finish_reason == "length" and (whole or each.reused in (0, each.prefix)):
            options = {"policy": each.policy, "prefix": 0 if whole else each.prefix}
            again = ask(fresh, each.prompt, len(each.output), owner=None, **options)
            finish(fresh)
            assert each.output == again.output
