"""StreamingLLM: text without end on a model with few positions, by places in the cache."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cache import Copier
from pyramidinfer.models.batch import Batch, Sequence
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.policies import Full, StreamingLLM
from pyramidinfer.types import Logprob
from tests.policies.judge import Judge
from tests.policies.judge_model import exact_llama
from tests.tiny import LONGROPE, VOCAB, of_layers, random_prompt, tiny_model

POSITIONS = 64
ROTARY = sorted(name for name, family in FAMILIES.items() if family.rotary)


@cache
def model() -> Any:
    return exact_llama(max_position_embeddings=POSITIONS)


def streaming(on: Any = None, **options: Any) -> LLM:
    options = options or {"sinks": 4, "window": 16}
    return LLM(
        model() if on is None else on,
        policy=StreamingLLM(**options),
        kv_memory="4MiB",
        page_size=4,
    )


def params(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, ignore_eos=True, logprobs=VOCAB)


def finish(llm: LLM, request: Any) -> Any:
    while request.finish_reason is None:
        llm.engine.step()
    return request


def logprobs(found: list[Logprob]) -> Tensor:
    """``[tokens, vocab]``"""
    rows = [[entry.top[token] for token in range(VOCAB)] for entry in found]
    return torch.tensor(rows, dtype=torch.float64)


def judged(judge: Judge, taken: list[int], output: list[int]) -> Tensor:
    """The judge's log-probabilities ``[tokens, vocab]`` after ``taken`` and on through
    ``output``, whose last token is not fed."""
    logits = [judge.read(taken)]
    logits += [judge.decode(token) for token in output[:-1]]
    return torch.stack(logits).log_softmax(-1)


def same(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def positions(llm: LLM, request: Any) -> list[list[list[int]]]:
    pool, table = llm.engine.pool, request.table
    return [pool.positions(table, layer).sort(1).values.tolist() for layer in range(pool.layers)]


def feed(llm: LLM, sequence: Sequence, tokens: list[int]) -> Tensor:
    """Logits ``[tokens, vocab]`` of a sequence that decodes these tokens."""
    runner, pool, logits = llm.engine.runner, llm.engine.pool, []
    for token in tokens:
        stepped = runner.forward(pool, Batch([sequence], torch.tensor([token]), []))
        assert stepped.decoding is not None
        runner.commit(pool, sequence, stepped.decoding, 0)
        logits.append(stepped.logits[0])
    return torch.stack(logits)


# --- beyond the model's positions ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "new", "protect", "options"),
    [
        (30, 200, (), {"keep": 0.66}),
        (30, 85, (7, 8, 20), {"keep": 0.66}),
        (30, 40, (), {"sinks": 0, "window": 20}),
        (63, 30, (), {"sinks": 2, "window": 50}),
    ],
)
def test_generation_passes_the_models_last_position(
    length: int, new: int, protect: Items[int], options: dict[str, Any]
) -> None:
    """Every step's log-probabilities are those of keys rotated to their place in the cache."""
    llm = streaming(**options)
    spans = [(each, each + 1) for each in protect]
    request = finish(
        llm, llm.engine.add(random_prompt(1, length), params(new), hold=True, protect=spans)
    )
    assert len(request.output) == new > POSITIONS - length
    judge = Judge(model(), "streaming_llm", protect=protect, **options)
    expected = judged(judge, request.prompt, request.output)
    found = logprobs(request.logprobs)
    for step in range(0, new, 20):
        same(found[step], expected[step])
    same(found, expected)
    assert positions(llm, request) == judge.positions()
    assert all(set(protect) <= set(head) for layer in judge.positions() for head in layer)
    assert request.kv.peak_bytes <= request.cost.bytes, "the reservation is kept"
    llm.engine.release(request)
    llm.engine.check()


