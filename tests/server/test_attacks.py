"""What an attacker would try: too many connections, bodies that keep everybody waiting, and faults
that nobody hears of."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from pyramidinfer import LLM
from pyramidinfer.server import run
from pyramidinfer.server.run import Connections, Patient
from pyramidinfer.server.settings import ServerSettings
from pyramidinfer.server.strict import MOST_CONTAINERS, MOST_NAMES, MOST_TEXTS, MOST_VALUES
from tests.server.live import STORY, Live, beside, connect, post, serving, until
from tests.server.test_connections import HEAD, answer_of

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}


# --- connections ----------------------------------------------------------------------------------


def test_more_connections_than_there_is_room_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits without a request makes room for who comes; one line says so."""
    monkeypatch.setattr(Patient, "limit", Connections(10))
    with serving(beside(llm)) as live:
        lines = [connect(live) for _ in range(60)]
        try:
            assert live.http.get("/health").status_code == 200
            assert live.complete().status_code == 200
            assert Patient.limit.open <= 10 + 1  # the one that is being closed
            assert answer_of(lines[0]) == b""  # the oldest had to go
        finally:
            for line in lines:
                line.close()
        until(lambda: Patient.limit.open <= 1)
        assert sum("connections" in record.message for record in caplog.records) == 1
        assert "more than 10 connections" in caplog.text


def test_connections_with_requests_are_not_closed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patient, "limit", Connections(2))
    with serving(beside(llm)) as live:
        with connect(live) as first, connect(live) as second:
            for line in (first, second):
                post(line, "/v1/completions", {"prompt": STORY, **LONG, "stream": True})
                assert line.recv(16)
            with connect(live) as third:
                assert answer_of(third).startswith(b"HTTP/1.1 503 ")
            assert first.recv(16) and second.recv(16)  # they go on
        until(lambda: Patient.limit.open == 0)
        assert live.http.get("/health").status_code == 200


def test_descriptors_are_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.resource, "getrlimit", lambda which: (1024, 4096))
    used = len(os.listdir("/proc/self/fd"))
    assert 1024 - used - 2 * run.SPARE < run.connections_left() < 1024 - used - run.SPARE // 2
    monkeypatch.setattr(run.resource, "getrlimit", lambda which: (50, 50))
    assert run.connections_left() >= 1
    monkeypatch.setattr(run.resource, "getrlimit", lambda which: (run.resource.RLIM_INFINITY,) * 2)
    assert run.connections_left() == run.MOST_CONNECTIONS
    assert run.check_connections(ServerSettings(max_connections=7)) == 7
    with pytest.raises(ValueError, match=r"max_connections=10001: .* allows 10000"):
        run.check_connections(ServerSettings(max_connections=10_001))


# --- bodies ---------------------------------------------------------------------------------------


MANY = MOST_CONTAINERS + 1
LARGE = {
    "lists": b'{"prompt": [' + b",".join([b"[1]"] * MANY) + b"]}",
    "messages": b'{"messages": [' + b",".join([b"{}"] * MANY * 2) + b"]}",
    "parts": b'{"messages": [{"role": "user", "content": ['
    + b",".join([b'{"type":"text","text":"[a]"}'] * MANY)
    + b"]}]}",
    "texts": b'{"prompt": [' + b",".join([b'""'] * MOST_TEXTS * 2) + b"]}",
    "names": b"{" + b",".join(b'"x%d":1' % at for at in range(MOST_NAMES + 1)) + b"}",
    "nested": b'{"prompt": ' + b"[" * MANY * 4 + b"]" * MANY * 4 + b"}",
    "cut short": b'{"prompt": "' + b'\\"' * MANY * 4,
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_of_too_many_parts(live: Live, kind: str, path: str) -> None:
    """Told before they are taken apart, which would keep everybody waiting."""
    headers = {"Content-Type": "application/json"}
    answer = live.http.post(path, content=LARGE[kind], headers=headers)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    said = {
        "cut short": "not valid JSON",
        "texts": "texts and names; this server accepts at most 100000",
        "parts": "accepts",
        "names": "an object has 4097 names; 4096 are read",
    }
    assert said.get(kind, "objects and lists; this server accepts at most 10000") in message


def test_too_many_values(live: Live) -> None:
    body = b'{"prompt": [' + b",".join([b"1"] * (MOST_VALUES + 1)) + b"]}"
    answer = live.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, "values" in answer.text) == (400, True)


def test_signs_in_texts_are_no_parts(live: Live) -> None:
    """A large text full of brackets, commas, quotes and backslashes is a text."""
    text = '[{,"\\' * 30_000
    assert live.http.post("/tokenize", json={"prompt": text}).json()["count"] > 0


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Length: 18\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{"prompt": "a"}',
        b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"Content-Encoding: br\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_bodies_that_could_be_read_in_two_ways(live: Live, head: bytes) -> None:
    with connect(live) as line:
        line.sendall(HEAD + head)
        found = answer_of(line)
    assert int(found.split()[1]) == (415 if b"Content-Encoding" in head else 400)
    assert live.http.get("/health").status_code == 200


