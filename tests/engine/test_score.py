"""``LLM.score``: how likely a continuation is on a compressed cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES, Policy, make_policy
from tests.engine.build import SMALL
from tests.tiny import COMMON, VOCAB, random_prompt, tiny_model

LAST: int = COMMON["max_position_embeddings"]
# No text of two tokens: where scores are standardised its entries tie, and rounding decides.
PAIRS = [(30, 7), (1, 1), (5, 1), (61, 20), (3, 33), (90, 1)]
DROPPING = sorted(set(POLICIES) - {"full", "streaming_llm"})


@cache
def model(family: str) -> Any:
    return tiny_model(family, torch.float64)


def policy_named(name: str) -> Policy:
    return make_policy(name, None if name == "full" else 0.5, **SMALL.get(name, {}))


def engine(name: str | Policy, family: str = "llama", **options: Any) -> LLM:
    options = {"kv_memory": "4MiB", "page_size": 4, **options}
    policy = policy_named(name) if isinstance(name, str) else name
    return LLM(model(family), policy=policy, **options)


def texts(pairs: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts and continuations of these lengths."""
    contexts = [random_prompt(2 * seed, context) for seed, (context, _) in enumerate(pairs)]
    return contexts, [random_prompt(2 * seed + 1, more) for seed, (_, more) in enumerate(pairs)]


@torch.no_grad()
def own_logprobs(family: str, context: list[int], more: list[int]) -> torch.Tensor:
    """The model's own log-probabilities ``[continuation, vocab]``, in one pass."""
    logits = model(family)(torch.tensor([context + more[:-1]])).logits[0, len(context) - 1 :]
    return logits.double().log_softmax(-1)


# --- with the full cache ----------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("chunk", [1024, 9])
def test_the_full_cache_says_what_the_model_says(family: str, chunk: int) -> None:
    """Ragged, side by side, in one or several chunks; transformers' norms are in float32."""
    contexts, continuations = texts(PAIRS)
    llm = engine("full", family, prefill_chunk=chunk, step_tokens=max(8, chunk))
    scores = llm.score(contexts, continuations, logits=True)
    llm.engine.check()
    for context, more, score in zip(contexts, continuations, scores, strict=True):
        expected = own_logprobs(family, context, more)
        assert score.prompt_token_ids == context and score.token_ids == more
        chosen = [float(row[token]) for row, token in zip(expected, more, strict=True)]
        assert score.logprobs == pytest.approx(chosen, abs=1e-5)
        assert score.greedy == (expected.argmax(-1) == torch.tensor(more)).tolist()
        assert score.logits is not None
        assert score.logits.dtype == torch.float32 and score.logits.device.type == "cpu"
        assert score.logits.shape == (len(more), VOCAB)
        found = score.logits.double().log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_policy_of_the_call_is_as_an_llm_of_that_policy() -> None:
    """Scores and answers, side by side with the LLM's own, which holds again in the next call."""
    contexts, continuations = texts([(90, 9), (70, 5), (120, 12)])
    sampling, whole = SamplingParams(max_tokens=12, ignore_eos=True), engine("full")

    def found(llm: LLM, **options: Any) -> list[Any]:
        outs = llm.generate(contexts, sampling, **options)
        scores = llm.score(contexts, continuations, **options)
        return [
            [(o.token_ids, o.kv.kept_len) for o in outs],
            [(s.logprobs, s.kv.kept_len) for s in scores],
        ]

    full = found(whole)
    for name in ("snapkv", "pyramidinfer", "streaming_llm"):
        policy = policy_named(name)
        expected = found(engine(name))
        assert found(whole, policy=policy) == expected
        assert all(mine != other for mine, other in zip(expected, full, strict=True))
    assert found(whole) == full and found(whole, policy=None) == full
    whole.engine.check()


def test_a_policy_of_the_call_can_be_wrong() -> None:
    llm = engine("full")
    asks: list[Any] = [
        lambda policy: llm.generate([[5, 6]], policy=policy),
        lambda policy: llm.score([[5, 6]], [[7]], policy=policy),
    ]
    for ask in asks:
        for policy, words in (
            (0.5, "neither a name nor a policy"),
            ("snapkw", "snapkv"),
            ("h2o", "slot_scores=True"),
        ):
            with pytest.raises(ValueError, match=words):
                ask(policy)
    assert llm.engine.scheduler.idle and llm.engine.pool.budget_used == 0


