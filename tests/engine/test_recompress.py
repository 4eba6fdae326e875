"""Held caches are chosen anew by what a model needs to repeat the text, as many in every head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.recompress import Recompression, Recompressor
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import Policy
from tests.engine.serving import NAMES, finish, queue, start
from tests.policies.judge import Judge
from tests.policies.test_judges import EARLY, LATE, SHORT, SPANS, engine, model
from tests.tiny import VOCAB, random_prompt

#: Policies whose entries cannot be exchanged, or who drop none.
ALONE = {"full", "h2o", "streaming_llm", "kvzip"}
LONG = 150


def positions(engine: Engine, request: Request) -> list[list[list[int]]]:
    """Per layer and KV head, positions in a held cache, ascending."""
    table = request.table
    return [
        [head[head >= 0].sort().values.tolist() for head in engine.pool.positions(table, layer)]
        for layer in range(engine.runner.depth)
    ]


def talk(engine: Engine, prompt: list[int], new: int = 6, **options: Any) -> Request:
    """A turn of ann's, to its end."""
    request = queue(engine, prompt, new, owner="ann", **options)
    finish(engine)
    return request


# --- which entries stay ---------------------------------------------------------------------------


def by_hand(judge: Judge, text: list[int]) -> None:
    """Choose the judge's entries anew, from whole attention rows of the text read again."""
    reader = Judge(model(), "kvzip", 1.0, min_text=1)
    reader.read(text)
    old, length = judge.positions(), len(text)
    cut = [set(head) for layer in old for head in layer if len(head) < length]
    sinks = min(next(p for p in range(length) if p not in head) for head in cut)
    newest = max(max(p for p in range(length) if p not in head) for head in cut)
    always = {p for p in range(length) if p < sinks or p > newest} | judge.protect
    for layer, heads in enumerate(old):
        given = [
            {p: reader.memory[layer, head, p] for p in range(length)}
            for head in range(judge.kv_heads)
        ]
        if all(head == heads[0] for head in heads):
            given = [{p: max(each[p] for each in given) for p in range(length)}] * len(given)
        for head, scores in enumerate(given):
            ranked = sorted(scores.keys() - always, key=lambda p: (-scores[p], p))
            stays = always | set(ranked[: len(heads[head]) - len(always)])
            judge.cache[layer][head] = {p: reader.cache[layer][head][p] for p in stays}


@pytest.mark.parametrize(
    ("method", "keep", "options"),
    [
        ("snapkv", 0.4, {"window": 8}),
        ("snapkv", 0.3, {"window": 8, "adaptive": True}),
        ("pyramidkv", 0.4, {}),
        ("tova", 0.4, {}),
        ("chunkkv", 0.4, {"window": 8}),
        ("keydiff", 0.4, {}),
        ("expected_attention", 0.4, {}),
        ("fastkv", None, {"retain_ratio": 0.3, "propagate_ratio": 0.5}),
        ("pyramid", 0.3, SHORT),
        ("pyramid", 0.4, {**SHORT, **EARLY}),
        ("pyramid", 0.5, {**SHORT, "profile": LATE, "kernel": 1, "stride": 3}),
    ],
)
def test_turns_on_recompressed_caches_equal_the_judge(
    method: str, keep: float | None, options: dict[str, Any]
) -> None:
    """Positions after each turn and after recompression, log-probabilities throughout."""
    llm = engine(method, keep, 13, **options)
    judge = Judge(model(), method, keep, SPANS, **options)
    request, last, text = None, list[int](), list[int]()
    for seed, (length, new) in enumerate(((130, 6), (25, 12), (20, 6))):
        prompt = random_prompt(seed, length)
        params = SamplingParams(max_tokens=new, ignore_eos=True, logprobs=VOCAB)
        if request is None:
            spans = [(each, each + 1) for each in SPANS]
            request = llm.engine.add(prompt, params, hold=True, protect=spans)
        else:
            chosen = positions(llm.engine, request)
            by_hand(judge, text)
            assert llm.engine.recompress(request)
            assert positions(llm.engine, request) == judge.positions() != chosen
            request = llm.engine.extend(request, prompt, params, hold=True)
        while request.finish_reason is None:
            llm.engine.step()
        logits = judge.read(last + prompt)
        for step, (token, found) in enumerate(zip(request.output, request.logprobs, strict=True)):
            expected = torch.log_softmax(logits, -1)
            top = torch.tensor([found.top[each] for each in range(VOCAB)], dtype=torch.float64)
            torch.testing.assert_close(top, expected, atol=1e-9, rtol=0)
            if step < new - 1:
                logits = judge.decode(token)
        last, text = request.output[-1:], request.text[:-1]
        assert positions(llm.engine, request) == judge.positions()
    llm.engine.release(request)
    llm.engine.check()


