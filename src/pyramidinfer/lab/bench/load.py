"""Requests to a server over HTTP: streamed, sent on schedule, and classified by their outcome.

The load is *open*: a request is sent when it is due, whether or not earlier ones have been
answered, and every latency counts from the due time.  So a slow server cannot hide its queue by
delaying the client.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import httpx
except ImportError as _missing:  # an optional dependency
    raise ValueError("this needs httpx: pip install httpx") from _missing

__all__ = ["RESPONSES", "Leave", "Record", "arrival_times", "ask", "client", "httpx", "offer"]

Body = dict[str, Any]
RESPONSES = "/v1/responses"
LEAD = 0.05  # seconds from now until the first request is due


@dataclass(frozen=True)
class Leave:
    """When a client disconnects: after a number of seconds, or of chunks."""

    seconds: float | None = None
    chunks: int | None = None


@dataclass
class Record:
    """One request.  Times are seconds on the load's clock.

    due : scheduled time of sending;  sent : actual time;  arrivals : of each token;
    status : of HTTP, 0 without an answer;  left : the client disconnected;
    done : the stream came to its proper end;  finish : reason of each choice that finished, of a
    response its status;  id : of the answer.
    """

    due: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    status: int = 0
    left: bool = False
    done: bool = False
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    retry_after: str | None = None
    error: str = ""
    id: str = ""

    @property
    def outcome(self) -> str:
        """``left``, ``refused`` (the server is full), ``failed``, or ``completed``."""
        if self.left:
            return "left"
        if self.status == 429:
            return "refused"
        whole = self.status == 200 and self.done and self.finish and not self.error
        return "completed" if whole else "failed"

    @property
    def output_tokens(self) -> int:
        """Number of prompt tokens by the server's count, if it reports one."""
        return int(self.usage.get("completion_tokens", len(self.arrivals)))

    @property
    def why(self) -> str:
        """The error in words; empty without an error."""
        if self.outcome != "failed" or self.error:
            return self.error
        if self.status != 200:
            return f"status {self.status}"
        return "the stream ended without " + ("a finish_reason" if self.done else "[DONE]")


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """Due times of requests: a Poisson process of ``rate`` per second; all at 0 for ``inf``."""
    if not rate > 0:
        raise ValueError(f"--rates: {rate} must be above 0 (requests a second, or inf)")
    gaps = np.random.default_rng(seed).exponential(1.0, count)
    return [float(at) for at in (np.cumsum(gaps) - gaps[0]) / rate]


def client(url: str, api_key: str | None = None, timeout: float = 300.0) -> httpx.AsyncClient:
    """A client without a limit on its number of connections."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        verify=url.startswith("https"),
        trust_env=False,
        timeout=httpx.Timeout(timeout, connect=30.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
    )


async def offer(
    http: httpx.AsyncClient, path: str, bodies: Sequence[Body], due: Sequence[float]
) -> list[Record]:
    """Send every body when it is due; returns a record of each, in the same order."""
    start = time.perf_counter() + LEAD

    async def one(body: Body, at: float) -> Record:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await ask(http, path, body, start=start, due=at)

    return list(await asyncio.gather(*(map(one, bodies, due))))


async def ask(
    http: httpx.AsyncClient,
    path: str,
    body: Body,
    *,
    start: float = 0.0,
    due: float | None = None,
    leave: Leave | None = None,
) -> Record:
    """One request, streamed.  ``start``: the clock's zero (of ``time.perf_counter``)."""
    leave = leave or Leave()
    sent = time.perf_counter() - start
    record = Record(due=sent if due is None else due, sent=sent)
    try:
        async with asyncio.timeout(leave.seconds):
            await _stream(http, path, body, record, start, leave.chunks)
    except TimeoutError:
        record.left = True
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}".rstrip(": ")
    record.ended = time.perf_counter() - start
    return record


async def _stream(
    http: httpx.AsyncClient, path: str, body: Body, record: Record, start: float, chunks: int | None
) -> None:
    usual: Body = {"stream": True}
    if path != RESPONSES:  # its last event always has the usage
        usual["stream_options"] = {"include_usage": True}
    async with http.stream("POST", path, json={**usual, **body}) as response:
        record.status = response.status_code
        if response.status_code != 200:
            record.retry_after = response.headers.get("Retry-After")
            record.error = _message(await response.aread())
            return
        seen = 0
        async for data in _events(response):
            if data == b"[DONE]":
                record.done = True
                continue
            try:
                _take(json.loads(data), record, time.perf_counter() - start)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                record.error = f"not a chunk ({error!r}): {data[:200]!r}"
                return
            seen += 1
            if chunks is not None and seen >= chunks:
                record.left = True
                return


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events.  Lines end at newlines only, because ``aiter_lines`` also
    splits at separators that JSON may contain."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _take(chunk: dict[str, Any], record: Record, now: float) -> None:
    """Add one chunk of a stream to its record."""
    if chunk.get("type", "").startswith("response."):
        _take_event(chunk, record, now)
        return
    record.id = chunk.get("id") or record.id
    if chunk.get("error"):
        record.error = str(chunk["error"].get("message") or chunk["error"])
        return
    record.usage = chunk.get("usage") or record.usage
    for choice in chunk.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        ids = choice.get("token_ids") or ()
        record.arrivals += [now] * (len(ids) or bool(text))
        record.tokens += ids
        record.text += text
        if choice.get("finish_reason"):
            record.finish[choice.get("index", 0)] = choice["finish_reason"]


def _take_event(event: dict[str, Any], record: Record, now: float) -> None:
    """One event of ``/v1/responses`` into its record."""
    kind, answer = event["type"].removeprefix("response."), event.get("response") or {}
    record.id = answer.get("id") or record.id
    if kind.endswith(".delta"):
        record.arrivals.append(now)
        record.text += event["delta"] if kind == "output_text.delta" else ""
    elif kind == "failed":
        record.error = str(answer["error"]["message"])
    elif kind in ("completed", "incomplete"):
        record.done, record.finish[0] = True, kind
        record.usage = {**answer["usage"], "completion_tokens": answer["usage"]["output_tokens"]}


def _message(content: bytes) -> str:
    """The message of an error response."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")
