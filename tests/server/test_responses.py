"""The Responses API with OpenAI's own client: items, events, conversations that are kept here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from pyramidinfer.server.response_store import ResponseStore, Stored
from tests.server.live import Live, serving, tiny_llm
from tests.server.test_tools import PLAIN

TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
LOOK: Any = {
    "type": "function",
    "name": "look",
    "description": "Looks at a room",
    "parameters": {
        "type": "object",
        "properties": {"room": {"enum": ["4", "5"]}},
        "required": ["room"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Room(BaseModel):
    kind: Literal["room"]
    lit: bool


@pytest.fixture(scope="module")
def keyed() -> Iterator[Live]:
    llm = tiny_llm(kv_memory="16MiB")
    llm.tokenizer.chat_template = PLAIN
    with serving(llm, model_name="tiny", api_keys=("a", "b")) as live:
        yield live


@pytest.fixture(scope="module")
def tools(keyed: Live) -> Iterator[openai.OpenAI]:
    with keyed.openai("a") as client:
        yield client


def once(names: list[str]) -> list[str]:
    """Without what follows another of its kind."""
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


# --- the shipped model ----------------------------------------------------------------------------

FACT = "The archive of Mira Holt is in room 472 . Where is the archive of Mira Holt ?"


def test_an_answer_is_the_chats(live: Live, client: openai.OpenAI) -> None:
    told = client.responses.create(
        model="demo-model", input=FACT, temperature=0, metadata={"a": "b"}, user="me"
    )
    chat = live.chat(FACT, max_tokens=256).json()
    assert told.output_text == chat["choices"][0]["message"]["content"] != ""
    assert (told.status, told.error, told.incomplete_details) == ("completed", None, None)
    assert told.id.startswith("resp_") and told.metadata == {"a": "b"}
    assert told.usage is not None
    usage = told.usage.to_dict()
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    assert usage["kv_bytes"] == chat["usage"]["kv_bytes"] > 0
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_caches_are_for_answers_of_the_same_salt(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        told = client.responses.create(
            model="demo-model",
            input=f"Salted . {FACT * 4}",
            max_output_tokens=1,
            extra_body={"cache_salt": salt, "compression": {"policy": "full"}},
        )
        assert told.usage is not None
        return told.usage.input_tokens_details.cached_tokens

    assert [cached("one") > 0, cached("two") > 0, cached("one") > 0] == [False, False, True]


def test_a_conversation_goes_on_here(live: Live, client: openai.OpenAI) -> None:
    """The next turn finds text and cache of the last one; the same as if all had been sent."""
    first = client.responses.create(model="demo-model", input=FACT, temperature=0)
    ask: Any = {"model": "demo-model", "temperature": 0, "store": False}
    further = client.responses.create(
        input="Where is the archive ?", previous_response_id=first.id, **ask
    )
    assert first.usage and further.usage and further.previous_response_id == first.id
    cached = further.usage.input_tokens_details.cached_tokens
    assert cached == first.usage.total_tokens - 1
    turns: Any = [
        {"role": "user", "content": FACT},
        *[item.to_dict() for item in first.output],
        {"role": "user", "content": "Where is the archive ?"},
    ]
    whole = client.responses.create(input=turns, **ask)
    assert whole.output_text == further.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with pytest.raises(openai.NotFoundError, match=further.id):
        client.responses.retrieve(further.id)  # store: false
    client.responses.delete(first.id)
    for again in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match=first.id):
            again(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="x", previous_response_id=first.id, model="demo-model")
    assert (caught.value.code, caught.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


@pytest.mark.parametrize(("most", "end"), [(256, "completed"), (2, "incomplete")])
def test_events_come_in_openais_order(client: openai.OpenAI, most: int, end: str) -> None:
    ask: Any = {"model": "demo-model", "input": FACT, "temperature": 0, "max_output_tokens": most}
    events = list(client.responses.create(stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert once([event.type for event in events]) == [*TEXT_EVENTS, f"response.{end}"]
    whole: Any = client.responses.create(**ask)
    last: Any = events[-1]
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == last.response.output_text == whole.output_text
    for answer in (last.response, whole):
        assert answer.status == answer.output[0].status == end
        reason = answer.incomplete_details and answer.incomplete_details.reason
        assert reason == (None if end == "completed" else "max_output_tokens")
    added: Any = events[2]
    assert added.item.content == [] and added.item.status == "in_progress"
    assert added.item.id == last.response.output[0].id
    if end == "completed":
        with client.responses.stream(**ask) as stream:
            stream.until_done()
            assert stream.get_final_response().output_text == said


def test_instructions_hold_for_one_answer(live: Live, client: openai.OpenAI) -> None:
    def seen(**more: Any) -> int:
        answer = client.responses.create(
            model="demo-model", input="Hi", max_output_tokens=1, temperature=0, **more
        )
        assert answer.usage
        ids.append(answer.id)
        return answer.usage.input_tokens

    ids: list[str] = []
    plain, told = seen(), seen(instructions="The storm touched the bridge .")
    assert told > plain
    assert seen(previous_response_id=ids[0]) == seen(previous_response_id=ids[1])


def test_log_probabilities(client: openai.OpenAI) -> None:
    ask: Any = {"model": "demo-model", "input": FACT, "temperature": 0, "top_logprobs": 2}
    answer: Any = client.responses.create(include=["message.output_text.logprobs"], **ask)
    (part,) = answer.output[0].content
    assert " ".join(each.token for each in part.logprobs) == part.text
    assert all(len(each.top_logprobs) == 2 for each in part.logprobs)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "missing parameter 'input'", "input"),
        ({"input": "x", "conversation": "c"}, "unknown parameter 'conversation'", "conversation"),
        ({"input": "x", "background": True}, "background", "background"),
        ({"input": "x", "truncation": "auto"}, "truncation", "truncation"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include", "include"),
        ({"input": "x", "text": {"verbosity": "low"}}, "'text.verbosity'", "text"),
        ({"input": "x", "reasoning": {"summary": "auto"}}, "'reasoning.summary'", "reasoning"),
        ({"input": "x", "reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type", "tools"),
        ({"input": "x", "tool_choice": "required"}, "needs tools", None),
        ({"input": [{"type": "image", "url": "x"}]}, "type must be one of 'message'", "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0: type must be one of 'input_text', 'output_text'",
            "input",
        ),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content", "input"),
        ({"input": [5, "x"]}, "input.0", "input"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input.0.content.0", "input"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            "No tool call found for function call output with call_id 'c'",
            "input",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
            "No tool output found for function call c",
            "input",
        ),
        ({"input": "storm " * 5000}, "maximum context length", "input"),
        (
            {"input": "x", "max_output_tokens": 10**6},
            "_tokens: 1000000",
            "max_output_tokens",
        ),
        ({"input": "x", "stream_options": {"include_obfuscation": False}}, "stream=true", None),
        ({"input": "x", "model": "another"}, "does not exist", "model"),
    ],
    ids=str,
)
def test_what_is_refused(live: Live, body: Any, message: str, param: str | None) -> None:
    answer = live.http.post("/v1/responses", json=body)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param, error


def test_an_error_before_and_in_a_stream(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails once it has begun ends with response.failed."""
    from pyramidinfer.engine.worker import Update
    from pyramidinfer.server.replies import Reply

    take, taken = Reply.take, []

    def failing(self: Reply, update: Update) -> None:
        taken.append(update)
        if len(taken) > 1:
            raise ArithmeticError("not today")
        take(self, update)

    monkeypatch.setattr(Reply, "take", failing)
    with live.openai() as client:
        events: Any = list(
            client.responses.create(
                model="demo-model", input=FACT, stream=True, max_output_tokens=9, temperature=0
            )
        )
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert "not today" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with live.openai() as client, pytest.raises(openai.NotFoundError):
        client.responses.retrieve(events[-1].response.id)


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="demo-model", input="x")


