"""OpenAI's Responses API on top of chats: the equivalent chat request, and stored answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from fastapi import Request, Response
from pydantic import ValidationError

from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.protocol import ChatRequest
from pyramidinfer.server.protocol_responses import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
    ResponseRequest,
    read_items,
)
from pyramidinfer.server.replies import Reply
from pyramidinfer.server.response_events import ResponseReply
from pyramidinfer.server.response_store import ResponseStore, Stored
from pyramidinfer.server.service import Service

__all__ = ["Responses", "answer_alone", "chat_of"]

#: Field of a chat → field of the Responses API, for errors.
NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}
NAMED = re.compile(rf"\b({'|'.join(NAMES)})\b")


class Responses:
    """The endpoint of one service, and its stored answers."""

    def __init__(self, service: Service) -> None:
        self.service, self.store = service, ResponseStore()

    async def create(self, request: Request, body: ResponseRequest) -> Response:
        """Answer over HTTP."""
        owner: str = request.scope["owner"]
        before = self._before(owner, body.previous_response_id)
        items = [*before, *body.items]

        def keep(answer: dict[str, Any]) -> None:
            whole = [item for item in answer["output"] if _can_go_on(item)]
            self.store.put(owner, Stored(answer, [*items, *read_items(whole)]))

        def shaped(reply: Reply) -> ResponseReply:
            return ResponseReply(reply, body, keep)

        with _own_names():
            return await self.service.respond(request, chat_of(body, items), shaped)

    def get(self, owner: str, id: str) -> dict[str, Any]:
        """A stored answer; ``ApiError`` if there is none."""
        found = self.store.get(owner, id)
        return self._missing(id) if found is None else found.response

    def delete(self, owner: str, id: str) -> dict[str, Any]:
        if not self.store.delete(owner, id):
            self._missing(id)
        return {"id": id, "object": "response", "deleted": True}

    def _before(self, owner: str, id: str | None) -> list[Item]:
        """The conversation up to and including an answer."""
        if id is None:
            return []
        found = self.store.get(owner, id)
        if found is None:
            raise ApiError(
                404,
                f"Previous response with id {id!r:.80} not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return found.items

    def _missing(self, id: str) -> NoReturn:
        raise ApiError(404, f"Response with id {id!r:.80} not found.", param="id")


async def answer_alone(service: Service, body: ResponseRequest) -> dict[str, Any]:
    """The whole answer to a request without a store, as in a batch; ``ApiError`` if it cannot be
    served."""
    for name in ("previous_response_id", "store"):
        if getattr(body, name) and name in body.model_fields_set:
            raise ApiError(400, f"a batch stores no answers; leave {name} out", param=name)
    alone = body.model_copy(update={"store": False})

    def shaped(reply: Reply) -> ResponseReply:
        return ResponseReply(reply, alone)

    with _own_names():
        return await service.answer(chat_of(alone, alone.items), None, shaped)


@contextmanager
def _own_names() -> Iterator[None]:
    """Make errors of the equivalent chat name the fields of the Responses API."""
    try:
        yield
    except ApiError as error:
        error.message = NAMED.sub(lambda found: NAMES[found[0]], error.message)
        error.param = NAMES.get(error.param or "", error.param)
        raise


def chat_of(body: ResponseRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat request for a body with the conversation ``items``; ``ApiError`` if the body is
    invalid."""
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    asked: dict[str, Any] = {
        "model": body.model,
        "messages": [*messages, *_messages(items)],
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": True if body.wants_logprobs else None,
        "top_logprobs": body.top_logprobs,
        "response_format": _format(body),
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "tools": [_function(each.model_dump(exclude_none=True)) for each in body.tools or ()],
        "tool_choice": _choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        "cache_salt": body.cache_salt,
        "compression": body.compression,
    }
    try:
        return ChatRequest.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        place = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, first["msg"].removeprefix("Value error, "), param=place) from None


def _format(body: ResponseRequest) -> dict[str, Any] | None:
    wanted = body.text and body.text.format
    if not wanted:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = wanted.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    return {"type": wanted.type, "json_schema": schema}


def _function(given: dict[str, Any]) -> dict[str, Any]:
    """A function, or the choice of one, in the format of chats."""
    rest = {name: value for name, value in given.items() if name != "type"}
    return {"type": "function", "function": rest}


def _choice(body: ResponseRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type == "function":
        return _function(choice.model_dump())
    tools = [_function(each.model_dump()) for each in choice.tools]
    return {"type": choice.type, "allowed_tools": {"mode": choice.mode, "tools": tools}}


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as messages; consecutive reasoning, text and calls of the model are one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the current assistant message
    waiting: list[str] = []  # calls without a result
    for place, item in enumerate(items):
        if isinstance(item, FunctionOutputItem):
            if item.call_id not in waiting:
                raise _wrong(
                    f"input[{place}]: No tool call found for function call output with call_id "
                    f"{item.call_id!r:.80}."
                )
            waiting.remove(item.call_id)
            turn = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
            continue
        others = isinstance(item, MessageItem) and item.role != "assistant"
        if waiting and (turn is None or others):
            raise _unanswered(waiting)
        if isinstance(item, MessageItem) and others:
            turn = None
            messages.append({"role": item.role, "content": item.text})
            continue
        if turn is None or not _goes_on(turn, item):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        _add(turn, item)
        if isinstance(item, FunctionCallItem):
            if item.call_id in waiting:
                raise _wrong(f"input[{place}]: call_id {item.call_id!r:.80} is there twice.")
            waiting.append(item.call_id)
    if waiting:
        raise _unanswered(waiting)
    return messages


def _goes_on(turn: dict[str, Any], item: Item) -> bool:
    """Whether an assistant item belongs to the current assistant message."""
    if isinstance(item, ReasoningItem):
        return not turn["content"] and "tool_calls" not in turn
    if isinstance(item, MessageItem):
        return not turn["content"] or "tool_calls" in turn
    return True


def _add(turn: dict[str, Any], item: Item) -> None:
    if isinstance(item, ReasoningItem):
        texts = filter(None, (turn.get("reasoning_content"), item.text))
        turn["reasoning_content"] = "\n".join(texts)
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn["tool_calls"] = [*turn.get("tool_calls", ()), call]
    else:
        turn["content"] = "\n".join(filter(None, (turn["content"], item.text)))


def _can_go_on(item: dict[str, Any]) -> bool:
    """Whether an item may be part of a conversation; a truncated call may not."""
    if item["type"] != "function_call":
        return True
    try:
        return isinstance(json.loads(item["arguments"]), dict)
    except (ValueError, RecursionError):
        return False


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, param="input")


def _unanswered(waiting: list[str]) -> ApiError:
    return _wrong(f"No tool output found for function call {waiting[0]}.")
