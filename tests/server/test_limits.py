"""What is refused: with the right status, in OpenAI's shape, naming the value and the limit."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
LIMITS: dict[str, Any] = {
    "max_tokens_limit": 50,
    "default_max_tokens": 5,
    "max_prompt_tokens": 100,
    "max_n": 4,
    "max_stop": 3,
    "max_logprobs": 5,
    "max_body_bytes": 300_000,
    "max_schema_bytes": 500,
    "prompt_logprob_bytes": 50_000,
    "policies": ("full", "snapkv"),
    "min_keep": 0.2,
    "max_keep": 0.8,
}


@pytest.fixture(scope="module")
def tight(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm), **LIMITS) as live:
        yield live


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, whose shape is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("path", "body", "value", "limit", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "max_tokens": 51}, "51", "50", "max_tokens"),
        (CHAT, {"messages": USER, "max_tokens": 51}, "51", "50", "max_tokens"),
        (CHAT, {"messages": USER, "max_completion_tokens": 99}, "99", "50", "max_tokens"),
        (COMPLETIONS, {"prompt": "x " * 199}, "200", "100", "prompt"),
        (COMPLETIONS, {"prompt": [5] * 101}, "101", "100", "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 200}]}, "20", "100", "messages"),
        (COMPLETIONS, {"prompt": "x", "n": 5}, "5", "4", "n"),
        (COMPLETIONS, {"prompt": ["x", "x", "x"], "n": 2}, "6", "4", "n"),
        (CHAT, {"messages": USER, "n": 5}, "5", "4", "n"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", "b", "c", "d"]}, "4", "3", "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": "a" * 1001}, "1001", "1000", "stop"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [1] * 4}, "4", "3", "stop_token_ids"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 6}, "6", "5", "logprobs"),
        (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 6}, "6", "5", "logprobs"),
        (
            COMPLETIONS,
            {"prompt": "x " * 90, "echo": True, "logprobs": 1, "compression": {"policy": "snapkv"}},
            "91",
            "50000",
            "logprobs",
        ),
        (COMPLETIONS, {"prompt": "x", "compression": {"keep": 0.1}}, "0.1", "0.2", "compression"),
        (COMPLETIONS, {"prompt": "x", "compression": {"keep": 0.9}}, "0.9", "0.8", "compression"),
        (
            COMPLETIONS,
            {"prompt": "x", "compression": {"policy": "tova"}},
            "tova",
            "snapkv",
            "compression",
        ),
        (
            COMPLETIONS,
            {"prompt": "x", "compression": {"policy": "full"}},
            "full",
            "0.8",
            "compression",
        ),
        (
            CHAT,
            {
                "messages": USER,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": ["a" * 600]}},
                },
            },
            "6",
            "500",
            "response_format",
        ),
    ],
)
def test_a_limit_names_the_value_and_itself(
    tight: Live, path: str, body: dict[str, Any], value: str, limit: str, param: str | None
) -> None:
    error = error_of(tight.http.post(path, json=body))
    assert value in error["message"] and limit in error["message"]
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_at_the_limits_all_is_well(tight: Live) -> None:
    answer = tight.complete(
        [5] * 49,
        max_tokens=50,
        n=4,
        stop=["a", "b", "c"],
        logprobs=5,
        stop_token_ids=[1] * 3,
        compression={"policy": "snapkv", "keep": 0.2},
    )
    assert answer.status_code == 200
    unsaid = tight.complete("x", max_tokens=None, ignore_eos=True).json()
    assert unsaid["usage"]["completion_tokens"] == 5, "the operator's default"
    names = tight.http.get("/v1/models").json()["data"][0]["compression"]
    assert names["policies"] == ["pyramid", "snapkv"], "full keeps more than is allowed"
    assert (names["min_keep"], names["max_keep"]) == (0.2, 0.8)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_body_that_is_too_large(tight: Live, path: str) -> None:
    body = json.dumps({"prompt": "x" * 300_000}).encode()

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(body), 50_000):
            yield body[at : at + 50_000]

    for content in (body, pieces()):  # with a length announced, and without
        answer = tight.http.post(path, content=content)
        assert "300000 bytes" in error_of(answer, 413)["message"]
        assert answer.headers["Connection"] == "close"
    assert tight.complete().status_code == 200


def test_a_body_that_is_far_too_large_is_not_read(tight: Live) -> None:
    host, port = tight.url.removeprefix("http://").split(":")
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    for rest in (b"99999999999\r\n\r\n", b"300001\r\nExpect: 100-continue\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as line:
            line.sendall(head + rest)
            answer = b""
            while piece := line.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 413 ") and b"300000 bytes" in answer


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "bogus": 1}, "unknown parameter 'bogus'", "bogus"),
        (CHAT, {"messages": USER, "function_call": "x"}, "'function_call'", "function_call"),
        (CHAT, {"messages": USER, "tools": [{}]}, "'tools.0.type'", "tools"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "x": 1}]},
            "messages.0.x",
            "messages",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0",
            "messages",
        ),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "missing parameter 'messages.0.role'", "messages"),
        (CHAT, {}, "missing parameter 'messages'", "messages"),
        (CHAT, {"messages": []}, "messages", "messages"),
        (COMPLETIONS, {}, "missing parameter 'prompt'", "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": {}}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [5, "x"]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [1270]}, "token id 1270 is outside the vocabulary", None),
        (COMPLETIONS, {"prompt": [10**30]}, "outside the vocabulary", None),
        (COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt is empty", "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5.0}, "max_tokens", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "echo", None),
        (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "given: -1", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**30}, "max_tokens", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, "given: -0.1", "temperature"),
        (COMPLETIONS, {"prompt": "x", "temperature": 2.1}, "given: 2.1", "temperature"),
        (COMPLETIONS, {"prompt": "x", "top_p": -0.1}, "top_p", "top_p"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n", "n"),
        (COMPLETIONS, {"prompt": "x", "seed": 2**64}, "seed", "seed"),
        (COMPLETIONS, {"prompt": "x", "stop": [1]}, "stop", "stop"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of", None),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
        (COMPLETIONS, {"prompt": "x", "stream": 1}, "stream", "stream"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options needs stream", None),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "token ids", "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"-1": 1}}, "-1", None),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"9999": 1}}, "9999", None),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 101}}, "101", "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [5000]}, "5000", None),
        (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "differ", None),
        (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs needs logprobs", None),
        (
            CHAT,
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "json_schema",
            "response_format",
        ),
        (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "xml", "response_format"),
        (COMPLETIONS, {"prompt": "x", "compression": {"keep": 0}}, "keep", "compression"),
        (COMPLETIONS, {"prompt": "x", "compression": {"keep": 1.5}}, "1.5", "compression"),
        (
            COMPLETIONS,
            {"prompt": "x", "compression": {"policy": "snapkb"}},
            "did you mean 'snapkv'",
            "compression",
        ),
        (
            COMPLETIONS,
            {"prompt": "x", "compression": {"window": 4}},
            "compression.window",
            "compression",
        ),
        ("/tokenize", {}, "give prompt or messages", None),
        ("/tokenize", {"prompt": "x", "messages": USER}, "give prompt or messages", None),
        ("/detokenize", {"tokens": [-1]}, "tokens", "tokens"),
        ("/detokenize", {"tokens": [1270]}, "1270", "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "outside the vocabulary", "tokens"),
    ],
)
def test_a_wrong_body_is_told_what_is_wrong(
    live: Live, path: str, body: dict[str, Any], message: str, param: str | None
) -> None:
    error = error_of(live.http.post(path, json=body))
    assert message in error["message"]
    assert error["param"] == param


DEEP = 100_000


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"nul",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"{",
        b'{"prompt":',
        b"\xff\xfe",
        b"\x00",
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "top_p": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": 1e999}',
        b'{"prompt": "x", "logit_bias": {"5": NaN}}',
        b'{"prompt": "x", "compression": {"keep": NaN}}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "x", "logit_bias": {"\\ud800": 1000}}',
        b'{"prompt": "x", "compression": {"policy": "\\ud800"}}',
        b'{"prompt": "x", "stop_token_ids": ["\\udfff"]}',
        b'{"prompt": "y", "prompt": "x"}',
        b'{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}',
    ],
    ids=lambda text: repr(text[:40]),
)
def test_json_that_is_none_or_odd(live: Live, text: bytes) -> None:
    for path in (COMPLETIONS, "/tokenize"):
        error_of(live.http.post(path, content=text, headers={"Content-Type": "application/json"}))
    if b"{" in text and b"prompt" in text:
        text = text.replace(b'"prompt": "x"', b'"messages": [{"role": "user", "content": "x"}]')
        error_of(live.http.post(CHAT, content=text, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("depth", [50, 300, 900, 950, 980, 1000, 5000])
def test_a_schema_that_is_deep(tiny: Live, depth: int) -> None:
    """Python reads and writes nested JSON to a depth of its own."""
    schema = b'{"items":' * depth + b'{"\\u0041": 1}' + b"}" * depth
    text = (
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "response_format":'
        b'{"type": "json_schema", "json_schema": {"name": "x", "schema": ' + schema + b"}}}"
    )
    answer = tiny.http.post(CHAT, content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    assert depth < 5000 or answer.status_code == 400


def test_odd_but_right(live: Live) -> None:
    """Lone surrogates, control characters, long words."""
    head = {"Content-Type": "application/json"}
    for odd in (b"\\ud800", b"a\\udc00b", b"\\u0000", b"\\u2028", b"\\uffff", b"a" * 100_000):
        body = b'{"prompt": "' + odd + b'", "max_tokens": 2, "echo": true}'
        answer = live.http.post(COMPLETIONS, content=body, headers=head)
        assert answer.status_code == 200 or error_of(answer)
        body = b'{"messages": [{"role": "user", "content": "' + odd + b'"}], "stop": "' + odd[:9]
        body += b'", "user": "' + odd + b'", "max_tokens": 2}'
        answer = live.http.post(CHAT, content=body, headers=head)
        assert answer.status_code == 200 or error_of(answer)
        answer = live.http.post("/tokenize", content=b'{"prompt": "' + odd + b'"}', headers=head)
        assert answer.status_code == 200 or error_of(answer)
        model = b'{"prompt": "x", "model": "' + odd + b'"}'
        answer = live.http.post(COMPLETIONS, content=model, headers=head)
        assert error_of(answer, 400 if odd in (b"\\ud800", b"a\\udc00b") else 404)


def test_what_clients_send_that_changes_nothing(live: Live) -> None:
    plain = live.chat("x").json()["choices"]
    for extra in (
        {"stop": None, "n": None, "temperature": 0, "top_p": None, "seed": None, "stream": None},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_k": -1},
        {"compression": {}, "response_format": {"type": "text"}, "model": "demo-model"},
    ):
        assert live.chat("x", **extra).json()["choices"] == plain
    part = [{"type": "text", "text": "x"}]
    body = {"messages": [{"role": "user", "content": part}], "max_tokens": 4, "temperature": 0}
    assert live.http.post(CHAT, json=body).json()["choices"] == plain


def test_what_is_not_there(live: Live) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/v1/model/a", "/../etc/passwd", "/%00"):
        answer = live.http.post(path)
        error_of(answer, 405 if path == "/" else 404)
    assert error_of(live.http.get(CHAT), 405)["message"] == f"{CHAT} does not take GET"
    assert error_of(live.http.delete("/v1/models"), 405)
    content = json.dumps({"prompt": "x"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = live.http.post(COMPLETIONS, content=content, headers={"Content-Type": kind})
        assert "Content-Type: application/json" in error_of(answer)["message"]


# --- room and time --------------------------------------------------------------------------------


def test_what_could_never_fit_is_told_at_once(llm: LLM) -> None:
    with serving(beside(llm, kv_memory="1MiB")) as live:
        for stream in (False, True):
            error = error_of(live.complete("x " * 1000, max_tokens=500, stream=stream))
            assert "1000" in error["message"] or "1001" in error["message"]
            assert f"{2**20}" in error["message"] and "bytes" in error["message"]
        assert live.complete("x").status_code == 200


def test_the_queue(llm: LLM) -> None:
    """One runs, one waits, one is too many; who waits too long is told to come again."""
    settings: dict[str, Any] = {"max_waiting": 1, "queue_timeout": 0.2, "max_tokens_limit": 4000}
    with serving(beside(llm, max_requests=1), **settings) as live, ThreadPoolExecutor() as pool:
        body = {"prompt": STORY, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with live.http.stream("POST", COMPLETIONS, json=body) as running:
            lines = running.iter_lines()  # let go of, it would hang up
            assert next(lines).startswith("data: {")
            with live.held():
                waits = pool.submit(live.complete)
                until(lambda: live.service.worker.waiting == 1)
                full = live.complete()
            for answer, code in ((full, "queue_full"), (waits.result(), "queue_timeout")):
                assert error_of(answer, 429)["code"] == code
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert live.complete(max_tokens=1).status_code == 200


def test_more_prompts_than_may_wait(llm: LLM) -> None:
    """A list of prompts that is longer than the queue is answered all the same."""
    with serving(beside(llm), max_waiting=2) as live:
        assert len(live.complete(["x", "y", "map", "Where"]).json()["choices"]) == 4


def test_a_policy_that_needs_slot_scores(live: Live) -> None:
    """The error says which option the server was started without."""
    told = error_of(live.complete(compression={"policy": "h2o"}), 400)["message"]
    assert "policy 'h2o' is not served here" in told and "serve --slot-scores" in told


def test_a_request_that_takes_too_long(llm: LLM) -> None:
    long = {"max_tokens": 3900, "ignore_eos": True}
    with serving(beside(llm), request_timeout=0.1) as live:
        assert error_of(live.complete(**long), 504)["code"] == "timeout"
    with serving(beside(llm)) as live:
        body = {"prompt": STORY, **long, "stream": True}
        with live.http.stream("POST", COMPLETIONS, json=body) as running:
            lines = running.iter_lines()
            first = next(lines)
            (stream,) = live.service.worker._live
            stream.timeout = 0  # now
            *_, last = [first, *(line for line in lines if line)]
        assert json.loads(first.removeprefix("data: "))["choices"]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert live.complete(max_tokens=1).status_code == 200


def test_a_client_that_sends_too_slowly(llm: LLM) -> None:
    with serving(beside(llm), body_timeout=0.3) as live:
        go_on = threading.Event()

        def pieces() -> Iterator[bytes]:
            yield b'{"prompt": "x",'
            go_on.wait(30)
            yield b"}"

        timer = threading.Timer(1.0, go_on.set)
        timer.start()
        try:
            begun = time.monotonic()
            answer = live.http.post(COMPLETIONS, content=pieces())
            assert error_of(answer, 408)["type"] == "timeout_error"
            assert time.monotonic() - begun < 30
        except (httpx.WriteError, httpx.RemoteProtocolError):
            pass  # the connection was closed before it had sent the rest
        finally:
            go_on.set()
            timer.join()
        assert live.complete().status_code == 200
