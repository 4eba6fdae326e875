"""Thoughts apart from answers: tags in prompts and streams, effort, forms and calls behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pyramidinfer.engine.chat_template import ChatTemplate
from pyramidinfer.engine.grammar import Grammars
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import Message
from pyramidinfer.server.thinking import TAGS, Thinking, ThinkReader
from pyramidinfer.types import StructuredOutputsParams
from tests.server.live import Live, byte_tokenizer, serving, tiny_llm
from tests.server.test_tools import PLAIN, TOOL, fits

#: As in Qwen 3: thoughts of earlier turns are left out, and none come where they are switched off.
QWEN3 = (
    "{% set last = messages | length - 1 %}{% for m in messages %}<s>{{ m.role }}{{ '\\n' }}"
    "{% if m.reasoning_content and loop.index0 > last - 2 %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}"
    "<s>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>"
    "\n\n{% endif %}{% endif %}"
)
#: As in DeepSeek R1: every answer begins behind the opening tag.
R1 = (
    "{% for m in messages %}<s>{{ m.role }}{{ '\\n' }}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}"
)
OSS = PLAIN.replace("<s>assistant", "{{ reasoning_effort }}<s>assistant")
SCRIPT = "<think>\nSo a < b\n and c.\n</think>\n\nIt is </think> 5."
THOUGHT, SAID = "So a < b\n and c.", "It is </think> 5."
USER = {"role": "user", "content": "Hi"}


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "opened", "thought", "said"),
    [
        (SCRIPT, False, THOUGHT, SAID),
        (SCRIPT, True, THOUGHT, SAID),
        (SCRIPT.removeprefix("<think>"), True, THOUGHT, SAID),
        (" \n" + SCRIPT, False, THOUGHT, SAID),
        ("Just 5 <think> x </think>", False, "", "Just 5 <think> x </think>"),
        (" <thin", False, "", " <thin"),
        ("<think>\n\n</think>\n\n5", False, "", "5"),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("cut \n", True, "cut", ""),
        ("", False, "", ""),
    ],
)
def test_thoughts_are_found_however_they_come(
    text: str, opened: bool, thought: str, said: str, size: int
) -> None:
    reader = ThinkReader(TAGS[0], opened)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    found = [reader.feed(part) for part in parts] + [reader.feed("", last=True)]
    assert "".join(a for a, _ in found) == thought and "".join(b for _, b in found) == said
    whole = ThinkReader(TAGS[0], opened).feed(text, last=True)
    assert whole == (thought, said)


def thinking(source: str) -> Thinking:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return Thinking(tokenizer, ChatTemplate(tokenizer))


def test_tags_are_the_templates_or_the_vocabularys() -> None:
    assert thinking(PLAIN).tags is None and thinking(QWEN3).tags == thinking(R1).tags == TAGS[0]
    marked = thinking(PLAIN)
    marked.tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)
    assert marked.tags == TAGS[1]


def test_effort_is_what_the_template_reads() -> None:
    assert thinking(OSS).options("low") == {"reasoning_effort": "low"}
    assert thinking(QWEN3).options("none") == {"enable_thinking": False}
    assert thinking(QWEN3).options("high") == {"enable_thinking": True}
    with pytest.raises(ValueError, match="no effect"):
        thinking(R1).options("low")


@pytest.mark.parametrize(
    ("source", "kept", "gone"),
    [
        (QWEN3, "<s>assistant\n<think>\nlater\n</think>\n\nB</s>", "earlier"),
        (R1, "<s>assistant\n\n\nB</s>", "later"),
    ],
)
def test_earlier_thoughts_go_where_the_template_wants_them(
    source: str, kept: str, gone: str
) -> None:
    turns: list[Any] = [
        USER,
        {"role": "assistant", "content": "A", "reasoning_content": "earlier"},
        USER,
        {"role": "assistant", "content": "B", "reasoning_content": "later"},
        USER,
    ]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    prompts = Prompts(tokenizer, len(tokenizer))
    shown = prompts.decode(prompts.chat([Message(**turn) for turn in turns]))
    assert kept in shown and gone not in shown
    tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match=r"messages\[1\].reasoning_content: .* no place"):
        Prompts(tokenizer, len(tokenizer)).chat([Message(**turn) for turn in turns])
    with pytest.raises(ValueError, match="an assistant's"):
        Message(role="user", content="x", reasoning_content="y")


# --- forms ----------------------------------------------------------------------------------------

FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"json": {"const": 5}}, "5", "6"),
    ({"json_object": True}, "{}", "[]"),
    ({"regex": "[a-c]+"}, "abc", "d"),
    ({"choice": ["yes.", "no"]}, "yes.", "yesx"),
    ({"grammar": 'start: "a" b\nb: "b"'}, "ab", "a"),
    ({"grammar": 'root ::= "a" "b"'}, "ab", "a"),
]


@pytest.mark.parametrize("marked", [False, True])
def test_a_form_begins_behind_the_thoughts(marked: bool) -> None:
    tokenizer = byte_tokenizer()
    if marked:
        tokenizer.add_tokens(["<think>", "</think>"])
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    for options, good, bad in FORMS:
        for begin in ("<think>", ""):
            form = StructuredOutputsParams(**options, think=(begin, "</think>"))

            def follows(text: str, form: StructuredOutputsParams = form) -> bool:
                matcher = grammars.constraint(form).matcher
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                return matcher.validate_tokens(tokens) == len(tokens) and (
                    matcher.consume_tokens(tokens) and bool(matcher.is_accepting())
                )

            assert follows(f"{begin}\nso {bad}\n</think>\n\n{good}"), options
            assert follows(f"{begin}</think>{good}"), options
            assert not follows(f"{begin}\nso\n</think>\n\n{bad}"), options
            assert not follows(f"{begin}\nso {good}"), options
            assert follows(good) == bool(begin), options
    with pytest.raises(ValueError, match="two tags"):
        StructuredOutputsParams(regex="a", think=("<think>", ""))
    assert fits('start: "a"', tokenizer, "a")


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    llm = tiny_llm(kv_memory="16MiB")
    llm.tokenizer.chat_template = QWEN3
    with serving(llm, model_name="tiny") as live:
        yield live


@pytest.fixture
def scripted(served: Live, monkeypatch: pytest.MonkeyPatch) -> Live:
    """The model writes the script."""

    def form(body: Any, prompt: Any) -> StructuredOutputsParams:
        return StructuredOutputsParams(choice=[script(body)])

    monkeypatch.setattr(served.service.jobs.forms, "form", form)
    return served


def script(body: Any) -> str:
    call = '<tool_call>\n{"name": "look", "arguments": {"room": "5", "on": true}}\n</tool_call>'
    return SCRIPT + (f"\n{call}" if body.tools else "")


@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["", "tools"])
def test_a_stream_tells_thoughts_as_the_whole_answer_does(scripted: Live, tools: Any) -> None:
    ask: Any = {"model": "tiny", "messages": [USER], "tools": tools, "max_tokens": 300}
    with scripted.openai() as client:
        answer: Any = client.chat.completions.create(**ask)
        usage = {"include_usage": True}
        chunks: Any = list(client.chat.completions.create(stream=True, stream_options=usage, **ask))
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, SAID)
    assert bool(message.tool_calls) == bool(tools)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = [getattr(delta, "reasoning_content", "") or "" for delta in deltas]
    said = [delta.content or "" for delta in deltas]
    assert "".join(thought) == THOUGHT and "".join(said) == SAID
    assert not any(a and b for a, b in zip(thought, said, strict=True))
    assert sum(bool(each) for each in thought) > 1  # it came in parts
    tokens = scripted.service.llm.tokenizer(script_of(tools))["input_ids"]
    for told in (answer.usage, chunks[-1].usage):
        count = told.completion_tokens_details.reasoning_tokens
        assert 0 < count < len(tokens)
        decoded = scripted.service.prompts.decode(tokens[:count])
        assert "</think>" in decoded and "5" not in decoded


def script_of(tools: Any) -> str:
    class Body:
        pass

    body: Any = Body()
    body.tools = tools
    return script(body)


def test_a_response_has_thoughts_as_an_item(scripted: Live) -> None:
    """They go back as an item, and come before what was said."""
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    ask: Any = {"model": "tiny", "input": "Hi", "tools": [tool], "max_output_tokens": 300}
    with scripted.openai() as client:
        events: Any = list(client.responses.create(stream=True, **ask))
        answer: Any = events[-1].response
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
        reasoning, _, call = answer.output
        assert reasoning.content[0].text == THOUGHT and answer.output_text == SAID
        assert json.loads(call.arguments) == {"room": "5", "on": True}
        told = [event for event in events if event.type.startswith("response.reasoning_text")]
        assert "".join(event.delta for event in told[:-1]) == told[-1].text == THOUGHT
        assert answer.usage.output_tokens_details.reasoning_tokens > 0
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "dark"}
        further = [ask.pop("input"), *[item.to_dict() for item in answer.output], output]
        further[0] = {"role": "user", "content": further[0]}
        sent = client.responses.create(input=further, **ask)
        kept = client.responses.create(input=[output], previous_response_id=answer.id, **ask)
    assert sent.usage and kept.usage and sent.usage.input_tokens == kept.usage.input_tokens


def test_a_schema_holds_for_what_follows_the_thoughts(served: Live) -> None:
    """A random model thinks on until it is cut off, or made to come to an end."""
    only = {"type": "object", "required": ["x"], "additionalProperties": False}
    schema = {**only, "properties": {"x": {"const": 1}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ask: Any = {"model": "tiny", "messages": [USER], "response_format": form, "temperature": 0}
    first = served.service.llm.tokenizer.convert_tokens_to_ids
    with served.openai() as client:
        toward = {"logit_bias": {str(first("<")): 100}}
        cut: Any = client.chat.completions.create(max_tokens=40, **toward, **ask)
        assert cut.choices[0].finish_reason == "length"
        assert cut.choices[0].message.reasoning_content and not cut.choices[0].message.content
        assert cut.usage.completion_tokens_details.reasoning_tokens == 40
        straight: Any = client.chat.completions.create(
            max_tokens=100, reasoning_effort="none", **ask
        )
    message = straight.choices[0].message
    assert json.loads(message.content) == {"x": 1}
    assert not hasattr(message, "reasoning_content")
    assert straight.usage.completion_tokens_details.reasoning_tokens == 0


def test_effort_over_http(served: Live) -> None:
    ask: Any = {"model": "tiny", "messages": [USER], "max_tokens": 1, "reasoning_effort": "none"}
    with served.openai() as client:
        more = client.chat.completions.create(**ask).usage
        plain = client.chat.completions.create(**ask | {"reasoning_effort": "high"}).usage
        assert more and plain and more.prompt_tokens > plain.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="both set 'enable_thinking'") as caught:
            extra = {"chat_template_kwargs": {"enable_thinking": True}}
            client.chat.completions.create(**ask, extra_body=extra)
        assert caught.value.param == "reasoning_effort"


def test_a_model_that_does_not_think(live: Live) -> None:
    answer = live.chat("Hi", reasoning_effort="low")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "reasoning_effort"
    assert "completion_tokens_details" not in live.chat("Hi").json()["usage"]
