"""One request that goes wrong ends alone; what is wished for beside tokens; policies in company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import make_policy
from tests.engine.build import policy_named
from tests.engine.serving import NAMES, alone, finish, model, queue, start, step
from tests.tiny import random_prompt

BAD = [110] * 6  # no other text of these tests has two of it in a row


def blame(engine: Engine) -> list[Request]:
    """As a server does: a step, and after one that raises its requests one by one."""
    try:
        return engine.step()
    except Exception:
        engine.pool.check()
        lost = list(engine.lost)  # what had been settled already cannot be taken back
        return lost + engine.step_singly()


def run(engine: Engine) -> list[Request]:
    """To the end; those that ended with an error."""
    failed = []
    while not engine.scheduler.idle:
        failed += [each for each in blame(engine) if each.finish_reason == "error"]
        engine.pool.check()
    engine.check()
    return failed


def plain(number: int, length: int, new: int = 14, name: str = "full", **params: Any) -> list[int]:
    return alone(name, "llama", number, length, new, **params)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "pyramid", "h2o", "streaming_llm"])
def test_a_prompt_that_breaks_its_pass_ends_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that the embedding raises at, in the second chunk of a prompt, while others decode
    and take their prompts in."""
    engine = start(name, prefill_chunk=16, step_tokens=40)
    decoder = engine.runner.decoder
    real = decoder.embed

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        if "110, 110" in str(ids.tolist()):
            raise RuntimeError("a bad token")
        return real(ids, positions)

    monkeypatch.setattr(decoder, "embed", embed)
    others = [queue(engine, random_prompt(number, 20), 14) for number in (1, 2)]
    while not others[0].output:
        step(engine)
    bad = queue(engine, random_prompt(3, 20) + BAD + random_prompt(3, 10), 14)
    late = queue(engine, random_prompt(4, 50), 14)
    assert run(engine) == [bad]
    assert (bad.finish_reason, bad.error) == ("error", "RuntimeError: a bad token")
    assert bad.output == [] and bad.cache is None
    for number, request in zip((1, 2), others, strict=True):
        assert request.output == plain(number, 20, name=name)
    assert late.output == plain(4, 50, name=name)
    assert not engine.pool.tables