def test_greedy_tokens_are_flagged_as_such() -> None:
    llm = engine("full")
    contexts, _ = texts(PAIRS)
    outs = llm.generate(contexts, SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0))
    tokens = [out.token_ids for out in outs]
    for out, score in zip(outs, llm.score(contexts, tokens), strict=True):
        assert score.greedy == [True] * 9
        assert out.logprobs is not None
        assert score.logprobs == pytest.approx([each.logprob for each in out.logprobs], abs=1e-5)
        assert score.logits is None
    broken = [[*each[:4], (each[4] + 1) % VOCAB, *each[5:]] for each in tokens]
    for score in llm.score(contexts, broken):
        assert score.greedy[:5] == [True] * 4 + [False]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_up_to_the_last_position(family: str) -> None:
    """The last token of a continuation is never fed, so one more fits than there are positions."""
    llm = engine("full", family, kv_memory="16MiB")
    for length, more in ((LAST - 12, 13), (LAST, 1), (1, LAST)):
        context, continuation = random_prompt(1, length), random_prompt(2, more)
        (score,) = llm.score([context], [continuation])
        expected = own_logprobs(family, context, continuation)
        chosen = [float(row[token]) for row, token in zip(expected, continuation, strict=True)]
        assert score.logprobs == pytest.approx(chosen, abs=1e-5)
        with pytest.raises(ValueError, match=f"{LAST} positions"):
            llm.score([context], [[*continuation, 5]])
    with pytest.raises(ValueError, match=f"{LAST} positions"):
        llm.score([random_prompt(1, LAST + 1)], [[5]])
    llm.engine.check()


@pytest.mark.parametrize("more", [24, 25, 26, 27])
def test_phi3_switches_where_the_model_does(more: int) -> None:
    """Its rotary range depends on how many tokens are fed: 64 at most for the short one."""
    context, continuation = random_prompt(1, 40), random_prompt(2, more)
    (score,) = engine("full", "phi3").score([context], [continuation])
    expected = own_logprobs("phi3", context, continuation)
    chosen = [float(row[token]) for row, token in zip(expected, continuation, strict=True)]
    assert score.logprobs == pytest.approx(chosen, abs=1e-5)


# --- with a compressed one --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_batch_is_as_each_alone(name: str, family: str) -> None:
    contexts, continuations = texts(PAIRS)
    crowd = engine(name, family, step_tokens=40)
    together = crowd.score(contexts, continuations)
    llm = engine(crowd.policy, family, prefill_chunk=7)  # by the same head profile
    for context, more, score in zip(contexts, continuations, together, strict=True):
        (alone,) = llm.score([context], [more])
        assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert score.greedy == alone.greedy
        assert score.kv.kept_len == alone.kv.kept_len
        assert score.metrics.computed_share == alone.metrics.computed_share
    llm.engine.check()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_cache_is_that_of_the_context(name: str) -> None:
    """What is said of it is what generation says, before the continuation goes in."""
    contexts, continuations = texts([(100, 9), (50, 1), (150, 60)])
    llm = engine(name)
    outs = llm.generate(contexts, SamplingParams(max_tokens=1))
    for out, score in zip(outs, llm.score(contexts, continuations), strict=True):
        assert score.kv.seen_len == len(score.prompt_token_ids)
        assert score.kv.kept_len == out.kv.kept_len
        assert score.kv.bytes == out.kv.bytes
        assert score.kv.full_bytes == out.kv.full_bytes
        assert score.metrics.computed_share == out.metrics.computed_share
        assert (score.kv.bytes < score.kv.full_bytes) == (name != "full")


@pytest.mark.parametrize("name", DROPPING)
def test_nothing_of_a_continuation_is_dropped(name: str) -> None:
    """Tokens fed one by one, with eviction switched off, are as likely as all of them at once."""
    policy = policy_named(name)
    kind = type(policy)
    frozen: Policy = type("Frozen", (kind,), {"evicts": False})(**vars(policy))
    prompt = random_prompt(8, 120)
    params = SamplingParams(max_tokens=25, ignore_eos=True, logprobs=0)
    options: dict[str, Any] = {"kv_memory": "4MiB", "page_size": 4}
    (out,) = LLM(model("llama"), policy=frozen, **options).generate([prompt], params)
    assert out.logprobs is not None and out.kv.bytes < out.kv.full_bytes
    for chunk in (1, 11, 1024):
        (score,) = engine(name, prefill_chunk=chunk).score([prompt], [out.token_ids])
        assert score.greedy == [True] * 25
        assert score.logprobs == pytest.approx([each.logprob for each in out.logprobs], abs=1e-5)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_protected_spans_count(name: str) -> None:
    contexts, continuations = texts([(100, 5), (90, 5)])
    llm = engine(name)
    plain = llm.score(contexts, continuations)
    same = llm.score(contexts, continuations, protect=[[], []])
    held = llm.score(contexts, continuations, protect=[[(0, 100)], [(0, 90)]])
    full = engine("full").score(contexts, continuations)
    for before, again, whole, wanted in zip(plain, same, held, full, strict=True):
        assert before.logprobs == pytest.approx(again.logprobs, abs=1e-9)
        assert whole.kv.kept_len == wanted.kv.kept_len
        assert whole.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


