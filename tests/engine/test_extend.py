"""Further turns on a kept cache, and taking tokens back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from tests.engine.build import alone, build
from tests.engine.serving import NAMES, finish, start, step
from tests.tiny import random_prompt


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
    table = turn.table
    before = [set(llm.engine.pool.positions(table, layer)[0].tolist()) for layer in range(4)]
    again = llm.engine.extend(turn, random_prompt(2, 100), params)
    while len(again.output) < 1:
        llm.engine.step()
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
    with pytest.raises(
        ValueError, match="cannot truncate to 25 tokens: layer 0 keeps only its window"
    ):
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
    table = turn.table
    llm.engine.truncate(turn, 60)
    assert (table.state["marker"].numpy() <= table.longest).all()
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


# --- what a further turn reserves -----------------------------------------------------------------

TURN = SamplingParams(max_tokens=12, ignore_eos=True)
#: Policies that cut what they held once more when a further text joins it; of the others it stays.
CUT = sorted({*NAMES} - {"full", "kvzip", "pyramidinfer"})


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", NAMES)
def test_further_turns_stay_within_what_is_reserved(name: str, family: str) -> None:
    """Step by step, whatever was held: more generated than said, spans protected, long and short
    turns."""
    engine = start(name, family, dtype=torch.float32)
    turn = engine.add(random_prompt(1, 60), TURN, hold=True, protect=[(3, 9)])
    for seed, length in ((2, 90), (3, 1), (4, 14), (5, 40)):
        while turn.finish_reason is None:
            step(engine)
        text = len(turn.prompt) + len(turn.output)
        protect = [(text, text + length // 2)] if seed == 4 else []
        turn = engine.extend(turn, random_prompt(seed, length), TURN, hold=True, protect=protect)
    while turn.finish_reason is None:
        step(engine)
    engine.release(turn)
    engine.check()


@pytest.mark.parametrize("name", CUT)
def test_a_further_turn_reserves_what_its_text_would_alone(name: str) -> None:
    """Not what it holds and all that is new."""
    engine = start(name, dtype=torch.float32)
    turn = engine.add(random_prompt(1, 100), TURN, hold=True)
    while turn.finish_reason is None:
        step(engine)
    turn = engine.extend(turn, random_prompt(2, 100), TURN, hold=True)
    alone = engine.make(turn.prompt, TURN)
    assert turn.cost.after_prefill is not None and alone.cost.after_prefill is not None
    assert turn.cost.after_prefill.bytes <= alone.cost.after_prefill.bytes
    assert turn.cost.bytes < alone.cost.bytes, "part of it is cut already"
    finish(engine)


def test_as_many_further_turns_run_at_once_as_their_caches_leave_room_for() -> None:
    """Eight chats that hold half of 100 tokens each; with 100 more each will hold half of 200."""
    engine = start("snapkv", dtype=torch.float32, kv_memory="800KiB")
    held = [engine.add(random_prompt(seed, 100), TURN, hold=True) for seed in range(8)]
    finish(engine)
    for each in held:
        engine.extend(each, random_prompt(9, 100), SamplingParams(max_tokens=60, ignore_eos=True))
    engine.peak_in_flight = 0
    finish(engine)
    assert engine.peak_in_flight == 8


@pytest.mark.parametrize("name", ["pyramid", "duo", "tova"])
def test_a_further_turn_whose_keep_is_lowered_stays_within_its_new_bound(name: str) -> None:
    """It may hold more than a text of its length that came at once."""
    engine = start(name, dtype=torch.float32, admission="overcommit", elastic=0.2)
    turn = engine.add(random_prompt(1, 60), TURN, hold=True)
    while turn.finish_reason is None:
        step(engine)
    longer = SamplingParams(max_tokens=60, ignore_eos=True)
    turn = engine.extend(turn, random_prompt(2, 90), longer, hold=True)
    while len(turn.output) < 5:
        step(engine)
    assert engine.scheduler._tighten() and turn.lowered_to is not None
    while turn.finish_reason is None:
        bound = turn.cost.after_prefill
        assert bound is not None and (turn.table.kept <= bound.entries).all()
        step(engine)
    engine.release(turn)
    engine.check()
