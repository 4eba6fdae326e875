"""Errors that clients act on, and input that is legal though odd."""

from __future__ import annotations

import re

import openai
import pytest

from tests.server.live import Live, serving, tiny_llm
from tests.server.test_limits import error_of
from tests.server.test_openai_client import chat, complete


@pytest.mark.parametrize("policy", ["pyramid", "full", "streaming_llm"])
def test_too_long_a_text_has_the_code_that_clients_know(client: openai.OpenAI, policy: str) -> None:
    """Whether or not ``max_tokens`` is given, so that they can shorten the text and ask again."""
    extra = {"extra_body": {"compression": {"policy": policy}}}
    begins = r"This model's maximum context length is 4096 tokens\. However, "
    for words, max_tokens, message in (
        (4200, None, ""),
        (4200, 5, ""),
        (1300, 2900, r"you requested 42\d\d tokens \(13\d\d in"),
    ):
        if policy == "streaming_llm" and words < 4096:
            continue  # its generation has no end
        options = {**extra, "max_tokens": max_tokens or openai.omit}
        with pytest.raises(openai.BadRequestError, match=begins + message) as error:
            complete(client, "baker " * words, **options)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError, match=begins + message) as error:
            chat(client, "baker " * words, **options)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


def test_so_has_one_that_memory_cannot_hold() -> None:
    """Once it is shorter, it can."""
    with serving(tiny_llm(kv_memory="300KiB"), default_max_tokens=8) as live:
        for ask, param in ((live.complete, "prompt"), (live.chat, "messages")):
            error = error_of(ask("Who ?" * 300))
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert re.match(
                r"This model's maximum context length is \d+ tokens\. However, a prompt"
                r" of \d+ tokens .* kv_memory",
                error["message"],
            )
            assert ask("Who ?").status_code == 200


@pytest.mark.parametrize("options", [{"top_p": 0}, {"temperature": 1e-8}, {"temperature": 1e-5}])
def test_nearly_greedy_is_greedy(client: openai.OpenAI, options: dict[str, float]) -> None:
    wanted = complete(client, max_tokens=12).choices[0].text
    found = complete(client, max_tokens=12, **{"temperature": 1, **options})
    assert found.choices[0].text == wanted


def test_a_blank_prompt_is_one(tiny: Live) -> None:
    for text in (" ", "\n"):
        assert tiny.complete(text).json()["usage"]["prompt_tokens"] == 1
        assert tiny.chat(text).json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("content", [None, []])
@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
def test_a_message_says_something(live: Live, role: str, content: object) -> None:
    """Only an assistant may have said nothing."""
    body = {"messages": [{"role": role, "content": content}, {"role": "user", "content": "a"}]}
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert f"a message of the role {role} needs content" in answer.json()["error"]["message"]