# --- beside others, and in little memory ------------------------------------------------------


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_runs_beside_it_is_unharmed(name: str) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompt = random_prompt(4, 70)
    expected = engine(name).generate([prompt], params)[0].token_ids
    llm = engine(name, step_tokens=16)
    request = llm.engine.add(prompt, params)
    while not request.output:
        llm.engine.step()
    contexts, continuations = texts(PAIRS)
    llm.score(contexts, continuations)
    while request.finish_reason is None:
        llm.engine.step()
    assert request.output == expected
    llm.engine.check()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_memory_stays_below_what_was_promised(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at whenever the engine takes a peak down, for many requests in one small pool."""
    llm = engine(name, family, kv_memory="400KiB", prefill_chunk=16, step_tokens=24)
    requests: list[Request] = []
    submit, pool = llm.engine.submit, llm.engine.pool
    note = pool.note_peak
    looked = []

    def watch(table: Any) -> None:
        note(table)
        for request in requests:
            if request.cache is not None and request.table is table:
                held = pool.bytes(table) + table.extra_bytes
                pages = np.bincount(pool.group_of, table.held.sum(1), len(pool.groups))
                assert request.reserved is not None
                assert held <= request.reserved.bytes <= request.cost.bytes
                assert (pages <= request.reserved.pages).all()
                looked.append(held)

    monkeypatch.setattr(pool, "note_peak", watch)
    monkeypatch.setattr(
        llm.engine, "submit", lambda request: (requests.append(request), submit(request))
    )
    contexts, continuations = texts([(90, 30), (3, 60), (60, 1), (40, 40), (100, 5)])
    llm.score(contexts, continuations)
    assert len(requests) == 5 and len(looked) >= 5
    assert llm.engine.peak_bytes <= pool.budget
    llm.engine.check()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_is_let_in_fits_to_the_byte(name: str) -> None:
    """The smallest pool that takes a request is large enough for it."""
    context, more = random_prompt(1, 60), random_prompt(2, 25)
    refused = 0
    for kib in range(24, 200, 4):
        llm = engine(name, kv_memory=kib * 1024)
        try:
            (score,) = llm.score([context], [more])
        except ValueError as error:
            assert "raise kv_memory" in str(error)
            refused += 1
            continue
        break
    llm.engine.check()
    assert refused and len(score.logprobs) == 25


def test_ctrl_c_ends_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("pyramid", prefill_chunk=8, step_tokens=8)
    contexts, continuations = texts(PAIRS)
    expected = llm.score(contexts, continuations)
    real, calls = Engine.step, [0]

    def step(self: Engine) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.score(contexts, continuations)
    assert llm.engine.scheduler.idle
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()
    again = llm.score(contexts, continuations)
    assert [each.logprobs for each in again] == [each.logprobs for each in expected]


# --- texts, and mistakes ----------------------------------------------------------------------


def test_texts_get_no_special_tokens_in_the_middle() -> None:
    llm = LLM(shipped_model(), policy="full", kv_memory="8MiB", dtype="float32")
    tokenizer = llm.tokenizer
    context, more = "The old baker walked slowly", "to the market ."
    (score,) = llm.score([context], [more])
    assert score.prompt_token_ids == tokenizer(context)["input_ids"]
    assert score.prompt_token_ids[0] == tokenizer.bos_token_id
    assert score.token_ids == tokenizer.convert_tokens_to_ids(more.split())
    (same,) = llm.score([score.prompt_token_ids], [score.token_ids])
    assert same.logprobs == score.logprobs
    (alone,) = llm.score(context, more)  # type: ignore[arg-type]
    assert alone.logprobs == score.logprobs
    (nonsense,) = llm.score([context], ["market . to the"])
    assert sum(nonsense.logprobs) < sum(score.logprobs)


@pytest.mark.parametrize(
    ("prompts", "continuations", "options", "message"),
    [
        ([[5, 6]], [[]], {}, "the continuation is empty; give at least one token"),
        ([[5, 6]], [[5], [6]], {}, "2 continuations given for 1 prompts"),
        ([[5, 6], [7]], [[5]], {}, "1 continuations given for 2 prompts"),
        ([[5, 6]], [], {}, "no prompt was given"),
        ([], [[5]], {}, "no prompt was given"),
        ([[]], [[5]], {}, "the prompt is empty"),
        ([[5, 6]], [[VOCAB]], {}, f"token id {VOCAB} is outside the vocabulary"),
        ([[5, 6]], [[-1]], {}, "token id -1 is outside the vocabulary"),
        ([[VOCAB]], [[5]], {}, f"token id {VOCAB} is outside the vocabulary"),
        ([[5, 6]], [[5.5]], {}, "neither a text nor a list of token ids"),
        ([[5, 6]], ["text"], {}, "a text prompt needs a tokenizer"),
        ([[5, 6]], 7, {}, "prompts=7 must be a text"),
        ([[5, 6]], [[5] * LAST], {}, f"exceed the model's {LAST} positions"),
        ([[5, 6]], [[5]], {"protect": [(0, 3)]}, "lies outside the prompt's 2 tokens"),
        ([[5, 6]], [[5]], {"protect": [[(0, 1)], []]}, "2 protect lists given for 1 prompts"),
        ([[5] * 400], [[5] * 100], {}, "raise kv_memory"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    prompts: Any, continuations: Any, options: dict[str, Any], message: str
) -> None:
    llm = engine("full", kv_memory="100KiB")
    with pytest.raises(ValueError, match=message):
        llm.score(prompts, continuations, **options)
    assert llm.engine.scheduler.idle
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()
    assert len(llm.score([[5, 6]], [[7, 8]])[0].logprobs) == 2