def test_a_compressed_body(live: Live) -> None:
    body = gzip.compress(json.dumps({"prompt": "a"}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = live.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 415
    assert "Content-Encoding 'gzip' is not supported" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions/", "/tokenize/", "/health/"])
def test_nobody_is_sent_elsewhere(live: Live, path: str) -> None:
    """A redirect would lead to whatever Host says."""
    for method in ("GET", "POST"):
        answer = live.http.request(method, path, headers={"Host": "localhost"})
        assert answer.status_code == 404 and "location" not in answer.headers


# --- texts that become tokens ---------------------------------------------------------------------


def test_texts_that_no_request_may_have_are_not_cut(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = live.service.prompts
    monkeypatch.setattr(prompts, "encode", lambda *given: pytest.fail("it was cut"))
    monkeypatch.setattr(prompts, "decode", lambda *given: pytest.fail("it was decoded"))
    monkeypatch.setattr(prompts, "chat", lambda *given: pytest.fail("it was cut"))
    longest = live.engine.runner.max_positions
    text = "a" * 3_000_000
    for path, body in (
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
        ("/detokenize", {"tokens": [1] * (longest + 1)}),
    ):
        answer = live.http.post(path, json=body)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"] == next(iter(body))


def test_tokenizing_waits_in_the_same_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than may wait get 429, and whose turn comes too late, too."""
    go = threading.Event()
    with (
        serving(beside(llm), max_waiting=3, queue_timeout=0.2) as live,
        ThreadPoolExecutor() as pool,
    ):
        encode = live.service.prompts.encode

        def held(*given: Any) -> Any:
            assert go.wait(60)
            return encode(*given)

        monkeypatch.setattr(live.service.prompts, "encode", held)
        waits = [pool.submit(live.http.post, "/tokenize", json={"prompt": "a b"}) for _ in range(3)]
        until(lambda: live.service.preparing == 3)
        answer = live.http.post("/tokenize", json={"prompt": "a b"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert live.complete().status_code == 429
        assert live.http.get("/health").status_code == 200
        time.sleep(0.4)  # longer than anybody is to wait
        go.set()
        said = [each.result() for each in waits]
        assert sorted(each.status_code for each in said) == [200, 200, 429]  # two threads
        assert {each.json()["error"]["code"] for each in said if each.is_error} == {"queue_timeout"}


# --- the engine's end -----------------------------------------------------------------------------


class Panic(BaseException):
    """As a library of Rust raises it."""


def test_everybody_hears_of_the_engines_end(llm: LLM) -> None:
    """Who runs, who waits, and who is handed over at that moment."""
    with serving(beside(llm, max_requests=1), settles=False) as live, ThreadPoolExecutor() as pool:
        worker = live.service.worker
        runs = pool.submit(live.complete, **LONG)
        until(lambda: live.engine.scheduler.running)
        waits = pool.submit(live.complete)
        until(lambda: live.engine.scheduler.waiting)

        def fall() -> None:
            raise Panic("at the disco")

        with live.held():
            worker.tell(fall)
            late = pool.submit(live.complete)
            until(lambda: worker._arriving == 1)  # in the queue behind the fault
        for each in (runs, waits, late):
            answer = each.result(timeout=30)
            assert answer.status_code == 500
            assert "the engine has stopped" in answer.json()["error"]["message"]
        until(lambda: not worker.is_alive)
        for path, code in (("/health", "engine_dead"), ("/ready", "stopping")):
            answer = live.http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert live.complete().status_code == 503


SERVER = """
import sys, threading, torch
torch.set_num_threads(1)
from pyramidinfer import LLM
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.server.run import bind, serve
from pyramidinfer.server.settings import ServerSettings
class Panic(BaseException): pass
llm = LLM(shipped_model(), "full", kv_memory="64MiB")
def fall():
    raise Panic
settings = ServerSettings(port=0, keep_alive_on_engine_death=sys.argv[1] == "stays")
llm.engine.step = fall
with bind(settings) as line:
    serve(llm, settings, line)
"""


@pytest.mark.parametrize("how", ["ends", "stays"])
def test_a_server_without_an_engine(how: str) -> None:
    """It ends, so that it is started anew, unless told to stay."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, how], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            while "serves" not in (line := process.stderr.readline()):
                assert line
            url = line.split()[-1]
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, trust_env=False)
            assert answer.status_code == 500
            if how == "stays":
                time.sleep(2.5)  # longer than the other one takes to end
                assert httpx.get(f"{url}/health", trust_env=False).status_code == 503
                process.terminate()
            assert process.wait(60) == 1
            assert "the engine's thread has ended" in process.stderr.read()
        finally:
            process.kill()


# --- forks ----------------------------------------------------------------------------------------

FORK = """
import os, sys, torch
torch.set_num_threads(2)
from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.loading import shipped_model
llm = LLM(shipped_model(), "full", kv_memory="64MiB", dtype="float32")
prompts = ["The old baker walked to the market . " * 20] * 3
def said():
    params = SamplingParams(max_tokens=8, temperature=0.0)
    return [out.token_ids for out in llm.generate(prompts, params)]
before = said()  # OpenMP's threads are there
child = os.fork()
if not child:
    os._exit(0 if said() == before and torch.get_num_threads() == 1 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_forked_after_loading() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, env=environment, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("parts", [False, True])
def test_a_chat_of_more_parts_than_tokens(live: Live, parts: bool) -> None:
    """Each is a token at least, so it need not be rendered to be too long."""
    count = live.engine.runner.max_positions + 1
    one = [{"type": "text", "text": ""}] * count if parts else ""
    message = {"role": "user", "content": one}
    answer = live.http.post(
        "/v1/chat/completions", json={"messages": [message] * (1 if parts else count)}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