# --- what stays as it is --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_counts_bytes_and_state_stay(name: str) -> None:
    """Only which entries there are changes, and the conversation goes on with them."""
    engine = start(name, reuse_share=1.0)
    held = talk(engine, random_prompt(1, LONG))
    assert held.reserved is not None
    table, before = held.table, positions(engine, held)
    kept, state, reserved = table.kept.copy(), dict(table.state), held.reserved
    used, conversations = engine.pool.budget_used, engine.conversations
    assert engine.recompress(held) == (name not in ALONE)
    after = held.table
    assert (after is table) == (positions(engine, held) == before) == (name in ALONE)
    assert (after.kept == kept).all() and after.seen_len == LONG + 5
    assert after.state.keys() == state.keys()
    assert all(torch.equal(after.state[each], state[each]) for each in state)
    same = [heads[0] == heads[1] for heads in before]
    assert [heads[0] == heads[1] for heads in positions(engine, held)] == same
    assert engine.pool.budget_used == used and held.reserved.bytes == reserved.bytes
    assert engine.ledger.bytes == conversations.cost.bytes == reserved.bytes
    owned = {int(p) for layer in range(4) for p in engine.pool.owned(after, layer)}
    assert conversations.page_count == len(owned) and conversations.held == [held]
    turn = talk(engine, held.text + random_prompt(2, 20))
    assert turn.reused == LONG + 5
    conversations.clear()
    engine.check()


def test_what_it_takes_is_reserved() -> None:
    engine = start("snapkv", prefill_chunk=16)
    held = talk(engine, random_prompt(1, LONG))
    work, most = Recompression(engine.shared, engine.conversations, engine._reader(), held), 0
    assert work.reserved is not None
    while not work.step():
        taken = engine.ledger.held(work.prefill.sequence.table)
        assert (taken.pages <= work.reserved.pages).all() and taken.bytes <= work.reserved.bytes
        most = max(most, taken.bytes)
    assert most > 0.9 * (work.prefill.length * 4 * 2 * (2 * 8 * 8 + 4))  # all of it was there
    assert work.reserved is None and work.work == 2 * 4 * (LONG + 5)
    assert engine.scheduler.idle and engine.peak_in_flight == 1


def test_who_shares_pages_keeps_them() -> None:
    """Samples of one prompt: one cache is exchanged, the others stay."""
    engine = start("snapkv", reuse_share=1.0)
    first = talk(engine, random_prompt(1, LONG), samples=3, temperature=1.0, seed=5)
    others = {each: positions(engine, each) for each in first.samples}
    assert engine.recompress(first)
    assert {each: positions(engine, each) for each in first.samples} == others
    engine.pool.check()
    engine.conversations.clear()
    engine.check()


def test_windows_stay_windows() -> None:
    engine = start("snapkv", "gemma3_text")
    held = talk(engine, random_prompt(1, LONG), 10)
    governed = np.array(engine.runner.layers_for(LONG + 10).governed)
    assert governed.any() and not governed.all()
    before, kept = positions(engine, held), held.table.kept.copy()
    assert engine.recompress(held)
    after = held.table.kept
    assert (after[governed] == kept[governed]).all() and (after <= kept).all()
    for layer, heads in enumerate(positions(engine, held)):
        if not governed[layer]:
            newest = list(range(LONG + 9 - 15, LONG + 9))  # what the next token can see
            assert heads == [newest] * 2 and set(newest) <= set(before[layer][0])
    assert talk(engine, [*held.text, 7, 8]).reused == LONG + 9
    engine.conversations.clear()
    engine.check()


# --- what is left alone ---------------------------------------------------------------------------


def left_alone(engine: Engine, held: Request) -> None:
    table, dropped = held.table, engine.conversations.dropped
    assert not engine.recompress(held)
    assert held.table is table and engine.conversations.dropped == dropped
    assert engine.ledger.bytes == engine.conversations.cost.bytes
    engine.pool.check()


def test_short_texts_and_texts_without_room_behind_them() -> None:
    for length in (100, 480):
        engine = start("snapkv")
        left_alone(engine, talk(engine, random_prompt(1, length)))


def test_a_long_text_is_read_in_what_positions_are_left() -> None:
    engine = start("snapkv")
    held = talk(engine, random_prompt(1, 400))
    assert engine.recompress(held)


def test_other_caches_are_never_pushed_out() -> None:
    """Its text does not fit beside what is held; with fewer held it does."""
    engine = start("snapkv", kv_memory="450KiB", reuse_share=1.0)
    turns = [talk(engine, random_prompt(number, LONG)) for number in range(6)]
    held = engine.conversations.held
    assert len(held) > 2 and held[-1] is turns[-1]
    left_alone(engine, turns[-1])
    while len(engine.conversations.held) > 1:
        engine.conversations.make_room()
    assert engine.recompress(turns[-1])


def test_a_regime_of_rotary_positions_stays() -> None:
    """Phi-3's text that was short has other positions than the same text read again."""
    engine = start("snapkv", "phi3")
    held = talk(engine, random_prompt(1, LONG))
    assert held.is_long
    assert engine.recompress(held)
    held.is_long = False
    left_alone(engine, held)


