"""OpenAI's own client, against the live server."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.server.live import END, MODEL, STORY, Live, beside, serving, until
from tests.tiny import tiny_model

LONG = STORY * 30  # long enough for compression to show


def texts(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Of a stream: the text of every choice, why it ended, and the last usage."""
    parts: dict[int, str] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            parts[choice.index] = parts.get(choice.index, "") + (text or "")
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    return parts, ends, usage


def complete(client: openai.OpenAI, prompt: Any = STORY, **options: Any) -> Any:
    options = {"max_tokens": 8, "temperature": 0, **options}
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def chat(client: openai.OpenAI, content: str = STORY, model: str = MODEL, **options: Any) -> Any:
    options = {"max_tokens": 8, "temperature": 0, **options}
    turns: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=turns, **options)


def check_usage(usage: Any, prompt: int, new: int) -> None:
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, new)
    assert usage.total_tokens == prompt + new


# --- the two endpoints ----------------------------------------------------------------------------


def test_models(client: openai.OpenAI, live: Live) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == (MODEL, "pyramidinfer", "model")
    extra: Any = model.model_extra
    assert (extra["max_model_len"], extra["layers"]) == (4096, 12)
    compression = extra["compression"]
    assert (compression["policy"], compression["keep"]) == ("pyramid", 0.45)
    assert compression["rule"] == live.service.llm.policy.rule
    assert compression["rule"].startswith("what each head needs, as measured on")
    assert {"pyramid", "full", "snapkv", "streaming_llm"} <= set(compression["policies"])
    assert compression["rules"]["pyramid"] == compression["rule"]
    assert compression["rules"].keys() == compression["min_context"].keys()
    assert set(compression["policies"]) == set(compression["rules"]) and all(
        compression["rules"].values()
    )
    assert compression["min_context"]["pyramid"] == 64
    assert [len(row) for row in extra["heads"]] == [2] * 12
    assert "h2o" not in compression["policies"]  # this pool has no room for its scores
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist.*'demo-model'"):
        client.models.retrieve("gpt-5")


def test_chat(client: openai.OpenAI, live: Live) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content.strip()
    assert choice.finish_reason == "length"
    prompt = live.service.llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": STORY}], add_generation_prompt=True, return_dict=False
    )
    check_usage(answer.usage, len(prompt), 8)
    parts = chat(client, max_tokens=None, max_completion_tokens=3)
    check_usage(parts.usage, len(prompt), 3)
    assert choice.message.content.startswith(parts.choices[0].message.content)


def test_completion(client: openai.OpenAI, live: Live) -> None:
    answer = complete(client)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    ids = live.service.llm.tokenizer(STORY)["input_ids"]
    check_usage(answer.usage, len(ids), 8)
    by_ids = complete(client, ids)
    assert by_ids.choices[0].text == choice.text and by_ids.usage == answer.usage


@pytest.mark.parametrize("ask", [chat, complete])
def test_streaming_is_the_whole_text(client: openai.OpenAI, ask: Any) -> None:
    options = {"max_tokens": 30, "n": 3, "temperature": 1, "seed": 5}
    whole = ask(client, **options)
    got = ask(client, **options, stream=True, stream_options={"include_usage": True})
    parts, ends, usage = texts(got)
    for choice in whole.choices:
        text = choice.message.content if ask is chat else choice.text
        assert parts[choice.index] == text
        assert ends[choice.index] == choice.finish_reason
    assert len(ends) == 3
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_in_a_stream_comes_last_or_not_at_all(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chat(client, stream=True))
    running = chat(
        client,
        stream=True,
        stream_options={
            "include_usage": True,
            "continuous_usage_stats": True,
        },
    )
    counts = [chunk.usage.completion_tokens for chunk in running]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 8


def test_kv_in_a_stream(client: openai.OpenAI) -> None:
    got = complete(client, LONG, stream=True, stream_options={"include_kv": True}, max_tokens=5)
    told = [chunk.model_extra["kv"] for chunk in got]
    seen = [each["seen"] for each in told]
    assert seen == list(range(seen[0], seen[0] + 5))
    for each in told:
        assert len(each["kept"]) == 12 and {len(heads) for heads in each["kept"]} == {2}
        assert 0 < max(map(max, each["kept"])) <= each["seen"]
        assert 0 < each["bytes"] < each["full_bytes"]