# --- tools and forms ------------------------------------------------------------------------------


def test_a_form_is_followed(tools: openai.OpenAI) -> None:
    answer = tools.responses.parse(model="tiny", input="Hi", text_format=Room, temperature=0)
    assert isinstance(answer.output_parsed, Room)
    with tools.responses.stream(
        model="tiny", input="Hi", text_format=Room, temperature=0
    ) as stream:
        assert stream.get_final_response().output_parsed == answer.output_parsed
    loose: Any = {"format": {"type": "json_object"}}
    made = tools.responses.create(model="tiny", input="Hi", text=loose, max_output_tokens=3)
    assert made.output_text.startswith("{")


def test_an_agents_loop(keyed: Live, tools: openai.OpenAI) -> None:
    """Calls while it must, results by the id of the last answer, and a form in the end; streamed
    and not."""
    ask: Any = {"model": "tiny", "temperature": 0, "tools": [LOOK], "parallel_tool_calls": False}
    must: Any = {"tool_choice": "required", "max_output_tokens": 200}
    events: Any = list(tools.responses.create(input="Hi", stream=True, **ask, **must))
    names = once([event.type for event in events])
    assert names == [*TEXT_EVENTS[:2], *CALL_EVENTS, "response.completed"]
    answer: Any = events[-1].response
    whole: Any = tools.responses.create(input="Hi", **ask, **must)
    (call,) = answer.output
    assert (call.name, call.arguments) == (whole.output[0].name, whole.output[0].arguments)
    deltas = [each.delta for each in events if each.type == CALL_EVENTS[1]]
    assert "".join(deltas) == call.arguments
    for turn in range(2):
        assert json.loads(call.arguments)["room"] in ("4", "5")
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "dark"}
        if turn:
            break
        answer = tools.responses.create(
            input=[output], previous_response_id=answer.id, **ask, **must
        )
        (call,) = answer.output
    final = tools.responses.parse(
        model="tiny",
        input=[output],
        previous_response_id=answer.id,
        tools=[LOOK],
        tool_choice="none",
        text_format=Room,
        temperature=0,
    )
    assert isinstance(final.output_parsed, Room) and final.usage
    assert final.usage.input_tokens_details.cached_tokens == answer.usage.total_tokens - 1
    with pytest.raises(openai.BadRequestError, match=f"No tool output found.*{call.call_id}"):
        tools.responses.create(model="tiny", input="Hi", previous_response_id=answer.id)