@pytest.mark.parametrize("protect", [(), (5, 6, 20)])
def test_turns_pass_the_models_last_position(protect: Items[int]) -> None:
    """Text is taken in at places in the cache, too."""
    llm = streaming()
    judge = Judge(model(), "streaming_llm", protect=protect, sinks=4, window=16)
    spans = [(each, each + 1) for each in protect]
    request: Any = None
    for seed, length in enumerate((40, 30, 30)):
        more = random_prompt(seed, length)
        if request is None:
            request, taken = llm.engine.add(more, params(20), hold=True, protect=spans), more
        else:
            taken = request.output[-1:] + more
            request = llm.engine.extend(request, more, params(20), hold=True)
        finish(llm, request)
        same(logprobs(request.logprobs), judged(judge, taken, request.output))
        assert positions(llm, request) == judge.positions()
    assert judge.seen > 2 * POSITIONS
    llm.engine.release(request)
    llm.engine.check()


@pytest.mark.parametrize("family", ROTARY)
def test_few_positions_are_as_good_as_many(family: str) -> None:
    """Every rotary family: with 64 positions or 512, the same log-probabilities (float32 rotary
    tables), though in one of them all keys were rotated back on the way."""
    changes: dict[str, Any] = {}
    if family == "phi3":  # the same regime and scaling in both
        rope = {**LONGROPE, "original_max_position_embeddings": 16, "attention_factor": 1.2}
        changes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    found, offsets = [], []
    for most in (POSITIONS, 512):
        llm = streaming(tiny_model(family, torch.float64, max_position_embeddings=most, **changes))
        request = finish(llm, llm.engine.add(random_prompt(1, 45), params(30), hold=True))
        found.append(logprobs(request.logprobs))
        offsets.append(request.offset)
        llm.engine.release(request)
        llm.engine.check()
    assert offsets[0] > offsets[1] == 0
    same(found[0], found[1], atol=1e-4)


# --- turning keys --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("family", ROTARY)
def test_turned_keys_are_keys_rotated_further(family: str, is_long: bool) -> None:
    """A prompt of one token over and over has one key per layer, seen at every position."""
    on = tiny_model(family, torch.float64)
    llm = LLM(on, policy=Full(), kv_memory="4MiB", page_size=4)
    prompt = [5] * 60
    request = finish(llm, llm.engine.add(prompt, params(20 if is_long else 1), hold=True))
    runner, pool = llm.engine.runner, llm.engine.pool
    assert request.is_long == (is_long and family == "phi3")
    assert runner.streaming.layers, "some layer has rotary positions"
    for layer in range(pool.layers):
        order = pool.positions(request.table, layer)[0].argsort()
        order = order[pool.positions(request.table, layer)[0][order] < len(prompt)]
        keys = pool.keys(request.table, layer)[:, order]
        if not len(order):
            continue
        if layer not in runner.streaming.layers:
            assert family == "smollm3" and on.config.no_rope_layers[layer] == 0
            same(keys, keys[:, :1].expand_as(keys), atol=1e-4)
            continue
        assert float((keys[:, 1:] - keys[:, :-1]).abs().max()) > 0.1, "positions matter here"
        for by in (1, 5, len(order) - 1):
            if by < len(order):
                steps = torch.full((len(order) - by,), by)
                on_and_on = runner.streaming.rotate(keys[:, :-by], steps, layer, request)
                same(on_and_on, keys[:, by:], atol=1e-4)
                same(
                    runner.streaming.rotate(keys[:, by:], -steps, layer, request),
                    keys[:, :-by],
                    atol=1e-4,
                )
    llm.engine.release(request)


def test_layers_without_rotary_positions_are_left_alone() -> None:
    """SmolLM3: sinks are rotated in rotary layers; the other layers' keys stay bit for bit."""
    llm = streaming(tiny_model("smollm3", max_position_embeddings=POSITIONS))
    request = finish(llm, llm.engine.add(random_prompt(1, 30), params(3), hold=True))
    pool = llm.engine.pool
    sinks = torch.arange(4)
    before = [pool.keys_at(request.table, layer, sinks) for layer in range(4)]
    feed(llm, request, random_prompt(2, 80))
    assert request.offset > 0
    for layer, rotates in enumerate(llm.engine.runner.config.no_rope_layers):
        after = pool.keys_at(request.table, layer, sinks)
        assert torch.equal(before[layer], after) != bool(rotates)
    llm.engine.release(request)
    llm.engine.check()


# --- what else is done to a request --------------------------------------------------------------


