"""An answer in the format of OpenAI's Responses API: items, and the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from pyramidinfer.engine.worker import Update
from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.protocol_responses import ResponseRequest
from pyramidinfer.server.replies import Reply, event, failure
from pyramidinfer.server.tool_calls import Piece

__all__ = ["ResponseReply"]

Event = dict[str, Any]
#: Fields of usage that have another name in the Responses API.
COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens"}
DETAILS = {"prompt_tokens_details", "completion_tokens_details"}


class Output:
    """The items of one answer, and the events (without numbers) that stream them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._call: int | None = None  # the call in progress, if any
        self._is_open = False  # the last item may continue

    def feed(self, pieces: list[Piece], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """The next part of the answer; ``logprobs``: of the tokens of its text."""
        for piece in pieces:
            if piece.thought:
                yield from self._more("reasoning", piece.thought, [])
            elif piece.call is not None:
                yield from self._more_call(piece)
            elif piece.text:
                yield from self._more("message", piece.text, logprobs)
                logprobs = []

    def end(self, status: str) -> Iterator[Event]:
        """The end of the answer; without any item, it gets an empty message."""
        if not self.items:
            yield from self._begin_text("message")
        yield from self._close(status)

    # --- text and thoughts --------------------------------------------------------------------

    def _more(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._begin_text(kind)
        part = self.items[-1]["content"][0]
        part["text"] += text
        told: Event = {"content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs
            told["logprobs"] = logprobs
        yield self._told(f"{part['type']}.delta", **told)

    def _begin_text(self, kind: str) -> Iterator[Event]:
        item: dict[str, Any] = {"type": "message", "id": _id("msg"), "role": "assistant"}
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        part["logprobs"] = []
        if kind == "reasoning":
            item = {"type": "reasoning", "id": _id("rs"), "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        yield from self._add({**item, "content": []})
        self.items[-1]["content"] = [part]
        yield self._told("content_part.added", content_index=0, part={**part})

    def _close_text(self) -> Iterator[Event]:
        part = self.items[-1]["content"][0]
        told = {key: value for key, value in part.items() if key in ("text", "logprobs")}
        yield self._told(f"{part['type']}.done", content_index=0, **told)
        yield self._told("content_part.done", content_index=0, part=part)

    # --- calls --------------------------------------------------------------------------------

    def _more_call(self, piece: Piece) -> Iterator[Event]:
        if piece.name:
            item = {"type": "function_call", "id": _id("fc"), "call_id": piece.id}
            yield from self._add({**item, "name": piece.name, "arguments": ""})
        if piece.arguments:
            self.items[-1]["arguments"] += piece.arguments
            yield self._told("function_call_arguments.delta", delta=piece.arguments)

    # --- parts --------------------------------------------------------------------------------

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self.items.append({**item, "status": "in_progress"})
        self._is_open = True
        place = len(self.items) - 1
        yield {
            "type": "response.output_item.added",
            "output_index": place,
            "item": {**self.items[-1]},
        }

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        item = self.items[-1]
        if item["type"] == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            yield self._told("function_call_arguments.done", **told)
        else:
            yield from self._close_text()
        self._is_open = False
        item["status"] = status
        place = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": place, "item": item}

    def _told(self, name: str, /, **more: Any) -> Event:
        place = len(self.items) - 1
        return {
            "type": f"response.{name}",
            "item_id": self.items[-1]["id"],
            "output_index": place,
            **more,
        }


class ResponseReply:
    """A reply in the format of the Responses API; ``keep``: called with the complete answer, if it
    is to be stored.

    ``reply``: the reply to the equivalent chat request, with one choice.
    """

    def __init__(
        self,
        reply: Reply,
        body: ResponseRequest,
        keep: Callable[[dict[str, Any]], None] = lambda answer: None,
    ) -> None:
        self.reply, self.body, self.keep = reply, body, keep
        self.output = Output()
        self.id = _id("resp")
        self._number = -1
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not complete

    async def whole(self) -> dict[str, Any]:
        """The whole answer, when it is complete."""
        events = [told async for told in self._told(None)]
        answer: dict[str, Any] = events[-1]["response"]
        return answer

    async def chunks(self, first: Update | None) -> AsyncIterator[bytes]:
        """Events as they occur; ``first``: an update that was already received."""
        async for told in self._told(first):
            yield event(told, told["type"])

    def failed(self, error: Exception) -> bytes:
        """The event for an error in the middle of a stream."""
        wrong = failure(error)["error"]
        busy = isinstance(error, ApiError) and error.status == 429
        code = "rate_limit_exceeded" if busy else "server_error"
        answer = self._response("failed") | {"error": {"code": code, "message": wrong["message"]}}
        told = self._numbered({"type": "response.failed", "response": answer})
        return event(told, told["type"])

    async def _told(self, first: Update | None) -> AsyncIterator[Event]:
        update = first or await self.reply.stream.next()
        begun = False
        while update is not None:
            self.reply.take(update)
            if not begun:
                for name in ("created", "in_progress"):
                    answer = self._response("in_progress")
                    yield self._numbered({"type": f"response.{name}", "response": answer})
                begun = True
            for told in self._events(update):
                yield self._numbered(told)
            update = await self.reply.stream.next()
        status = self._status
        answer = self._response(status)
        if self.body.store:
            self.keep(answer)
        yield self._numbered({"type": f"response.{status}", "response": answer})

    def _events(self, update: Update) -> Iterator[Event]:
        (choice,) = self.reply.choices
        pieces = choice.parts.feed(update.text, bool(update.finish_reason))
        if self.body.wants_logprobs:
            self._logprobs += [self.reply.spelled(each) for each in update.logprobs]
        texts = [piece for piece in pieces if piece.text]
        yield from self.output.feed(pieces, self._logprobs if texts else [])
        if texts or any(piece.thought or piece.call is not None for piece in pieces):
            self._logprobs = []
        if update.finish_reason:
            yield from self.output.end(self._status)

    @property
    def _status(self) -> str:
        cut = self.reply.choices[0].finish_reason == "length"
        return "incomplete" if cut else "completed"

    def _numbered(self, told: Event) -> Event:
        self._number += 1
        return {"type": told["type"], "sequence_number": self._number, **told}

    def _response(self, status: str) -> dict[str, Any]:
        """The response object so far."""
        body, job = self.body, self.reply.job
        params = job.leaders[0].params
        is_over = status in ("completed", "incomplete")
        shown = body.model_dump(by_alias=True, exclude_none=True)
        reasoning: dict[str, Any] = shown.get("reasoning", {})
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": job.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.reply.model,
            "output": list(self.output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "store": body.store,
            "temperature": params.temperature,
            "text": {"format": (shown.get("text") or {}).get("format", {"type": "text"})},
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": shown.get("tools", []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "service_tier": "default",
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        """The usage with the names of the Responses API; the cache's fields keep their names."""
        usage = self.reply.usage()
        read = usage["prompt_tokens_details"]
        thought = usage.get("completion_tokens_details", {"reasoning_tokens": 0})
        leaves = any(each.leaves_cache for each in self.reply.stream.requests)
        written = (usage["prompt_tokens"] - read["cached_tokens"]) * leaves
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**read, "cache_write_tokens": written},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": thought,
            "total_tokens": usage["total_tokens"],
            **{name: it for name, it in usage.items() if name not in COUNTS | DETAILS},
        }


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