@pytest.mark.parametrize(
    "more",
    [
        {"metadata": {"a": "b"}, "prompt_cache_key": "c", "safety_identifier": "s"},
        {"tools": [LOOK], "tool_choice": "required", "max_output_tokens": 40},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": False},
    ],
    ids=["text", "calls", "logprobs"],
)
def test_answers_and_events_have_every_required_field(keyed: Live, more: dict[str, Any]) -> None:
    """OpenAI's client checks nothing, but other clients do."""
    head = {"Authorization": "Bearer a"}
    body = {"input": "Hi", "max_output_tokens": 4, **more}
    whole = keyed.http.post("/v1/responses", json=body, headers=head).json()
    assert Response.model_validate(whole).id == whole["id"]
    for name in ("metadata", "prompt_cache_key", "safety_identifier", "store"):
        assert whole[name] == more.get(name, whole[name])
    details = whole["usage"]["input_tokens_details"]
    assert sum(details.values()) == whole["usage"]["input_tokens"]
    alone = {**body, "stream": True, "compression": {"reuse": False}}
    text = keyed.http.post("/v1/responses", json=alone, headers=head).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    told = [TypeAdapter(ResponseStreamEvent).validate_python(each) for each in events]
    assert [each.sequence_number for each in told] == list(range(len(told)))
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cache_write_tokens"] == 0


def test_a_server_that_holds_no_caches_writes_none() -> None:
    llm = tiny_llm(kv_memory="16MiB", reuse_share=0.0)
    llm.tokenizer.chat_template = PLAIN
    with serving(llm, model_name="tiny") as live:
        body = {"input": "Hi", "max_output_tokens": 4}
        usage = live.http.post("/v1/responses", json=body).json()["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}


def test_keys_do_not_share_answers(keyed: Live, tools: openai.OpenAI) -> None:
    mine = tools.responses.create(model="tiny", input="Hi", max_output_tokens=1)
    with keyed.openai("b") as other:
        for look in (other.responses.retrieve, other.responses.delete):
            with pytest.raises(openai.NotFoundError):
                look(mine.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.create(model="tiny", input="Hi", previous_response_id=mine.id)
    assert tools.responses.retrieve(mine.id).id == mine.id
    with pytest.raises(openai.BadRequestError, match="unknown parameter"):
        tools.responses.retrieve(mine.id, include=["message.output_text.logprobs"])


def test_the_least_recently_used_answers_go() -> None:
    def stored(id: str, size: int = 0) -> Stored:
        return Stored({"id": id, "text": "x" * size}, [])

    store = ResponseStore(most=2, most_bytes=500)
    for id in "ab":
        store.put("me", stored(id))
    store.put("you", stored("a"))
    assert store.get("me", "a") is not None  # used: b is to go first
    store.put("me", stored("c"))
    assert [id for id in "abc" if store.get("me", id)] == ["a", "c"]
    store.put("me", stored("d", 400))
    store.put("me", stored("e", 900))
    assert [id for id in "acde" if store.get("me", id)] == ["e"]
    assert store.get("you", "a") is not None and store.get("they", "a") is None
    assert store.delete("me", "e") and not store.delete("me", "e")
    for id in "fg":
        store.put("me", stored(id, 100))
    assert store.get("me", "f") and store.get("me", "g")  # what is gone is not counted