def test_many_at_once(live: Live) -> None:
    """Answers are those of each alone, whoever else asks meanwhile."""
    prompts = [
        f"The {who} walked to the {where} ."
        for who in ("baker", "student", "shepherd")
        for where in ("market", "church", "bridge")
    ]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:

            async def one(prompt: str) -> str:
                whole = client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=20, temperature=0
                )
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=20, temperature=0, stream=True
                )
                text = "".join([chunk.choices[0].text async for chunk in stream])
                assert text == (await whole).choices[0].text
                return text

            return await asyncio.gather(*map(one, prompts))

    found = asyncio.run(ask())
    with live.openai() as client:
        assert found == [complete(client, each, max_tokens=20).choices[0].text for each in prompts]


# --- sampling -------------------------------------------------------------------------------------


def test_n_and_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = complete(client, n=4, seed=seed, temperature=1, max_tokens=20)
        check_usage(answer.usage, answer.usage.prompt_tokens, answer.usage.completion_tokens)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.text for choice in answer.choices]

    first = ask(1)
    assert len(set(first)) == 4
    assert ask(1) == first
    assert ask(2) != first
    assert complete(client, n=2, best_of=2).usage.completion_tokens == 16


def test_stop(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    words = whole.split()
    third = words[2]
    for stop in (third, ["xyzzy", third], [f"{words[2]} {words[3]}"]):
        for ask in (complete, chat):
            base = ask(client, max_tokens=40)
            text = base.choices[0].text if ask is complete else base.choices[0].message.content
            wanted = stop if ask is complete else text.split()[2]
            first = wanted if isinstance(wanted, str) else wanted[-1]
            answer = ask(client, max_tokens=40, stop=wanted)
            got = answer.choices[0].text if ask is complete else answer.choices[0].message.content
            assert got == text[: text.index(first)] and first not in got
            assert answer.choices[0].finish_reason == "stop"
            parts, ends, _ = texts(ask(client, max_tokens=40, stop=wanted, stream=True))
            assert parts == {0: got} and ends == {0: "stop"}


def test_stop_token_ids_and_ignore_eos(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = complete(client, max_tokens=12, extra_body=extra).choices[0].model_extra["token_ids"]
    stop = whole[4]
    answer = complete(client, max_tokens=12, extra_body={**extra, "stop_token_ids": [stop]})
    ids = answer.choices[0].model_extra["token_ids"]
    assert ids == whole[: whole.index(stop) + 1] and answer.choices[0].finish_reason == "stop"
    forced = {str(END): 100}
    ended = complete(client, logit_bias=forced)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)
    for stream in (False, True):
        got = complete(
            client, logit_bias=forced, extra_body={**extra, "ignore_eos": True}, stream=stream
        )
        parts = list(got) if stream else [got]
        ids = [id for part in parts for id in part.choices[0].model_extra["token_ids"]]
        assert ids == [END] * 8 and parts[-1].choices[0].finish_reason == "length"


def test_logit_bias_forces_and_forbids(client: openai.OpenAI, live: Live) -> None:
    tokenizer = live.service.llm.tokenizer
    free = complete(client, extra_body={"return_token_ids": True}).choices[0]
    first = free.model_extra["token_ids"][0]
    wanted = tokenizer.convert_tokens_to_ids("lost")
    forced = complete(client, logit_bias={str(wanted): 100}, temperature=1)
    assert forced.choices[0].text.split() == ["lost"] * 8
    other = complete(client, logit_bias={str(first): -100}, extra_body={"return_token_ids": True})
    assert first not in other.choices[0].model_extra["token_ids"]


def test_penalties(client: openai.OpenAI, live: Live) -> None:
    """A word that is made likely comes less often."""
    word = str(live.service.llm.tokenizer.convert_tokens_to_ids("lost"))

    def repeated(**options: Any) -> int:
        found = 0
        for bias in range(4, 20, 2):
            answer = complete(client, logit_bias={word: bias}, max_tokens=12, **options)
            found += answer.choices[0].text.split().count("lost")
        return found

    free = repeated()
    assert free > 12
    assert repeated(frequency_penalty=2) < repeated(presence_penalty=2) < free
    assert repeated(extra_body={"repetition_penalty": 3.0}) < free
    assert repeated(frequency_penalty=-2) > free


def test_filters_make_it_greedy(client: openai.OpenAI) -> None:
    """Up to ties, which bf16 has."""

    def is_greedy(**options: Any) -> bool:
        found = complete(client, temperature=2, seed=1, logprobs=1, **options).choices[0].logprobs
        return all(
            max(top.values()) == value
            for top, value in zip(found.top_logprobs, found.token_logprobs, strict=True)
        )

    assert not is_greedy()
    assert is_greedy(top_p=1e-6)
    assert is_greedy(extra_body={"top_k": 1})
    assert is_greedy(extra_body={"min_p": 1.0})


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=5)
    found = answer.choices[0].logprobs.content
    assert len(found) == 8
    assert [each.token for each in found] == answer.choices[0].message.content.split()
    for each in found:
        assert len(each.top_logprobs) == 5
        assert bytes(each.bytes).decode() == each.token
        assert each.top_logprobs[0].token == each.token  # greedy
        values = [top.logprob for top in each.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] == each.logprob <= 0
        assert sum(map(math.exp, values)) <= 1.0001
    streamed = [
        each
        for chunk in chat(client, logprobs=True, top_logprobs=5, stream=True)
        for each in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == found
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_completions_logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=3)
    found = answer.choices[0].logprobs
    assert found.tokens == answer.choices[0].text.split()
    assert len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs) == 8
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert len(top) == 3 and max(top.values()) == top[token] == value
    assert complete(client, logprobs=0).choices[0].logprobs.tokens == found.tokens
    assert found.text_offset[:2] == [0, 1 + len(found.tokens[0])]


