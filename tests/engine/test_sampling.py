"""Sampling, stop conditions, log-probabilities and streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from tests.tiny import VOCAB, model_greedy, random_prompt, tiny_model

PROMPT = random_prompt(1, 20)


class Letters:
    """A tokenizer whose tokens are two letters each."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{chr(97 + t % 26)}{chr(97 + t // 26)}" for t in tokens)


def build(**options: Any) -> LLM:
    return LLM(tiny_model("llama"), policy="full", kv_memory="4MiB", **options)


def run(params: SamplingParams, prompt: list[int] = PROMPT, **options: Any) -> Any:
    return build(**options).generate([prompt], params)[0]


def test_a_seed_repeats_and_neighbours_do_not_matter() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=5, ignore_eos=True)
    first = run(params).token_ids
    others = [random_prompt(i, 9) for i in range(3)]
    assert build().generate([*others, PROMPT], params)[-1].token_ids == first
    assert (
        run(SamplingParams(max_tokens=20, temperature=1.5, seed=6, ignore_eos=True)).token_ids
        != first
    )


def test_sampled_shares_follow_the_softmax() -> None:
    """4000 first tokens at temperature 2, each of its own seed, against the model's own
    distribution."""
    model = tiny_model("llama")
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1] / 2, -1)
    llm, asked = LLM(model, policy="full", kv_memory="64MiB", max_requests=500), []
    for seed in range(0, 4000, 500):  # a sample's seed is the request's plus its number
        params = SamplingParams(max_tokens=1, temperature=2.0, seed=seed)
        asked.append(llm.engine.make(PROMPT, params, samples=500))
    llm.engine.run(asked)
    tokens = [each.output[0] for request in asked for each in (request, *request.samples)]
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    assert counts.sum() == 4000
    assert (counts / 4000 - expected).abs().sum() < 0.25
    for token in expected.topk(3).indices.tolist():
        assert counts[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_p": 0},
        {"min_p": 1.0},
        {"temperature": 1e-5},
        {"temperature": 1e-8},
        {"temperature": 1e-40},
        {"temperature": 1e-300},
    ],
    ids=str,
)
def test_the_tightest_filter_is_greedy(options: dict[str, Any]) -> None:
    greedy = run(SamplingParams(max_tokens=12, ignore_eos=True)).token_ids
    params = SamplingParams(max_tokens=12, ignore_eos=True, **{"temperature": 1.0, **options})
    assert run(params).token_ids == greedy


def test_penalties() -> None:
    """A strong penalty forbids repeats; without one this model repeats itself."""
    plain = run(SamplingParams(max_tokens=60, ignore_eos=True)).token_ids
    assert len(set(plain)) < len(plain)
    for options in ({"presence_penalty": 500.0}, {"frequency_penalty": 500.0}):
        ids = run(SamplingParams(max_tokens=60, ignore_eos=True, **options)).token_ids
        assert len(set(ids)) == len(ids)
    ids = run(SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=1e3)).token_ids
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(PROMPT)  # a repetition penalty counts the prompt too


def test_repetition_penalty_equals_transformers() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT)),
            do_sample=False,
            max_new_tokens=30,
            repetition_penalty=1.3,
        )[0, len(PROMPT) :].tolist()
    mine = LLM(model, policy="full", kv_memory="1MiB").generate(
        [PROMPT], SamplingParams(max_tokens=30, repetition_penalty=1.3)
    )[0]
    assert mine.token_ids == theirs


def test_logprobs_are_the_models_own() -> None:
    model = tiny_model("llama")
    out = run(SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))
    text = PROMPT + out.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, len(PROMPT) - 1 : -1].double()
    expected = torch.log_softmax(logits, -1)
    for step, entry in enumerate(out.logprobs):
        assert entry.token_id == out.token_ids[step]
        assert entry.logprob == pytest.approx(float(expected[step, entry.token_id]), abs=1e-5)
        best = expected[step].topk(3)
        assert list(entry.top) == best.indices.tolist()
        assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    assert run(SamplingParams(max_tokens=5)).logprobs is None


def test_end_of_sequence_and_stop_ids() -> None:
    model = tiny_model("llama")
    greedy = run(SamplingParams(max_tokens=30, ignore_eos=True)).token_ids
    model.generation_config.eos_token_id = [greedy[9]]
    expected = greedy[: greedy.index(greedy[9]) + 1]
    llm = LLM(model, policy="full", kv_memory="1MiB")
    out = llm.generate([PROMPT], SamplingParams(max_tokens=30))[0]
    assert (out.token_ids, out.finish_reason) == (expected, "stop")
    assert out.token_ids == model_greedy(model, PROMPT, 30)
    ignored = llm.generate([PROMPT], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert (ignored.token_ids, ignored.finish_reason) == (greedy, "length")
    stop = run(SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=[greedy[4]]))
    assert stop.token_ids == greedy[: greedy.index(greedy[4]) + 1]


def test_stop_strings_cut_the_text_and_are_never_streamed() -> None:
    llm = LLM(tiny_model("llama"), policy="full", kv_memory="4MiB", tokenizer=Letters())
    whole = llm.generate([PROMPT], SamplingParams(max_tokens=30, ignore_eos=True))[0].text
    stop = whole[13:18]  # begins and ends in the middle of a token
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop=[stop, "not in it"])
    out = llm.generate([PROMPT], params)[0]
    assert out.text == whole[: whole.index(stop)]
    assert out.finish_reason == "stop"
    pieces = list(llm.stream(PROMPT, params))
    assert pieces[-1].text == out.text
    assert pieces[-1].finish_reason == "stop"
    for piece in pieces:
        assert out.text.startswith(piece.text)


def test_stream_is_generate_token_by_token() -> None:
    llm = LLM(tiny_model("llama"), policy="full", kv_memory="4MiB", tokenizer=Letters())
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    whole = llm.generate([PROMPT], params)[0]
    pieces = list(llm.stream(PROMPT, params))
    assert [len(piece.token_ids) for piece in pieces] == list(range(1, 11))
    assert pieces[-1].text == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * 9 + ["length"]


def test_streams_side_by_side_all_end() -> None:
    """A request that another stream's steps finished still gives its answer."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [random_prompt(i, 9 + i) for i in range(3)]
    expected = [out.token_ids for out in build().generate(prompts, params)]
    llm = build()
    first, second, third = (llm.stream(prompt, params) for prompt in prompts)
    next(second)
    next(first)
    assert [list(each)[-1].token_ids for each in (third, first)] == [expected[2], expected[0]]
    llm.generate(prompts[0], params)
    (last,) = list(second)
    assert (last.token_ids, last.finish_reason) == (expected[1], "length")
    assert llm.engine.scheduler.idle


def test_a_stream_nobody_reads_is_not_queued() -> None:
    llm = build()
    stream = llm.stream(PROMPT)
    assert llm.engine.scheduler.idle
    stream.close()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.stream([VOCAB])


def test_leaving_a_stream_frees_its_pages() -> None:
    llm = build()
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.engine.pool.budget_used > 0
    stream.close()
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()


def test_interrupt_returns_what_is_done_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build()
    step, calls = llm.engine.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    many = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=50, ignore_eos=True)]
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate([PROMPT, random_prompt(2, 5)], many)
    short, long = caught.value.outputs  # type: ignore[attr-defined]
    assert (len(short.token_ids), short.finish_reason) == (3, "length")
    assert (len(long.token_ids), long.finish_reason) == (7, "abort")
    assert llm.engine.pool.budget_used == 0
    llm.engine.check()
