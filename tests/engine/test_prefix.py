"""A prompt's cache is compressed first, and questions go on from it."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Full, PyramidInfer, SnapKV
from tests.engine.build import alone, build
from tests.tiny import random_prompt

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_with_the_full_cache_it_is_one_long_prompt(family: str, chunk: int) -> None:
    llm = build("full", family, prefill_chunk=chunk)
    text, questions = random_prompt(1, 60), [random_prompt(seed, 9) for seed in (2, 3, 4)]
    with llm.prefill(text) as cache:
        assert cache.token_ids == text and cache.kv.seen_len == 60
        outputs = llm.generate(questions, PARAMS, prefix=cache)
        again = llm.generate(questions[:1], PARAMS, prefix=[cache])
        assert cache.kv.seen_len == 60
        llm.engine.check()
    for question, out in zip([*questions, questions[0]], [*outputs, *again], strict=True):
        assert out.token_ids == alone("full", family, text + question, PARAMS)
        assert out.prompt_token_ids == text + question
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()


@pytest.mark.parametrize("policy", ["snapkv", "pyramid", "streaming_llm", "h2o", "pyramidinfer"])
def test_a_compressed_prefix_serves_every_question_alike(policy: str) -> None:
    """A question gives the same tokens alone, in company and after others; the prefix stays."""
    llm = build(policy)
    text, questions = random_prompt(1, 150), [random_prompt(seed, 20) for seed in (2, 3)]
    cache = llm.prefill(text)
    kept = cache.kv.kept_len
    assert sum(map(sum, kept)) < 150 * sum(map(len, kept)) and cache.metrics.computed_share > 0
    together = llm.generate(questions, PARAMS, prefix=cache)
    alone_after = [llm.generate([each], PARAMS, prefix=cache)[0] for each in questions]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone_after]
    assert cache.kv.kept_len == kept
    held = llm.engine.add(text, SamplingParams(max_tokens=1, ignore_eos=True), hold=True)
    while held.finish_reason is None:
        llm.engine.step()
    held.output.clear()
    turn = llm.engine.extend(held, questions[0], PARAMS)
    while turn.finish_reason is None:
        llm.engine.step()
    assert turn.output == together[0].token_ids
    cache.release()
    llm.engine.check()
    assert llm.engine.pool.budget_used == 0


def test_prefixes_of_different_policies_side_by_side() -> None:
    llm = build("full")
    text, question = random_prompt(1, 150), random_prompt(2, 10)
    caches = [
        llm.prefill(text, "snapkv", keep=0.3),
        llm.prefill(text, PyramidInfer()),
        llm.prefill(text),
    ]
    assert [c.policy.name for c in caches] == ["snapkv", "pyramidinfer", "full"]
    outputs = llm.generate([question] * 3, PARAMS, prefix=caches)
    assert outputs[2].token_ids == alone("full", "llama", text + question, PARAMS)
    assert outputs[0].kv.bytes < outputs[2].kv.bytes
    for cache in caches:
        cache.release()
    llm.engine.check()


def test_a_text_prefix_and_a_streamed_question() -> None:
    llm = LLM(shipped_model(), Full(), kv_memory="16MiB")
    text = "<user> The archive of Mira Holt is in room 472 . The storm touched the bridge ."
    question = " Where is the archive of Mira Holt ? <end> <assistant>"
    with llm.prefill(text) as cache:
        whole = llm.generate(text + question, SamplingParams(max_tokens=12))[0]
        (out,) = llm.generate(question, SamplingParams(max_tokens=12), prefix=cache)
        assert out.text == whole.text and "472" in out.text
        assert out.prompt_token_ids == whole.prompt_token_ids  # no second head in the middle
        *_, last = llm.stream(question, SamplingParams(max_tokens=12), prefix=cache)
        assert last.text == whole.text
        never_begun = llm.stream(question, prefix=cache)
        llm.engine.check()
    with pytest.raises(ValueError, match="no longer holds its cache"):
        next(never_begun)
    assert llm.engine.pool.budget_used == 0


def test_what_cannot_be_is_said() -> None:
    llm, other = build("full"), build("full")
    cache = llm.prefill(random_prompt(1, 40))
    for wrong, words in (
        (lambda: other.generate([random_prompt(2, 5)], PARAMS, prefix=cache), "another LLM's"),
        (lambda: llm.generate([random_prompt(2, 5)] * 2, PARAMS, prefix=[cache]), "1 prefixes"),
        (lambda: llm.generate([random_prompt(2, 5)], PARAMS, prefix="cache"), "prefill returned"),
        (lambda: llm.prefill(random_prompt(1, 9), keep=0.5), "name the policy"),
        (lambda: llm.prefill(random_prompt(1, 9), "snapkw"), "snapkv"),
        (lambda: llm.prefill(random_prompt(1, 9), "h2o"), "slot_scores"),
        (lambda: llm.generate([[]], PARAMS, prefix=cache), "empty|no token"),
        (
            lambda: llm.generate([random_prompt(2, 5)], PARAMS, prefix=cache, policy=SnapKV()),
            "policy='snapkv' with .*: give the policy to prefill",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    cache.release()
    cache.release()
    with pytest.raises(ValueError, match="was released"):
        llm.generate([random_prompt(2, 5)], PARAMS, prefix=cache)
    llm.engine.check()
    assert llm.engine.pool.budget_used == 0


def test_protected_spans_of_a_prefix_stay() -> None:
    llm: Any = build("full")
    policy = SnapKV(keep=0.2)
    cache = llm.prefill(random_prompt(1, 200), policy, protect=[(50, 60)])
    llm.generate([random_prompt(2, 40)], PARAMS, prefix=cache, protect=[(205, 210)])
    table = cache.held_by(llm.engine).table
    for layer in range(len(table.kept)):
        for head in llm.engine.pool.positions(table, layer):
            assert {*range(50, 60)} <= set(head.tolist())
    cache.release()