@pytest.mark.parametrize("name", NAMES)
def test_one_that_cannot_be_settled_ends_with_what_it_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While decoding: its eviction raises."""
    engine = start(name)
    requests = [queue(engine, random_prompt(number, 20), 14) for number in (1, 2, 3)]
    while len(requests[0].output) < 4:
        step(engine)
    bad, real = requests[1], engine.runner.commit

    def commit(pool: Any, sequence: Any, decoding: Any, row: int) -> None:
        if sequence is bad:
            raise ArithmeticError("no eviction")
        real(pool, sequence, decoding, row)

    monkeypatch.setattr(engine.runner, "commit", commit)
    assert run(engine) == [requests[1]]
    assert requests[1].error == "ArithmeticError: no eviction"
    for number, request in zip((1, 2, 3), requests, strict=True):
        expected = plain(number, 20, name=name)
        assert request.output == (expected[:4] if number == 2 else expected)


class Grammar:
    """Allows some tokens, in order; raises at a given place."""

    def __init__(
        self, tokens: list[int], breaks_at: int | None = None, where: str = "allowed"
    ) -> None:
        self.tokens, self.breaks_at, self.where = tokens, breaks_at, where
        self.taken: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.taken) == len(self.tokens)

    def allowed(self, vocab_size: int) -> Tensor:
        self._break("allowed")
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[self.tokens[len(self.taken)]] = True
        return mask

    def accept(self, token: int) -> int:
        self._break("accept")
        self.taken.append(token)
        return token

    def copy(self) -> Grammar:
        return Grammar(self.tokens, self.breaks_at, self.where)

    def _break(self, where: str) -> None:
        if where == self.where and len(self.taken) == self.breaks_at:
            raise LookupError("no such rule")


@pytest.mark.parametrize("where", ["allowed", "accept"])
@pytest.mark.parametrize("breaks_at", [0, 3])
def test_a_constraint_that_raises_ends_its_request_only(where: str, breaks_at: int) -> None:
    engine = start("full", step_tokens=30)
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    before = queue(engine, random_prompt(1, 20), 14)
    bad = engine.make(random_prompt(2, 20), params)
    bad.constraint = Grammar([5, 6, 7, 8, 9], breaks_at, where)
    engine.submit(bad)
    behind = queue(engine, random_prompt(3, 20), 14)
    failed = []
    while not engine.scheduler.idle:  # no step fails: it is known whose rule it is
        failed += [each for each in step(engine) if each.finish_reason == "error"]
    assert failed == [bad]
    assert bad.error == "LookupError: no such rule"
    assert bad.output == [5, 6, 7, 8, 9][:breaks_at]
    assert before.output == plain(1, 20)
    assert behind.output == plain(3, 20)


def test_a_constraint_leads_and_ends_an_answer() -> None:
    engine = start("full")
    request = engine.make(random_prompt(2, 20), SamplingParams(max_tokens=14), samples=2)
    grammar = Grammar([5, 60, 70, 8])
    request.constraint, request.samples[0].constraint = grammar, grammar.copy()
    engine.submit(request)
    finish(engine)
    for each in (request, *request.samples):
        assert each.output == [5, 60, 70, 8]
        assert each.finish_reason == "stop"


def test_a_constraint_under_temperature_and_penalties() -> None:
    """Whatever else shapes the logits, only what is allowed is drawn."""
    engine = start("full")
    params = SamplingParams(
        max_tokens=9,
        temperature=2.0,
        seed=1,
        repetition_penalty=1.5,
        top_k=3,
        logit_bias={40: 50.0},
    )
    request = engine.make(random_prompt(2, 20), params)
    request.constraint = Grammar([9, 8, 7])
    engine.submit(request)
    finish(engine)
    assert request.output == [9, 8, 7]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_logits_that_are_no_numbers_end_one_sample(
    victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start("full")
    hot = {"temperature": 1.0, "seed": 5}
    request = queue(engine, random_prompt(1, 20), 14, samples=3, **hot)
    while len(request.output) < 4:
        step(engine)
    everyone, real = [request, *request.samples], engine.runner.forward
    assert engine.scheduler.running == everyone

    def forward(pool: Any, batch: Any) -> Any:
        stepped = real(pool, batch)
        if len(batch.decode) == 3:
            with torch.inference_mode():
                stepped.logits[victim, 7] = float("nan")
        return stepped

    monkeypatch.setattr(engine.runner, "forward", forward)
    ended = step(engine)
    assert ended == [everyone[victim]]
    assert ended[0].finish_reason == "error" and "NaN" in (ended[0].error or "")
    finish(engine)
    for index, each in enumerate(everyone):
        expected = plain(1, 20, temperature=1.0, seed=5 + index)
        assert each.output == (expected[:4] if index == victim else expected)


def test_logits_of_a_prompt_that_are_no_numbers_end_all_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start("full")
    real = engine.runner._logits
    monkeypatch.setattr(engine.runner, "_logits", lambda hidden: real(hidden) * float("nan"))
    request = queue(engine, random_prompt(1, 20), 14, samples=2)
    finish(engine)
    for each in (request, *request.samples):
        assert each.finish_reason == "error" and each.output == []


def test_a_step_that_fails_for_nobodys_fault_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error does not come back: one by one, everybody gets a token."""
    engine = start("pyramid", prefill_chunk=16, step_tokens=24)
    requests = [queue(engine, random_prompt(number, 30), 14) for number in (1, 2, 3)]
    real, calls = engine.runner._logits, [0]

    def failing(hidden: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] % 5 == 4:
            raise OSError("a hiccup")
        return real(hidden)

    monkeypatch.setattr(engine.runner, "_logits", failing)
    failed: list[Request] = []
    while not engine.scheduler.idle:
        if calls[0] > 30:
            monkeypatch.setattr(engine.runner, "_logits", real)
        failed += [each for each in blame(engine) if each.finish_reason == "error"]
    for number, request in zip((1, 2, 3), requests, strict=True):
        expected = plain(number, 30, name="pyramid")
        assert request.output == (
            expected[: len(request.output)] if request in failed else expected
        )
    assert len(failed) < 3


