"""The log: one line per record, as text or JSON, with the id of the request."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMATS", "LEVELS", "Asked", "Formatter", "announce", "asked", "set_up"]

LEVELS = ("info", "warning", "error")
FORMATS = ("text", "json")
#: Client ids that are accepted: short, and without characters that could break a line.
TAKEN_OVER = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Asked:
    """The HTTP request that is being answered.

    ``id``: the client's ``X-Request-Id``, or a generated one;  ``answer``: the id of its answer,
    once it is known;  ``headers``: the request's headers, for traces across services.
    """

    id: str
    headers: Mapping[str, str]
    answer: str = ""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Asked:
        given = headers.get("x-request-id", "")
        return cls(given if TAKEN_OVER.fullmatch(given) else secrets.token_hex(16), headers)


#: The request that the current task answers; None outside of requests, as in the engine's thread.
asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


class Formatter(logging.Formatter):
    """``kind``: one of ``FORMATS``.  A record's ``fields`` are names and values for JSON."""

    def __init__(self, kind: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(about)s%(message)s")
        self.kind = kind

    def format(self, record: logging.LogRecord) -> str:
        about = asked.get()
        if self.kind == "text":
            record.about = f"[{about.id}] " if about else ""
            return super().format(record)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if about:
            entry["request_id"] = about.id
            if about.answer:
                entry["answer_id"] = about.answer
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up(level: str, kind: str) -> None:
    """Write records of this level and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def announce(message: str, kind: str, level: int = logging.INFO) -> None:
    """Write a message at any log level, as a plain line or as JSON."""
    if kind == "json":
        record = logging.LogRecord("pyramidinfer", level, "", 0, message, None, None)
        message = Formatter(kind).format(record)
    print(message, file=sys.stderr, flush=True)
