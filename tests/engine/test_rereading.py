"""Texts that are read again behind themselves (KVzip): beside others, interrupted, moved away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.text import head_of, plain_ids
from pyramidinfer.models import rereading
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import KVzip
from pyramidinfer.policies.kvzip import AGAIN, FROM
from tests.engine.serving import alone, finish, model, queue, start, step
from tests.tiny import random_prompt

POLICY = KVzip(keep=0.3, min_text=8, question=(5, 6, 7), question_from=(8, 9), chunk_length=40)
ALL = SamplingParams(max_tokens=10, ignore_eos=True)


def reread(engine: Engine, request: Request, layer: int) -> None:
    """Step until the request's text is being read again in this layer."""
    while True:
        prefill = request.prefill
        if prefill is not None and prefill.again is not None and prefill.layer == layer:
            return
        step(engine)


def answer(prompt: list[int], **options: Any) -> list[int]:
    engine = start(POLICY, **options)
    request = queue(engine, prompt, 10)
    finish(engine)
    return request.output


@pytest.mark.parametrize("chunk", [7, 1024])
def test_reservations_are_exact(chunk: int) -> None:
    """While the text goes in: all of it in every layer, a reading of one, and its hidden states;
    from then on what is held, and what is generated on top."""
    engine = start(POLICY, prefill_chunk=chunk)
    request = queue(engine, random_prompt(0, 90), 10)
    engine.pool.peak_bytes = 0
    while not request.output:
        step(engine)
    table, pool = request.table, engine.pool
    most = request.cost.bytes - 90 * 32 * 8  # outputs of every token, had they been asked for
    assert most >= table.peak_bytes > 0.97 * most
    held = pool.pages_for(table.kept + 10).sum(1)
    assert request.reserved is not None and request.cost.after_prefill is not None
    assert request.reserved.bytes == int((held * pool.layout.layer_page_bytes).sum())
    assert request.reserved.bytes < 0.55 * pool.bytes(table) / 0.3
    assert table.kept.sum() == round(0.3 * 90 * table.kept.size) and not table.state
    assert table.seen_len == 90 and table.extra_bytes == 0
    assert engine.metrics(request).computed_share == (90 + 90 + 3 + 10 + 10) / 90
    finish(engine)
    kv = request.kv
    assert kv is not None and np.array(kv.kept_len).sum() == table.kept.size * 9 + round(
        0.3 * 90 * table.kept.size
    )


def test_forecast_bounds_all_layers_together() -> None:
    engine = start(POLICY)
    for length, new in ((90, 1), (90, 60), (200, 20)):
        request = queue(engine, random_prompt(length, length), new)
        settled = request.cost.after_prefill
        finish(engine)
        assert request.kv is not None and settled is not None
        assert request.kv.bytes <= settled.bytes
        if new < length:
            assert settled.bytes < 0.8 * request.kv.full_bytes