@pytest.mark.parametrize("prompt", [STORY, "The   old\tbaker", [12, 13, 14]])
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_index_the_text(client: openai.OpenAI, prompt: Any, stream: bool) -> None:
    """Every token is where it is said to be, the prompt's (where it was echoed) too."""
    full = {"compression": {"policy": "full"}}
    options = {"logprobs": 0, "echo": True, "extra_body": full, "stream": stream}
    answer = complete(client, prompt, **options)
    parts = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    text = "".join(part.text for part in parts)
    pairs = [
        pair
        for part in parts
        for pair in zip(part.logprobs.tokens, part.logprobs.text_offset, strict=True)
    ]
    new = pairs[-8:]
    assert all(text[at:].lstrip().startswith(token) for token, at in new)
    assert [at for _, at in pairs] == sorted(at for _, at in pairs)
    if prompt != "The   old\tbaker":  # whose tokens do not say how far apart they were
        words = [pair for pair in pairs if pair[0] != "<bos>"]
        assert all(text[at:].lstrip().startswith(token) for token, at in words)


def test_a_list_of_prompts(client: openai.OpenAI, live: Live) -> None:
    prompts = [STORY, "The old baker", "The storm"]
    alone = [complete(client, each) for each in prompts]
    together = complete(client, prompts)
    assert [each.text for each in together.choices] == [each.choices[0].text for each in alone]
    assert [each.index for each in together.choices] == [0, 1, 2]
    check_usage(together.usage, sum(each.usage.prompt_tokens for each in alone), 24)
    ids = [live.service.llm.tokenizer(each)["input_ids"] for each in prompts]
    assert complete(client, ids).choices == together.choices
    twice = complete(client, prompts, n=2)
    assert [each.text for each in twice.choices] == [
        each.text for each in together.choices for _ in range(2)
    ]


