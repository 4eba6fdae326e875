"""What messages and chat_template_kwargs become, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import Live, serving, tiny_llm

TEMPLATE = (
    "{% if not enable_thinking | default(true) %}/no_think {% endif %}{% for m in messages %}"
    "{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    llm = tiny_llm()
    llm.tokenizer.chat_template = TEMPLATE
    with serving(llm, model_name="tiny") as live:
        yield live


def ask(live: Live, messages: list[dict[str, Any]], **body: Any) -> Any:
    return live.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 2, **body}
    )


def prompt(live: Live, messages: list[dict[str, Any]], **body: Any) -> str:
    tokens = live.http.post("/tokenize", json={"messages": messages, **body}).json()["tokens"]
    text: str = live.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


USER = {"role": "user", "content": "Hi"}


def test_a_developers_word_is_in_the_prompt(live: Live) -> None:
    developer = [{"role": "developer", "content": "Be kind"}, USER]
    assert prompt(live, developer) == "<system>Be kind</s><user>Hi</s><assistant>"
    counts = [
        ask(live, [{"role": role, "content": "Be kind"}, USER]).json()["usage"]["prompt_tokens"]
        for role in ("developer", "system")
    ]
    assert counts[0] == counts[1] > ask(live, [USER]).json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "tool", "content": "42"}, "messages[1]: "),
        ({"role": "user", "content": "Hi", "name": "Ada"}, "messages[1].name: "),
        ({"role": "user", "content": "Hi", "tool_call_id": "7"}, "messages[1].tool_call_id: "),
        ({"role": "assistant", "content": "", "refusal": "No"}, "messages[1].refusal: "),
    ],
)
def test_what_leaves_no_trace_is_refused(live: Live, message: Any, named: str) -> None:
    answer = ask(live, [USER, message, USER])
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages"
    assert error["message"].startswith(named)
    assert live.http.post("/tokenize", json={"messages": [USER, message]}).status_code == 400


def test_parts_are_one_text(live: Live) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert prompt(live, [{"role": "user", "content": parts}]) == prompt(live, [USER])


def test_options_of_the_template(live: Live) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt(live, [USER], **off) == "/no_think <user>Hi</s><assistant>"
    plain, without = ask(live, [USER]).json(), ask(live, [USER], **off).json()
    assert without["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    answer = ask(live, [USER], chat_template_kwargs={"enable_thoughts": False})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "chat_template_kwargs")
    assert "never reads 'enable_thoughts' (it reads: enable_thinking)" in error["message"]
    assert ask(live, [USER], chat_template_kwargs=7).status_code == 400


def test_the_operators_options_hold_where_a_request_says_nothing(live: Live) -> None:
    options = {"enable_thinking": False}
    with serving(live.service.llm, model_name="tiny", chat_template_kwargs=options) as other:
        assert prompt(other, [USER]).startswith("/no_think")
        on = {"chat_template_kwargs": {"enable_thinking": True}}
        assert prompt(other, [USER], **on).startswith("<user>")
    with (
        pytest.raises(ValueError, match="never reads 'x'"),
        serving(live.service.llm, chat_template_kwargs={"x": 1}),
    ):
        pass


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "add_generation_prompt": False},
        {"prompt": "x", "chat_template_kwargs": {}},
        {"messages": [USER], "add_special_tokens": True},
    ],
)
def test_tokenize_refuses_what_it_would_ignore(live: Live, body: dict[str, Any]) -> None:
    assert live.http.post("/tokenize", json=body).status_code == 400