def test_ctrl_c_in_a_reading_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer of it and in the cut; another request beside it goes on."""
    prompt, expected = random_prompt(3, 90), answer(random_prompt(3, 90))
    for name in ("end_layer", "cut"):
        engine = start(POLICY, prefill_chunk=16, step_tokens=24)
        other, request = queue(engine, random_prompt(9, 20), 40), queue(engine, prompt, 10)
        reread(engine, request, 2)
        with monkeypatch.context() as patched:

            def stop(*_: Any) -> None:
                raise KeyboardInterrupt

            patched.setattr(rereading, name, stop)
            with pytest.raises(KeyboardInterrupt):
                finish(engine)
        assert request.prefill is not None and request.prefill.again is None
        assert not request.table.state
        finish(engine)
        assert request.output == expected and other.output == answer_of(other)
        assert len(request.computed) == 4 * 4


def answer_of(request: Request) -> list[int]:
    engine = start(POLICY)
    again = queue(engine, request.prompt, request.max_new)
    finish(engine)
    return again.output


@pytest.mark.parametrize("layer", [0, 2])
def test_a_text_is_moved_away_in_the_middle_of_a_reading(layer: int) -> None:
    prompt = random_prompt(3, 90)
    engine = start(POLICY, prefill_chunk=16, step_tokens=16, admission="overcommit")
    request = queue(engine, prompt, 10)
    reread(engine, request, layer)
    engine.scheduler._preempt()
    assert request.preempted is not None and request.prefill is not None
    finish(engine)
    assert engine.scheduler.counts.swapped == engine.scheduler.counts.resumed == 1
    assert request.output == answer(prompt)


def test_samples_begin_on_what_was_cut() -> None:
    engine = start(POLICY)
    request = queue(engine, random_prompt(2, 60), 8, samples=3, temperature=1.0, seed=4)
    while not request.output:
        step(engine)
    for each in (request, *request.samples):
        assert each.reserved is not None
        assert each.reserved.bytes == request.reserved.bytes < request.cost.bytes / 2  # type: ignore[union-attr]
    finish(engine)
    assert len({tuple(each.output) for each in (request, *request.samples)}) == 3


def test_a_short_question_on_top_stays_whole_and_a_long_one_is_cut() -> None:
    """Earlier entries stay in both cases."""
    engine = start(KVzip(keep=0.25, min_text=30, question=(5, 6)))
    held = engine.add(random_prompt(0, 100), ALL, hold=True)
    finish_held(engine, held)
    for length, share in ((12, 1.0), (60, 0.25)):
        turn = engine.branch(held, random_prompt(length, length), ALL)
        engine.submit(turn)
        before = held.table.kept.copy()
        finish_held(engine, turn)
        assert turn.kv is not None
        fresh, added = length + 1, np.array(turn.kv.kept_len) - before - 9
        assert int(added.sum()) == round(share * fresh * added.size) and int(added.min()) >= 0
        reads = 1 if share == 1 else 2
        assert turn.computed == [fresh] * 4 + [fresh + 2] * 4 * (reads - 1)
    engine.release(held)
    engine.check()


def finish_held(engine: Engine, request: Request) -> None:
    while request.finish_reason is None:
        engine.step()


def test_a_prefix_and_its_questions() -> None:
    llm = LLM(model("llama"), policy=POLICY, kv_memory="4MiB", page_size=4)
    with llm.prefill(random_prompt(1, 120)) as prefix:
        assert prefix.metrics.computed_share > 2
        assert prefix.kv.kept_share == pytest.approx(0.3, abs=0.001)
        (out,) = llm.generate([random_prompt(2, 7)], ALL, prefix=prefix)
        assert out.metrics.computed_share == 1
        assert sum(map(sum, out.kv.kept_len)) == sum(map(sum, prefix.kv.kept_len)) + 8 * 16
    llm.engine.check()


def test_the_prompts_logprobs_are_those_of_the_full_cache() -> None:
    """They were computed before anything was dropped."""
    found = []
    for policy in ("full", POLICY):
        engine = start(policy, prefill_chunk=16)
        request = engine.make(random_prompt(1, 50), replace(ALL, prompt_logprobs=2))
        engine.submit(request)
        finish(engine)
        assert request.kv is not None and request.kv.peak_bytes <= request.cost.bytes
        found.append(([each.logprob for each in request.prompt_logprobs], request.output[0]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12) and len(found[0][0]) == 49
    assert found[0][1] == found[1][1], "the first token comes from the whole cache, too"


def test_sliding_layers_are_left_alone() -> None:
    policy = KVzip(keep=0.3, min_text=8)
    kept = []
    for each in ("full", policy):
        engine = start(each, "gemma3_text")
        request = queue(engine, random_prompt(1, 100), 4)
        finish(engine)
        assert request.kv is not None
        kept.append(np.array(request.kv.kept_len))
    governed = np.array(engine.runner.layers_for(104).governed)
    assert (kept[0][~governed] == kept[1][~governed]).all()
    cut = kept[1][governed]
    assert int(cut.sum()) == round(0.3 * 100 * cut.size) + 3 * cut.size


def test_long_texts_are_read_in_what_positions_are_left() -> None:
    engine = start(KVzip(keep=0.3, question=(5, 6), question_from=(5, 6, 7)))
    request = queue(engine, random_prompt(1, 400), 4)
    finish(engine)
    assert max(request.computed[4:]) <= 112 and sum(request.computed[4::4]) > 400
    assert request.kv is not None and request.kv.kept_share < 0.32
    message = (
        "reads a text of 480 tokens a second time after it, which needs at least 75 positions, and "
        "this model has 32 left there: shorten the text, or choose a policy that reads it once"
    )
    with pytest.raises(ValueError, match=message):
        engine.add(random_prompt(1, 480), ALL)
    engine.check()


def test_conversations_go_on_with_what_was_cut() -> None:
    engine = start(POLICY)
    first = queue(engine, random_prompt(1, 60), 5, owner="ann")
    finish_all(engine)
    turn = queue(engine, first.prompt + first.output + [7, 8], 5, owner="ann")
    finish_all(engine)
    assert turn.reused == 64 and turn.computed == [3] * 4
    engine.conversations.clear()
    engine.check()


def finish_all(engine: Engine) -> None:
    while not engine.scheduler.idle:
        engine.step()


def test_the_sentences_are_read_with_the_models_tokenizer() -> None:
    """And what the tokenizer puts in front of a text is not repeated."""
    llm = LLM(shipped_model(), policy=KVzip(keep=0.3, min_text=8), kv_memory="8MiB")
    policy = llm.policy
    assert isinstance(policy, KVzip) and "auto" not in (policy.question, policy.question_from)
    assert policy.question == tuple(plain_ids(llm.tokenizer, AGAIN))
    assert policy.question_from == tuple(plain_ids(llm.tokenizer, FROM))
    prompt = llm.encode("The old baker of the village had a red door.")
    head = head_of(llm.tokenizer)
    assert head and prompt[: len(head)] == head
    request = llm.engine.add(prompt, ALL)
    llm.engine._schedule()
    assert request.prefill is not None
    (again,) = request.prefill.readings
    assert again.tolist() == [*policy.question, *prompt[len(head) :]]
    mine = KVzip(question=[3, 4])
    assert llm.engine.bind(mine) == KVzip(question=(3, 4), question_from=policy.question_from)
    llm.engine.abort(request)


def test_without_a_tokenizer_there_is_the_repetition_alone() -> None:
    policy = start(KVzip(keep=0.3)).policy
    assert policy == KVzip(keep=0.3, question=None, question_from=None)


def test_company_changes_no_tokens() -> None:
    """A text is read again while others decode and come in."""
    engine = start("kvzip", prefill_chunk=8, step_tokens=12)
    sizes = [(5, 30), (60, 12), (33, 12), (9, 3)]
    requests = [queue(engine, random_prompt(i, n), new) for i, (n, new) in enumerate(sizes)]
    finish(engine)
    for number, ((length, new), request) in enumerate(zip(sizes, requests, strict=True)):
        assert request.output == alone("kvzip", "llama", number, length, new)


def test_scores_do_not_depend_on_chunks() -> None:
    """The largest weight, chunk by chunk or of all queries at once (float64)."""
    policy, prompt = KVzip(keep=0.3, min_text=8), random_prompt(1, 90)
    traces = []
    for chunk in (1024, 17):
        llm = LLM(model("llama"), policy=policy, kv_memory="4MiB", prefill_chunk=chunk)
        traces.append(llm.trace(prompt, 3))
    for one, other in zip(traces[0].kept_positions, traces[1].kept_positions, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
