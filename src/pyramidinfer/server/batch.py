"""OpenAI's batch format: request lines, answer lines, and the state of a file of answers."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import ValidationError

from pyramidinfer.server.errors import ApiError, error_body
from pyramidinfer.server.protocol import ChatRequest, CompletionRequest
from pyramidinfer.server.protocol_responses import ResponseRequest
from pyramidinfer.server.responses import answer_alone
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings
from pyramidinfer.server.strict import parse_json

__all__ = [
    "Done",
    "Line",
    "Requests",
    "answer_line",
    "batch_settings",
    "check_requests",
    "check_target",
    "open_requests",
    "parse_line",
    "read_requests",
    "take_up",
]

Body = ChatRequest | CompletionRequest | ResponseRequest
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
}
FOREVER = 1e9  # seconds; a batch has no time limit
BEGINNING = b'{"id": "batch_req_'  # first characters of an answer line


class Line(NamedTuple):
    """One request of the file."""

    number: int
    custom_id: str
    url: str
    body: Any


class Requests(NamedTuple):
    """A file of requests that can be read twice, and the name that the user gave."""

    name: str
    file: BinaryIO


class Done(NamedTuple):
    """State of a file of answers: the answered ids, and the number of errors among them."""

    ids: set[str]
    failed: int


def batch_settings(width: int, **more: Any) -> ServerSettings:
    """Settings of a service for a batch, with this maximum number of choices per request."""
    return ServerSettings(
        max_waiting=sys.maxsize,
        queue_timeout=FOREVER,
        request_timeout=FOREVER,
        max_n=width,
        max_logprobs=100,
        **more,
    )


def check_target(source: Path, target: Path) -> None:
    """``ValueError`` for a target that cannot hold the answers of ``source``."""
    if target.exists() and source.exists() and source.samefile(target):
        raise ValueError(
            f"{str(target)!r} is the file of requests; name another file for the answers"
        )
    if target.exists() and not target.is_file() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is not a regular file, which resuming a batch needs")


@contextmanager
def open_requests(source: Path) -> Iterator[Requests]:
    """The requests; those from a pipe are copied, since they are read twice."""
    with source.open("rb") as given, tempfile.TemporaryFile() as copy:
        if source.is_file():
            yield Requests(str(source), given)
            return
        shutil.copyfileobj(given, copy)
        yield Requests(str(source), copy)


def take_up(out: BinaryIO, target: Path, requests: Requests, wanted: set[str]) -> Done:
    """The state of ``out``; locks the file, and cuts off an unfinished line.

    ``ValueError`` if another process writes it, or if it holds answers to requests that are not
    in ``wanted``.
    """
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{str(target)!r} is being written by another process") from None
    done, whole = _recover(out, target)
    if strangers := done.ids - wanted:
        raise ValueError(
            f"{str(target)!r} holds an answer to {min(strangers)!r}, which is not in "
            f"{requests.name!r}: it belongs to another batch; name another file"
        )
    out.truncate(whole)
    return done


async def answer_line(service: Service, line: Line) -> dict[str, Any]:
    """The line of an answer; for a request that cannot be served, a line with the error."""
    status, body = 200, {}
    try:
        if line.url not in BODIES:
            raise ApiError(400, f"url {line.url!r} is none of {', '.join(BODIES)}", param="url")
        asked: Body = BODIES[line.url].model_validate_json(json.dumps(line.body))
        if asked.stream:
            raise ApiError(400, "a batch does not stream; leave stream out", param="stream")
        if isinstance(asked, ResponseRequest):
            body = await answer_alone(service, asked)
        else:
            body = await service.answer(asked, None)
    except ApiError as error:
        if not service.worker.is_alive:
            raise OSError(
                "the engine has stopped; run the same command again to answer the rest"
            ) from None
        status, body = error.status, error.body
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        status, body = 400, error_body(400, f"{place}: {first['msg']}", place)
    except Exception as error:  # an error of one request must not stop the others
        status, body = 500, error_body(500, f"{type(error).__name__}: {error}")
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": body.get("id", ""), "body": body},
        "error": None,
    }


def read_requests(requests: Requests) -> Iterator[Line]:
    """The requests; ``ValueError`` with the line number if a line is invalid."""
    requests.file.seek(0)
    for number, line in enumerate(requests.file, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{requests.name}, line {number}: not UTF-8 text ({error.reason})"
            ) from None
        if text.strip():
            yield parse_line(requests.name, number, text)


def parse_line(source: str, number: int, text: str) -> Line:
    """A line as a request; ``ValueError`` if it is not one."""
    where = f"{source}, line {number}"
    try:
        entry = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: not an object with custom_id, method, url and body")
    for name, kind in (("custom_id", str), ("url", str), ("body", dict)):
        if not isinstance(entry.get(name), kind):
            raise ValueError(f"{where}: {name} is missing or not a {kind.__name__}")
    if entry.get("method", "POST") != "POST":
        raise ValueError(f"{where}: method {entry['method']!r} must be POST")
    return Line(number, entry["custom_id"], entry["url"], entry["body"])


def check_requests(requests: Requests) -> set[str]:
    """The ids of all requests; ``ValueError`` if two are equal."""
    first: dict[str, int] = {}
    for line in read_requests(requests):
        if line.custom_id in first:
            raise ValueError(
                f"{requests.name}, line {line.number}: custom_id {line.custom_id!r} is that of "
                f"line {first[line.custom_id]}; every request needs its own"
            )
        first[line.custom_id] = line.number
    if not first:
        raise ValueError(f"{requests.name!r} holds no request")
    return set(first)


def _recover(out: BinaryIO, target: Path) -> tuple[Done, int]:
    """The answered ids, and the offset after the last finished line."""
    ids: set[str] = set()
    out.seek(0)
    whole = failed = 0
    for number, line in enumerate(out, start=1):
        try:
            if not line.endswith(b"\n") and line[: len(BEGINNING)] == BEGINNING[: len(line)]:
                break  # the command was killed while it wrote this line
            answer = json.loads(line)
            ids.add(answer["custom_id"])
            response = answer.get("response") or {}
            failed += response.get("status_code") != 200
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{target}, line {number} is no answer of a batch; name another file"
            ) from None
        whole += len(line)
    return Done(ids, failed), whole
