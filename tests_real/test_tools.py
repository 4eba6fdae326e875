"""An agent's loop with a real model and OpenAI's client: a forced call, its result, an answer."""

from __future__ import annotations

import json

import pytest
from tests.server.live import serving

from pyramidinfer import LLM

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two whole numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


NAME = "smollm2"  # the other one has no chat template


@pytest.fixture(scope="module")
def live():
    with serving(LLM(NAME, kv_memory="256MiB")) as live:
        yield live


def test_an_agent_adds_over_responses(live) -> None:
    """The last answer's id and the call's result are all that the next turn sends."""
    tool = {"type": "function", **TOOL["function"], "strict": True}
    ask = {"model": NAME, "tools": [tool], "max_output_tokens": 80, "temperature": 0}
    text = "What is 12 plus 30? Use the tool."
    with live.openai() as client:
        with client.responses.stream(input=text, tool_choice="required", **ask) as stream:
            first = stream.get_final_response()
        calls = first.output
        assert calls and all((call.type, call.name) == ("function_call", "add") for call in calls)
        numbers = [json.loads(call.arguments) for call in calls]
        results = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": str(a["a"] + a["b"]),
            }
            for call, a in zip(calls, numbers, strict=True)
        ]
        answer = client.responses.create(
            input=results, previous_response_id=first.id, tool_choice="none", **ask
        )
    assert answer.output_text and answer.output[0].type == "message"
    assert answer.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_an_agent_adds(live) -> None:
    name = NAME
    with live.openai() as client:
        messages = [{"role": "user", "content": "What is 12 plus 30? Use the tool."}]
        asked = {"model": name, "tools": [TOOL], "max_tokens": 80, "temperature": 0}
        told = client.chat.completions.create(messages=messages, tool_choice="required", **asked)
        choice = told.choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        messages.append(choice.message.model_dump(exclude_none=True))
        for call in choice.message.tool_calls:
            numbers = json.loads(call.function.arguments)
            assert call.function.name == "add" and set(numbers) == {"a", "b"}
            result = str(numbers["a"] + numbers["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answer = client.chat.completions.create(messages=messages, tool_choice="none", **asked)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
        parts = client.chat.completions.create(
            messages=messages[:1], tool_choice="required", stream=True, **asked
        )
        pieces = [each.choices[0].delta for each in parts if each.choices]
        calls = [call for piece in pieces for call in piece.tool_calls or []]
        assert calls[0].function.name == "add"
        written = "".join(call.function.arguments or "" for call in calls if call.index == 0)
        first = choice.message.tool_calls[0].function.arguments
        assert json.loads(written) == json.loads(first)
