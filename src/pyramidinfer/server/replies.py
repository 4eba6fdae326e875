"""Replies: OpenAI's objects, whole or in chunks, with the cache's figures in the usage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyramidinfer.engine.answers import drafts
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.text import Detokenizer
from pyramidinfer.engine.worker import Stream, Update
from pyramidinfer.server.errors import ApiError, of_reason
from pyramidinfer.server.forms import param_of
from pyramidinfer.server.jobs import Job
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import ChatRequest, ToolNamed
from pyramidinfer.server.tool_calls import AnswerReader, Piece
from pyramidinfer.types import KVUsage, Logprob, TokenIds

__all__ = ["Reply", "Shape", "event", "failure"]


@dataclass(slots=True)
class Choice:
    """The state of one answer."""

    text: str = ""
    token_ids: TokenIds = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    parts: AnswerReader = field(default_factory=lambda: AnswerReader(None, None))
    # offset of its first token's text (completions' text_offset)
    base: int = 0
    said: TokenIds = field(default_factory=list)
    reader: Detokenizer | None = None


class Shape(Protocol):
    """The format of an answer over HTTP, whole or in events."""

    async def whole(self) -> dict[str, Any]: ...

    def chunks(self, first: Update | None) -> AsyncIterator[bytes]: ...

    def failed(self, error: Exception) -> bytes: ...


class Reply:
    """Creates the answer to a job from a stream's updates.  ``ApiError`` for a failed request."""

    def __init__(self, job: Job, stream: Stream, model: str, prompts: Prompts) -> None:
        self.job, self.stream, self.model, self.prompts = job, stream, model, prompts
        self.choices = [Choice(parts=job.reader()) for _ in stream.followed]
        wanted = job.body.logprobs  # chat: a bool; completions: a number of likeliest tokens
        self.wants_logprobs = bool(wanted) if job.is_chat else wanted is not None

    # --- whole --------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """The whole answer, when it is complete."""
        async for update in self.stream:
            self.take(update)
        choices = []
        for index, choice in enumerate(self.choices):
            entry = self._choice(index, choice.text, choice.token_ids, choice.logprobs, True)
            if self.job.is_chat:
                entry["message"] = self._message(choice, entry.pop("text"))
            entry["finish_reason"] = self._reason(choice)
            choices.append(entry)
        answer: dict[str, Any] = {"choices": choices, "usage": self.usage()}
        if self.job.body.prompt_logprobs is not None and self.job.is_chat:
            answer["prompt_logprobs"] = self._of_prompt(self._leader(0))
        kind = "chat.completion" if self.job.is_chat else "text_completion"
        return {**self._head(kind), **answer}

    def _message(self, choice: Choice, text: str) -> dict[str, Any]:
        """An assistant message: text, reasoning and tool calls."""
        calls: list[dict[str, Any]] = []
        pieces = choice.parts.feed(text, last=True)
        text = "".join(piece.text for piece in pieces)
        for piece in pieces:
            if piece.name:
                calls.append({key: it for key, it in piece.delta.items() if key != "index"})
            elif piece.call is not None:
                calls[piece.call]["function"]["arguments"] += piece.arguments
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought := "".join(piece.thought for piece in pieces):
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return message

    def _reason(self, choice: Choice) -> str | None:
        """The finish reason; as in OpenAI's API, it is ``stop`` after a call that was required by
        name."""
        named = isinstance(self.job.body, ChatRequest) and isinstance(
            self.job.body.tool_choice, ToolNamed
        )
        called = choice.parts.has_called and not named
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    # --- in chunks ----------------------------------------------------------------------------

    async def chunks(self, first: Update | None) -> AsyncIterator[bytes]:
        """Events as they occur; ``first``: an update that was already received."""
        async for chunk in self._chunks(first):
            yield event(chunk)
        yield b"data: [DONE]\n\n"

    def failed(self, error: Exception) -> bytes:
        """The event for an error in the middle of a stream."""
        return event(failure(error))

    async def _chunks(self, first: Update | None) -> AsyncIterator[dict[str, Any]]:
        kind = "chat.completion.chunk" if self.job.is_chat else "text_completion"
        options = self.job.body.stream_options
        begun: set[int] = set()
        update = first
        while update is not None:
            self.take(update)
            for entry in self._deltas(update, update.choice not in begun):
                chunk = {**self._head(kind), "choices": [entry]}
                if options and options.include_usage:
                    chunk["usage"] = self.usage() if options.continuous_usage_stats else None
                if options and options.include_kv and update.kv is not None:
                    chunk["kv"] = _kv(update.kv)
                if entry["finish_reason"] and update.kv:
                    chunk |= _lowered([update.kv])
                yield chunk
            begun.add(update.choice)
            update = await self.stream.next()
        if options and options.include_usage:
            yield {**self._head(kind), "choices": [], "usage": self.usage()}

    def _deltas(self, update: Update, is_first: bool) -> list[dict[str, Any]]:
        """The ``choices`` entries of an update's chunks."""
        entry = self._choice(
            update.choice, update.text, update.token_ids, update.logprobs, is_first
        )
        entry["finish_reason"] = None
        entries = [entry]
        choice = self.choices[update.choice]
        if self.job.is_chat:
            text = entry.pop("text")
            delta = _delta(choice.parts.feed(text, bool(update.finish_reason)))
            entry["delta"] = delta or ({} if choice.parts.calls else {"content": ""})
            if is_first:
                entry["delta"] = {"role": "assistant", **entry["delta"]}
        if update.finish_reason:
            if self.job.is_chat:
                entries.append(
                    {
                        "index": update.choice,
                        "delta": {},
                        "logprobs": None,
                        "finish_reason": self._reason(choice),
                    }
                )
            else:
                entry["finish_reason"] = update.finish_reason
        return entries

    # --- parts --------------------------------------------------------------------------------

    def take(self, update: Update) -> None:
        """Add an update to its choice; ``ApiError`` if the request failed."""
        if update.finish_reason is not None:
            error = of_reason(
                update.finish_reason,
                update.error,
                self.stream.engine.retry_after(),
                param_of(self.job.body),
            )
            if error is not None:
                raise error
        choice = self.choices[update.choice]
        choice.text += update.text
        choice.token_ids += update.token_ids
        choice.logprobs += update.logprobs
        choice.finish_reason = update.finish_reason

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": self.job.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _choice(
        self, index: int, text: str, tokens: TokenIds, logprobs: list[Logprob], begins: bool
    ) -> dict[str, Any]:
        """A choice, or a part of one, from these tokens; with the prompt if it is echoed."""
        request = self.stream.followed[index].request
        leader = self._leader(index)
        if self.job.drop:
            text, tokens, logprobs = "", [], []
        entry: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        echoed = bool(self.job.echoed) and begins
        if echoed:
            entry["text"] = self.job.echoed[self.job.leaders.index(leader)] + text
        if self.job.body.return_token_ids:
            entry["token_ids"] = ([*request.prompt] if echoed else []) + tokens
        if self.job.body.prompt_logprobs is not None and not self.job.is_chat:
            entry["prompt_logprobs"] = self._of_prompt(leader)
        if self.wants_logprobs and self.job.is_chat:
            entry["logprobs"] = {
                "content": [self.spelled(each) for each in logprobs],
                "refusal": None,
            }
        elif self.wants_logprobs:
            most = self.job.body.logprobs or 0
            before = [_top(each, most) for each in leader.prompt_logprobs] if echoed else []
            start = [leader.prompt[0]] if echoed else []
            entry["logprobs"] = self._legacy(
                self.choices[index],
                start,
                [*before, *logprobs],
                request,
                self.job.echoed[self.job.leaders.index(leader)] if echoed else None,
            )
        return entry

    def _of_prompt(self, leader: Request) -> list[dict[str, Any] | None]:
        """A prompt's tokens and the likeliest ones at each position, in vLLM's format."""

        def one(token: int, value: float, rank: int) -> dict[str, Any]:
            text = self.prompts.spell(token).decode("utf-8", "replace")
            return {"logprob": value, "rank": rank, "decoded_token": text}

        found: list[dict[str, Any] | None] = [None]  # the first token has no log-probability
        for each in leader.prompt_logprobs:
            told = {str(each.token_id): one(each.token_id, each.logprob, each.rank)}
            top = _top(each, self.job.body.prompt_logprobs or 0).top
            for rank, (token, value) in enumerate(top.items(), start=1):
                told.setdefault(str(token), one(token, value, rank))
            found.append(told)
        return found

    def _leader(self, index: int) -> Request:
        width = len(self.stream.followed) // len(self.job.leaders)
        return self.job.leaders[index // width]

    def spelled(self, logprob: Logprob) -> dict[str, Any]:
        """A token in the format of chat completions."""

        def one(token: int, value: float) -> dict[str, Any]:
            spelled = self.prompts.spell(token)
            text = spelled.decode("utf-8", "replace")
            return {"token": text, "logprob": value, "bytes": list(spelled)}

        top = [one(token, value) for token, value in logprob.top.items()]
        return {**one(logprob.token_id, logprob.logprob), "top_logprobs": top}

    def _legacy(
        self,
        choice: Choice,
        start: TokenIds,
        logprobs: list[Logprob],
        request: Request,
        echoed: str | None,
    ) -> dict[str, Any]:
        """Tokens in the format of completions; ``start``: tokens without a log-probability."""

        def spell(token: int) -> str:
            return self.prompts.spell(token).decode("utf-8", "replace")

        ids = [*start, *(each.token_id for each in logprobs)]
        offsets: list[int] = []
        if echoed is not None:  # the prompt's tokens, then the answer's
            offsets, _ = self.prompts.offsets(ids[: len(request.prompt)], [], [])
            choice.base = len(echoed)
        new = ids[len(offsets) :]
        more, choice.reader = self.prompts.offsets(
            new, choice.said, request.prompt, choice.reader, self.job.body.skip_special_tokens
        )
        choice.said += new
        top: list[dict[str, float] | None] = [None for _ in start]
        for each in logprobs:
            named: dict[str, float] = {}
            for number, value in [(each.token_id, each.logprob), *each.top.items()]:
                named[spell(number)] = max(value, named.get(spell(number), value))
            top.append(named)
        return {
            "tokens": [spell(token) for token in ids],
            "token_logprobs": [None for _ in start] + [each.logprob for each in logprobs],
            "top_logprobs": top,
            "text_offset": [*offsets, *(choice.base + at for at in more)],
        }

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and the kept and skipped tokens (means over layers)."""
        requests = self.stream.requests
        leaders = [each for each in requests if each.leads]
        prompt = sum(len(each.prompt) for each in leaders)
        new = sum(len(each.token_ids) for each in self.choices) if not self.job.drop else 0
        caches = [each.kv for each in requests if each.kv is not None]
        kept = sum(sum(kv.layer_means) / len(kv.layer_means) for kv in caches)
        full = sum(sum(kv.full_len) / len(kv.full_len) for kv in caches)
        depth = len(caches[0].kept_len) if caches else 1
        entered = [each.computed[:depth] for each in leaders if each.computed]
        skipped = sum(layers[0] - sum(layers) / len(layers) for layers in entered)
        reread = sum(sum(each.computed[depth:]) for each in leaders) / depth
        extra: dict[str, Any] = {"prefill_tokens_reread": round(reread)} if reread else {}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(each.reused for each in leaders)},
            "kv_tokens_kept": round(kept),
            "kv_tokens_full": round(full),
            "prefill_tokens_skipped": round(skipped),
            "kv_bytes": sum(kv.bytes for kv in caches),
            "kv_bytes_full": sum(kv.full_bytes for kv in caches),
            **self._thoughts(),
            **_lowered(caches),
            **_drafted(requests),
            **_offloaded(caches),
            **extra,
        }

    def _thoughts(self) -> dict[str, Any]:
        """The number of reasoning tokens, for a reasoning model."""
        readers = [(each.parts.thoughts, each.token_ids) for each in self.choices]
        counts = [
            self.prompts.thinking.count(reader, tokens)
            for reader, tokens in readers
            if reader is not None
        ]
        return {"completion_tokens_details": {"reasoning_tokens": sum(counts)}} if counts else {}


def _delta(pieces: list[Piece]) -> dict[str, Any]:
    """Reasoning, text and calls of a chunk."""
    text = "".join(piece.text for piece in pieces)
    thought = "".join(piece.thought for piece in pieces)
    delta: dict[str, Any] = {"reasoning_content": thought} if thought else {}
    if text:
        delta["content"] = text
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.call is None:
            continue
        if calls and calls[-1]["index"] == piece.call:
            calls[-1]["function"]["arguments"] += piece.arguments
        else:
            calls.append(piece.delta)
    return {**delta, "tool_calls": calls} if calls else delta


def _top(logprob: Logprob, most: int) -> Logprob:
    """The log-probability with fewer of the likeliest tokens."""
    return logprob._replace(top=dict([*logprob.top.items()][:most]))


def _lowered(caches: list[KVUsage]) -> dict[str, float]:
    """The ``keep`` to which ``--elastic`` lowered these requests, if it did."""
    lowered = [kv.keep_lowered_to for kv in caches if kv.keep_lowered_to is not None]
    return {"kv_keep_lowered_to": min(lowered)} if lowered else {}


def _drafted(requests: list[Request]) -> dict[str, int]:
    """Counts of drafted and accepted tokens of the lossless requests."""
    told = [each for each in map(drafts, requests) if each is not None]
    if not told:
        return {}
    return {
        "drafted_tokens": sum(each.drafted for each in told),
        "accepted_tokens": sum(each.accepted for each in told),
        "verifications": sum(each.verifications for each in told),
    }


def _offloaded(caches: list[KVUsage]) -> dict[str, int]:
    """Bytes of caches in host memory, if there are any."""
    size = sum(kv.host_bytes for kv in caches)
    return {"kv_bytes_host": size} if size else {}


def _kv(kv: KVUsage) -> dict[str, Any]:
    return {
        "seen": kv.seen_len,
        "kept": [list(heads) for heads in kv.kept_len],
        "full": list(kv.full_len),
        "bytes": kv.bytes,
        "full_bytes": kv.full_bytes,
    }


def event(entry: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event, escaped to ASCII because some clients split lines at U+2028 and
    similar characters."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(entry, separators=(',', ':'))}\n\n".encode()


def failure(error: Exception) -> dict[str, Any]:
    """OpenAI's error object for an error in the middle of a stream."""
    if isinstance(error, ApiError):
        return error.body
    return ApiError(500, f"{type(error).__name__}: {error}").body