def test_what_holds_no_cache_is_refused() -> None:
    engine = start("snapkv")
    request = queue(engine, random_prompt(1, LONG), 4)
    with pytest.raises(ValueError, match="holds no cache; add it with hold=True"):
        engine.recompress(request)
    finish(engine)
    with pytest.raises(ValueError, match="holds no cache; add it with hold=True"):
        engine.recompress(request)


# --- one after the other, while nothing else is to do ---------------------------------------------


def run(recompressor: Recompressor) -> None:
    while recompressor.step():
        pass


def test_each_is_tried_once_the_newest_first() -> None:
    engine = start("snapkv", reuse_share=1.0, slot_scores=True)
    policies: list[str | Policy] = ["snapkv", "full", "h2o", "tova"]
    turns = [
        talk(engine, random_prompt(number, LONG), policy=start(name).policy)
        for number, name in enumerate(policies)
    ]
    tables = [each.table for each in turns if each.cache]
    recompressor = engine.recompressor()
    while not recompressor.done:
        assert recompressor.step()
    now = [each.table for each in turns if each.cache]
    assert [a is b for a, b in zip(tables, now, strict=True)] == [True, True, True, False]
    run(recompressor)
    now = [each.table for each in turns if each.cache]
    assert [a is b for a, b in zip(tables, now, strict=True)] == [False, True, True, False]
    assert recompressor.done == 2 and recompressor.tokens == 2 * 2 * (LONG + 5)
    assert not recompressor.step() and recompressor.done == 2
    turn = talk(engine, [*turns[0].text, 7, 8])  # it leaves a cache of its own
    assert turn.reused == LONG + 5
    run(recompressor)
    assert recompressor.done == 3
    engine.conversations.clear()
    assert not recompressor.step()
    engine.check()


@pytest.mark.parametrize("chunks", [1, 30, 70])
def test_dropped_midway_it_leaves_nothing_and_begins_again(chunks: int) -> None:
    """While the text goes in, and while it is read again."""
    engine = start("snapkv", prefill_chunk=16)
    held = talk(engine, random_prompt(1, LONG))
    recompressor, before = engine.recompressor(), positions(engine, held)
    for _ in range(1 + chunks):
        assert recompressor.step()
    assert len(engine.pool.tables) == 2
    recompressor.drop()
    recompressor.drop()
    assert recompressor.done == 0 and recompressor.tokens == chunks * 16 / 4
    assert positions(engine, held) == before and len(engine.pool.tables) == 1
    assert engine.ledger.bytes == engine.conversations.cost.bytes
    engine.pool.check()
    turn = talk(engine, [*held.text, 7, 8])
    assert turn.reused == LONG + 5
    run(recompressor)
    assert recompressor.done == 1
    engine.conversations.clear()
    engine.check()


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_fault_leaves_the_held_cache(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start("snapkv")
    held = talk(engine, random_prompt(1, LONG))
    recompressor, before = engine.recompressor(), positions(engine, held)
    forward = engine.runner.forward

    def fails(*arguments: Any) -> Any:
        stepped = forward(*arguments)
        if broken == "raises" and recompressor.tokens > LONG:
            raise RuntimeError("broken")
        return stepped._replace(logits=stepped.logits * torch.nan)

    monkeypatch.setattr(engine.runner, "forward", fails)
    with pytest.raises((RuntimeError, FloatingPointError), match="broken|not finite"):
        run(recompressor)
    monkeypatch.undo()
    assert positions(engine, held) == before and len(engine.pool.tables) == 1
    run(recompressor)
    assert recompressor.done == 0, "it is not tried again"
    assert talk(engine, [*held.text, 7, 8]).reused == LONG + 5
    engine.conversations.clear()
    engine.check()


def test_an_engine_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="compress_idle needs .* reuse_share above 0"):
        start("snapkv", reuse_share=0.0).recompressor()


@pytest.mark.parametrize("where", ["between two steps", "once it is exchanged"])
def test_stopped_by_hand_it_leaves_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C where no step is under way: one cache is held, the old one or the new one."""
    engine = start("snapkv")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    held = engine.add(random_prompt(1, LONG), params, hold=True)
    finish(engine)
    before, step, reserve = positions(engine, held), Recompression.step, engine.ledger.reserve

    def stopped(self: Recompression) -> bool:
        step(self)
        raise KeyboardInterrupt

    def stops_once(holder: Any, cost: Any) -> None:
        if isinstance(holder, Recompression) and cost is None:
            monkeypatch.undo()
            raise KeyboardInterrupt
        reserve(holder, cost)

    if where == "between two steps":
        monkeypatch.setattr(Recompression, "step", stopped)
    else:
        monkeypatch.setattr(engine.ledger, "reserve", stops_once)
    with pytest.raises(KeyboardInterrupt):
        engine.recompress(held)
    monkeypatch.undo()
    assert (positions(engine, held) == before) == (where == "between two steps")
    assert len(engine.pool.tables) == 1
    engine.pool.check()
    engine.release(held)
    engine.check()