def test_a_begin_that_fails_leaves_the_others_in_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that were to begin in the same step begin in the next."""
    engine = start("full")
    requests = [queue(engine, random_prompt(number, 20), 14) for number in (1, 2, 3)]
    real = engine.shared.start

    def begin(request: Request) -> None:
        if request is requests[1]:
            raise MemoryError("no memory")
        real(request)

    monkeypatch.setattr(engine.shared, "start", begin)
    with pytest.raises(MemoryError):
        engine.step()
    finish(engine)
    assert [each.finish_reason for each in requests] == ["length", "error", "length"]
    assert requests[2].output == plain(3, 20)


# --- what can be wished for ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_log_probabilities_of_a_prompt_are_the_models_own(family: str, chunk: int) -> None:
    engine = start("full", family, prefill_chunk=chunk, step_tokens=16)
    prompt = random_prompt(1, 45)
    request = engine.make(prompt, SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=2))
    other = queue(engine, random_prompt(2, 30), 8)
    engine.submit(request)
    finish(engine)
    with torch.no_grad():
        logits = model(family)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [each.token_id for each in request.prompt_logprobs] == prompt[1:]
    for place, found in enumerate(request.prompt_logprobs):
        assert found.logprob == pytest.approx(float(logits[place, prompt[place + 1]]), abs=1e-9)
        best = logits[place].topk(2)
        assert list(found.top) == best.indices.tolist()
        assert list(found.top.values()) == pytest.approx(best.values.tolist(), abs=1e-9)
    assert request.output == alone("full", family, 1, 45, 3)
    assert other.output == alone("full", family, 2, 30, 8)


def test_a_bias_draws_a_token_or_shuts_it_out() -> None:
    engine = start("full")
    usual = plain(1, 20)
    forced = queue(engine, random_prompt(1, 20), 5, logit_bias={77: 100.0})
    barred = queue(engine, random_prompt(1, 20), 5, logit_bias={usual[0]: -100.0})
    even = queue(engine, random_prompt(1, 20), 14, logit_bias={usual[0]: 0.0})
    sampled = queue(
        engine,
        random_prompt(1, 20),
        9,
        temperature=1.0,
        seed=2,
        logit_bias={usual[0]: -100.0, 5: 1.0},
    )
    finish(engine)
    assert forced.output == [77] * 5
    assert usual[0] not in barred.output + sampled.output
    assert even.output == usual
    for wrong in ({120: 1.0}, {-1: 1.0}, {3: 101.0}, {3: float("nan")}, {"3": 1.0}):
        with pytest.raises(ValueError, match="logit_bias"):
            queue(engine, [5], 1, logit_bias=wrong)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_policies_side_by_side_are_as_each_alone(family: str) -> None:
    """All of them in one pool, with room for running scores."""
    engine = start("full", family, slot_scores=True, prefill_chunk=16, step_tokens=60)
    requests = {
        name: queue(engine, random_prompt(number, 30 + number), 20, policy_named(name))
        for number, name in enumerate(NAMES)
    }
    finish(engine)
    for number, name in enumerate(NAMES):
        request = requests[name]
        assert request.output == alone(name, family, number, 30 + number, 20)
    kept = {name: each.kv.kept_share for name, each in requests.items() if each.kv}
    assert kept["full"] >= max(kept.values()) > min(kept.values())


def test_a_policy_that_needs_scores_is_refused_by_a_pool_without() -> None:
    engine = start("full")
    with pytest.raises(ValueError, match="'h2o' keeps a running score.*slot_scores=True"):
        queue(engine, [5, 6], 2, make_policy("h2o", 0.5))
    engine = start("h2o")
    finish_one = queue(engine, random_prompt(1, 20), 14, policy_named("full"))
    finish(engine)
    assert finish_one.output == plain(1, 20)


def test_a_policy_the_depth_cannot_meet_is_refused() -> None:
    engine = start("full")
    with pytest.raises(ValueError, match="keep=0.1 cannot be reached"):
        queue(engine, [5, 6], 2, make_policy("pyramidinfer", 0.1))