def test_echo(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    answer = complete(client, echo=True)
    assert answer.choices[0].text == STORY + plain
    parts, _, _ = texts(complete(client, echo=True, stream=True))
    assert parts == {0: STORY + plain}
    nothing = complete(client, echo=True, max_tokens=0)
    assert nothing.choices[0].text == STORY
    check_usage(nothing.usage, answer.usage.prompt_tokens, 0)


def test_echoed_logprobs_are_the_models_own(tiny: Live) -> None:
    prompt = tiny.service.llm.tokenizer("A list of words")["input_ids"]
    with torch.no_grad():
        logits = tiny_model("llama", torch.float32, vocab_size=320, max_position_embeddings=2048)(
            torch.tensor([prompt])
        ).logits[0]
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    full = {"compression": {"policy": "full"}}
    with tiny.openai() as client:
        for new in (0, 3):
            answer = client.completions.create(
                model="tiny",
                prompt=prompt,
                echo=True,
                logprobs=2,
                max_tokens=new,
                temperature=0,
                extra_body=full,
            )
            found: Any = answer.choices[0].logprobs
            assert len(found.tokens) == len(prompt) + new
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            given = torch.tensor(found.token_logprobs[1 : len(prompt)])
            assert torch.allclose(given, wanted, atol=1e-4)
            for row, top in zip(logits[:-1], found.top_logprobs[1:], strict=False):
                assert max(top.values()) == pytest.approx(
                    float(row.log_softmax(-1).max()), abs=1e-4
                )
        with pytest.raises(openai.BadRequestError, match="'pyramid' drops prompt tokens"):
            client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=2)


# --- compression ----------------------------------------------------------------------------------


def test_compression_of_a_request(client: openai.OpenAI) -> None:
    def usage(**compression: Any) -> dict[str, Any]:
        compression["reuse"] = False
        got = complete(client, LONG, extra_body={"compression": compression})
        return dict(got.usage.model_extra)

    full, own = usage(policy="full"), usage()
    assert full["kv_tokens_kept"] == full["kv_tokens_full"]
    assert full["prefill_tokens_skipped"] == 0
    assert full["kv_bytes"] == full["kv_bytes_full"]
    assert own["kv_tokens_kept"] < own["kv_tokens_full"] == full["kv_tokens_full"]
    assert own["kv_bytes"] < own["kv_bytes_full"] == full["kv_bytes_full"]
    assert own["prefill_tokens_skipped"] > 0
    kept = [usage(keep=keep)["kv_tokens_kept"] for keep in (0.2, 0.4, 0.8)]
    assert kept == sorted(set(kept)) and kept[0] < own["kv_tokens_kept"] < kept[2]
    for policy in ("snapkv", "streaming_llm", "pyramidinfer", "kvzip"):
        other = usage(policy=policy, keep=0.3)
        again = other.get("prefill_tokens_reread", 0)
        assert (again > 0.9 * other["kv_tokens_full"]) == (policy == "kvzip")
        assert other["kv_tokens_kept"] < 0.5 * other["kv_tokens_full"]
        assert (other["prefill_tokens_skipped"] > 0) == (policy == "pyramidinfer")


# --- errors ---------------------------------------------------------------------------------------


def test_errors_are_the_clients_exceptions(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown parameter 'nonsense'") as wrong:
        complete(client, extra_body={"nonsense": 1})
    assert wrong.value.param == "nonsense" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.completions.create(model="gpt-5", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError, match="/v1/images/generations"):
        client.images.generate(model=MODEL, prompt="x")


def test_the_queue_is_full(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.service.worker, "max_waiting", 1)
    with live.openai() as client, ThreadPoolExecutor() as pool:
        with live.held():
            waits = pool.submit(complete, client)
            until(lambda: live.service.worker.waiting == 1)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="1 requests are waiting") as busy:
                    complete(client, stream=stream)
                assert busy.value.code == "queue_full"
                assert 1 <= int(busy.value.response.headers["Retry-After"]) <= 60
        assert waits.result().choices[0].text == complete(client).choices[0].text


def test_a_key_is_needed(live: Live) -> None:
    with serving(beside(live.service.llm), api_keys=("sesame",)) as locked:
        with locked.openai("wrong") as client, pytest.raises(openai.AuthenticationError):
            complete(client)
        with locked.openai("sesame") as client:
            assert complete(client).choices[0].text.strip()