@pytest.mark.parametrize("new", [20, 60])
def test_a_copy_goes_on_like_the_original(new: int) -> None:
    """Export and import, and a fork: the same logits as from the request left alone."""
    llm = streaming()
    pool = llm.engine.pool
    request = finish(llm, llm.engine.add(random_prompt(1, 30), params(new), hold=True))
    tokens = random_prompt(2, 50)
    exported = Copier(pool).export(request.table)
    fork, back = Sequence(policy=request.policy), Sequence(policy=request.policy)
    fork.take(pool.fork(request.table), request)
    expected = feed(llm, request, tokens)
    llm.engine.release(request)
    same(feed(llm, fork, tokens), expected, atol=1e-12)
    pool.release(fork.table)
    back.take(Copier(pool).import_(exported), fork)
    same(feed(llm, back, tokens), expected, atol=1e-12)
    pool.release(back.table)
    llm.engine.check()


@pytest.mark.parametrize(
    ("new", "back", "protect"),
    [(20, 3, ()), (60, 12, (7, 8, 20)), (20, 25, ()), (60, 25, (7, 8, 20)), (60, 62, ())],
)
def test_truncated_request_goes_on_like_the_judge(new: int, back: int, protect: Items[int]) -> None:
    """Tokens are taken back out of the window and, further, beyond all that the window holds."""
    llm = streaming()
    spans = [(each, each + 1) for each in protect]
    request = llm.engine.add(random_prompt(1, 30), params(new), hold=True, protect=spans)
    finish(llm, request)
    judge = Judge(model(), "streaming_llm", protect=protect, sinks=4, window=16)
    judged(judge, request.prompt, request.output)
    left = judge.seen - back
    llm.engine.truncate(request, left)
    judge.truncate(left)
    more = random_prompt(2, 6)
    turn = finish(llm, llm.engine.extend(request, more, params(12), hold=True))
    same(logprobs(turn.logprobs), judged(judge, more, turn.output))
    assert positions(llm, turn) == judge.positions()
    llm.engine.release(turn)
    llm.engine.check()


def test_requests_of_different_lengths_in_one_batch() -> None:
    """Each has its own offset; log-probabilities are those of the request alone."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate((50, 30, 61))]
    outs = streaming().generate(prompts, params(45))
    for prompt, out in zip(prompts, outs, strict=True):
        alone = streaming().generate([prompt], params(45))[0]
        assert out.token_ids == alone.token_ids
        same(logprobs(out.logprobs or []), logprobs(alone.logprobs or []), atol=1e-9)
        assert out.kv.kept_len == alone.kv.kept_len


# --- where it ends -------------------------------------------------------------------------------


def test_learned_positions_end_the_text() -> None:
    """OPT cannot stream: a request ends at the model's last position."""
    llm = streaming(tiny_model("opt", max_position_embeddings=POSITIONS))
    prompt = random_prompt(1, 30)
    out = llm.generate([prompt], params(200))[0]
    assert (len(out.token_ids), out.finish_reason) == (POSITIONS - len(prompt), "length")
    with pytest.raises(ValueError, match=f"this model has {POSITIONS} positions"):
        llm.generate([random_prompt(1, POSITIONS)], params(1))


def test_more_text_at_once_than_positions_is_refused() -> None:
    """In a prompt, and in a further turn on top of what the cache holds."""
    llm = streaming()
    longest = POSITIONS - 1
    with pytest.raises(ValueError, match=rf"{POSITIONS} tokens.*at most {longest} tokens"):
        llm.generate([random_prompt(1, POSITIONS)], params(1))
    request = finish(llm, llm.engine.add(random_prompt(1, longest), params(9), hold=True))
    room = POSITIONS - 20 - 1
    with pytest.raises(ValueError, match=f"at most {room} tokens can be prefilled at a time"):
        llm.engine.extend(request, random_prompt(2, room), params(1))  # and its last answer
    turn = finish(llm, llm.engine.extend(request, random_prompt(2, room - 1), params(9), hold=True))
    assert of_layers(turn.kv.kept_len) == [20] * 4
    llm.engine.release(turn)
    llm.engine.check()
