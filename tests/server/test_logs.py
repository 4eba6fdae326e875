"""The log's lines, as text and as JSON, and the ids that tell whose they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.server.logs import Asked, Formatter, announce, asked
from pyramidinfer.server.settings import ServerSettings
from tests.server.live import Live, beside, serving, until


@pytest.fixture(scope="module")
def logged(llm: LLM) -> Iterator[tuple[Live, dict[str, StringIO]]]:
    """A server with an access log, and what is written of it in either format."""
    log, written, handlers = logging.getLogger("pyramidinfer"), {}, []
    for kind in ("text", "json"):
        written[kind] = StringIO()
        handlers.append(logging.StreamHandler(written[kind]))
        handlers[-1].setFormatter(Formatter(kind))
        log.addHandler(handlers[-1])
    before = log.level
    log.setLevel(logging.INFO)
    try:
        with serving(beside(llm), access_log=True, log_prompts=True) as live:
            yield live, written
    finally:
        log.setLevel(before)
        for handler in handlers:
            log.removeHandler(handler)


def lines_of(logged: tuple[Live, dict[str, StringIO]], id: str) -> list[dict[str, Any]]:
    """JSON lines about a request; the text's lines about it are as many."""
    _, written = logged

    def found() -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in written["json"].getvalue().splitlines()]
        return [each for each in entries if each.get("request_id") == id]

    until(lambda: any("status" in each for each in found()))  # the access log's line is the last
    assert written["text"].getvalue().count(f"[{id}] ") == len(found())
    return found()


def test_every_line_of_a_request_has_its_id(logged: tuple[Live, dict[str, StringIO]]) -> None:
    live, _ = logged
    answers = [
        live.http.post(
            "/v1/completions",
            json={"prompt": "The map", "max_tokens": 2, "stream": stream},
            headers={"X-Request-Id": f"mine-{stream}"},
        )
        for stream in (False, True)
    ]
    for stream, answer in zip((False, True), answers, strict=True):
        assert answer.headers["X-Request-Id"] == f"mine-{stream}"
        lines = lines_of(logged, f"mine-{stream}")
        assert [each["logger"].rpartition(".")[2] for each in lines] == [
            "service",  # asks
            "service",  # gets
            "gate",
        ]
        assert all(each["level"] == "info" for each in lines)
        (id,) = {each["answer_id"] for each in lines}
        assert id in answer.text and id in lines[0]["message"]
        told = lines[-1]
        assert (told["method"], told["path"], told["status"]) == ("POST", "/v1/completions", 200)
        assert told["seconds"] >= 0


def test_ids_are_made_where_none_can_be_taken(logged: tuple[Live, dict[str, StringIO]]) -> None:
    live, _ = logged
    made = set()
    for given in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 200}, {"X-Request-Id": ""}):
        answer = live.http.get("/v1/nothing", headers=given)
        id = answer.headers["X-Request-Id"]
        assert id not in given.values()
        (told,) = lines_of(logged, id)
        assert told["status"] == 404 and "answer_id" not in told
        made.add(id)
    assert len(made) == 4


def record(message: str, **more: Any) -> logging.LogRecord:
    return logging.LogRecord("some.where", logging.ERROR, "", 0, message, None, **more)


def test_a_line_of_json_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    text = Formatter("json").format(record('quote " and\nbreak \u2028', exc_info=info))
    assert len(text.splitlines()) == 1
    entry = json.loads(text)
    assert entry["message"] == 'quote " and\nbreak \u2028' and entry["level"] == "error"
    assert entry["exception"].endswith("ValueError: a\nb") and "Traceback" in entry["exception"]
    assert "request_id" not in entry and entry["time"].endswith("Z")


def test_text_outside_of_requests_is_as_ever() -> None:
    text = Formatter("text").format(record("hello", exc_info=None))
    assert text.endswith(" ERROR hello") and "[" not in text
    token = asked.set(Asked("7", {}))
    try:
        assert Formatter("text").format(record("hello", exc_info=None)).endswith(" ERROR [7] hello")
    finally:
        asked.reset(token)


def test_announcements_have_the_logs_format(capsys: pytest.CaptureFixture[str]) -> None:
    announce("it serves", "text")
    announce("it serves", "json", logging.WARNING)
    bare, line = capsys.readouterr().err.splitlines()
    assert bare == "it serves"
    entry = json.loads(line)
    assert (entry["message"], entry["level"]) == ("it serves", "warning")


def test_what_would_write_nothing_is_refused() -> None:
    for name in ("access_log", "log_prompts"):
        with pytest.raises(ValueError, match=f"{name} logs at level info"):
            ServerSettings(**{name: True, "log_level": "warning"})
    for wrong in ({"log_level": "debug"}, {"log_format": "xml"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerSettings(**wrong)  # type: ignore[arg-type]
