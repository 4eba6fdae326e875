"""Connections that are slow, broken, or none."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.server import run, service
from pyramidinfer.server.settings import ServerSettings
from tests.server.live import MODEL, STORY, Live, beside, connect, post, serving, until

LONG: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}


def answer_of(line: socket.socket) -> bytes:
    """Everything until the server closes."""
    found = b""
    try:
        while piece := line.recv(65536):
            found += piece
    except ConnectionResetError:  # it did not read everything that was sent
        pass
    return found


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500 + b"\r\n\r\n",  # TLS
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 50_000 + b"\r\n",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:30]),
)
def test_what_is_no_http(live: Live, sent: bytes) -> None:
    with connect(live) as line:
        try:
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError):
            pass  # refused before all of it was sent
        answer = answer_of(line)
    assert answer == b"" or answer.split()[1] in (b"400", b"431", b"501")
    assert live.http.get("/health").status_code == 200


def test_a_head_that_never_ends(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_TIMEOUT", 0.2)
    with connect(live) as silent, connect(live) as slow, connect(live) as kept:
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += kept.recv(65536)
        assert b"200 OK" in found
        for line in (slow, kept):
            line.sendall(b"GET /health HTTP/1.1\r\nHo")
        for line in (silent, slow, kept):
            assert answer_of(line) == b""  # closed, and nobody kept waiting
    assert live.http.get("/health").status_code == 200


def test_a_request_may_take_longer_than_its_head(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HEAD_TIMEOUT", 0.3)
    with live.openai() as client:
        stream = client.completions.create(
            model=MODEL,
            prompt=STORY,
            max_tokens=600,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert sum(1 for _ in stream) == 600


def test_half_closed(live: Live) -> None:
    """Who says that nothing more will come is either answered or taken to have left."""
    for stream in (False, True):
        with connect(live) as line:
            post(line, "/v1/completions", {"prompt": STORY, **LONG, "stream": stream})
            line.shutdown(socket.SHUT_WR)
            answer_of(line)
    with connect(live) as line:
        line.shutdown(socket.SHUT_WR)
        assert answer_of(line) == b""
    with connect(live) as line:
        line.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
        line.shutdown(socket.SHUT_WR)
        answer_of(line)
    assert live.http.get("/health").status_code == 200
    live.settle()


def test_two_requests_in_one_piece(live: Live) -> None:
    with connect(live) as line:
        line.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        found = b""
        while found.count(b"200 OK") < 2:
            piece = line.recv(65536)
            assert piece, found
            found += piece


def test_many_that_only_connect(live: Live) -> None:
    lines = [connect(live) for _ in range(100)]
    try:
        assert live.complete().status_code == 200
    finally:
        for line in lines:
            line.close()


def test_who_does_not_read_is_let_go(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "READING", 1 - 600)  # so long in all
    with serving(beside(llm), send_buffer=4096, request_timeout=600) as live:
        with connect(live) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            body = {**LONG, "n": 4, "stream": True, "logprobs": 20, "temperature": 1}
            post(line, "/v1/completions", {"prompt": STORY, **body})
            until(lambda: "did not read its answer in time" in caplog.text)
            until(lambda: live.service.worker.is_idle)
        assert live.complete().status_code == 200


def test_connections_wait_until_they_are_accepted() -> None:
    """More than are accepted at a time, whatever length of queue asyncio asks for."""
    with run.bind(ServerSettings(port=0)) as line:
        line.listen(run.BACKLOG)
        waiting = []
        for _ in range(3 * run.BACKLOG):
            waiting.append(socket.create_connection(line.getsockname()[:2], timeout=5))
        for each in waiting:
            each.close()
