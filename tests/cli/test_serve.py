"""``pyramidinfer serve``: its options, its signals, its end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from pyramidinfer.cli import serve as serve_module
from pyramidinfer.cli import serving
from pyramidinfer.cli.choices import ModelOptions
from pyramidinfer.cli.serve import ModelChoice
from pyramidinfer.config import EngineConfig
from pyramidinfer.server.settings import KEYS_VARIABLE, ServerSettings
from tests.commands import Command, command, each_without, run

READY = r"pyramidinfer serves (\S+) at (http://127\.0\.0\.1:\d+)"
SMALL = ("--port", "0", "--kv-memory", "32MiB")
STORY = "The old baker walked to the market . "


# --- from options to settings ---------------------------------------------------------------------


def settings_of(words: list[str]) -> ServerSettings:
    """What ``serve`` makes of its options."""
    found: list[ServerSettings] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_module, "run_serve", lambda _, settings, floor: found.append(settings))
        patch.delenv(KEYS_VARIABLE, raising=False)
        assert invoke(*words).exit_code == 0
    return found[0]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelChoice, ServerSettings]]:
    """What ``serve`` would have run with."""
    found: list[tuple[ModelChoice, ServerSettings]] = []
    monkeypatch.setattr(serve_module, "run_serve", lambda *values: found.append(values[:2]))
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    return found


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    serving.add_serving(app)
    return CliRunner().invoke(app, ["serve", *arguments])


def test_options_become_settings(
    taken: list[tuple[ModelChoice, ServerSettings]], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a\nb\n")
    done = invoke(
        "MODEL",
        "--policy",
        "snapkv",
        "--keep",
        "0.3",
        "-o",
        "window=8",
        "--kv-memory",
        "8MiB",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--host",
        "::1",
        "--port",
        "9",
        "--served-model-name",
        "m",
        "--no-page",
        "--drain-timeout",
        "7",
        "--max-requests",
        "5",
        "--step-tokens",
        "99",
        "--page-size",
        "8",
        "--reuse-share",
        "0.25",
        "--slot-scores",
        "--max-waiting",
        "3",
        "--queue-timeout",
        "1.5",
        "--request-timeout",
        "2.5",
        "--default-max-tokens",
        "11",
        "--max-tokens-limit",
        "12",
        "--max-prompt-tokens",
        "13",
        "--max-n",
        "2",
        "--max-stop",
        "4",
        "--max-body",
        "1MiB",
        "--max-schema",
        "2KiB",
        "--policies",
        "full, snapkv",
        "--min-keep",
        "0.1",
        "--max-keep",
        "0.9",
        "--api-key-file",
        str(keys),
        "--cors-origin",
        "https://a",
        "--cors-origin",
        "https://b",
        "--log-prompts",
        "--compress-idle",
        "--generation-config",
        "none",
        "--default-chat-template-kwargs",
        '{"enable_thinking": false}',
    )
    assert done.exit_code == 0, done.output
    ((choice, settings),) = taken
    assert settings == ServerSettings(
        host="::1",
        port=9,
        model_name="m",
        page=False,
        drain_timeout=7,
        max_waiting=3,
        queue_timeout=1.5,
        request_timeout=2.5,
        default_max_tokens=11,
        max_tokens_limit=12,
        max_prompt_tokens=13,
        max_n=2,
        max_stop=4,
        max_body_bytes=2**20,
        max_schema_bytes=2**11,
        policies=("full", "snapkv"),
        min_keep=0.1,
        max_keep=0.9,
        api_keys=("a", "b"),
        cors_origins=("https://a", "https://b"),
        log_prompts=True,
        compress_idle=True,
        generation_config="none",
        chat_template_kwargs={"enable_thinking": False},
    )
    model = choice.model
    assert (model.model, model.threads, model.dtype) == ("MODEL", 1, "float32")
    policy: Any = choice.policy
    assert (policy.name, policy.keep, policy.window) == ("snapkv", 0.3, 8)
    assert choice.engine == EngineConfig(
        kv_memory="8MiB",
        max_requests=5,
        step_tokens=99,
        page_size=8,
        reuse_share=0.25,
        slot_scores=True,
    )


def test_defaults_are_the_settings_own(taken: list[tuple[ModelChoice, ServerSettings]]) -> None:
    assert invoke().exit_code == 0
    ((choice, settings),) = taken
    assert settings == ServerSettings()
    assert choice.engine == EngineConfig()
    assert choice.policy.name == "pyramid" and choice.model == ModelOptions()


def test_lossless_chooses_what_drafts_read(
    taken: list[tuple[ModelChoice, ServerSettings]],
) -> None:
    for words in (
        (),
        ("--keep", "0.2", "--draft-tokens", "3"),
        ("--policy", "snapkv", "-o", "window=8", "-o", "keep=0.3"),
        ("-o", "min_context=64"),
        ("--policy", "full"),
    ):
        assert invoke("--lossless", *words).exit_code == 0
    drafts: list[Any] = [getattr(choice.policy, "drafts", None) for choice, _ in taken]
    found = [(each.name, each.keep) for each in drafts]
    tenth = ("pyramid", 0.1)
    assert found == [tenth, ("pyramid", 0.2), ("snapkv", 0.3), tenth, tenth]
    assert drafts[2].window == 8 and drafts[3].min_context == 64
    assert [choice.engine.draft_tokens for choice, _ in taken] == [None, 3, None, None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port=70000 must lie between 0 and 65535"),
        (["--max-waiting", "0"], "max_waiting=0 must be a whole number of at least 1"),
        (["--queue-timeout", "0"], "queue_timeout=0.0 must be above 0 seconds"),
        (["--request-timeout", "nan"], "request_timeout=nan must be above 0"),
        (["--min-keep", "0.9", "--max-keep", "0.5"], "min_keep=0.9 must be above 0 and at most"),
        (["--max-keep", "1.5"], "max_keep=1.5 must lie between 0 and 1"),
        (["--default-max-tokens", "9", "--max-tokens-limit", "5"], "is above max_tokens_limit=5"),
        (["--generation-config", "vllm"], "generation_config='vllm' is unknown"),
        (["--default-chat-template-kwargs", "x"], "chat-template-kwargs 'x' is not valid JSON"),
        (["--default-chat-template-kwargs", "[1]"], "kwargs '[1]' is not a JSON object"),
        (
            ["--default-chat-template-kwargs", '{"enable_thinking": false}'],
            "chat template never reads 'enable_thinking'",
        ),
        (["--max-body", "much"], "'much' is not a size"),
        (["--policies", "full,snapkb"], "did you mean 'snapkv'"),
        (["--policies", "h2o"], "slot_scores=True"),
        (["--policy", "snapkb"], "did you mean 'snapkv'"),
        (["--keep", "2"], "keep=2.0 must be above 0"),
        (["--api-key-file", "/no/such/file"], "cannot read the keys in '/no/such/file'"),
        (["--metrics-key-file", "/no/such/file"], "cannot read the keys in '/no/such/file'"),
        (["--log-level", "debug"], "log_level='debug' is unknown"),
        (["--log-format", "xml"], "log_format='xml' is unknown"),
        (["--access-log", "--log-level", "error"], "access_log logs at level info"),
        (["--kv-memory", "lots"], "kv_memory='lots' is not a size"),
        (["--kv-memory", "1000TiB"], "is more than"),
        (["--kv-memory", "10KiB"], "kv_memory=10240 bytes is below one page per layer"),
        (["--threads", "-1"], "threads=-1"),
        (["--reuse-share", "2"], "reuse_share=2.0 must lie between 0 and 1"),
        (
            ["--compress-idle", "--reuse-share", "0"],
            "--compress-idle with --reuse-share 0: no conversation is held then",
        ),
        (["--admission", "hope"], "admission='hope' is unknown"),
        (["--elastic", "0.2"], "needs admission='overcommit'"),
        (["/no/such/model"], "/no/such/model"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["A", "--model", "B"], "two models are given, 'A' and --model 'B'; leave one out"),
        (["--max-requests", "x"], "Invalid value for '--max-requests'"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_a_bad_value_is_one_line(arguments: list[str], message: str) -> None:
    code, out, err = run("serve", *SMALL, *arguments)
    assert code == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        line.listen()
        port = str(line.getsockname()[1])
        code, out, err = run("serve", "--kv-memory", "32MiB", "--port", port)
    assert code == 2 and out == ""
    (text,) = err.strip().splitlines()
    assert text.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("127.0.0.1", False),
        ("127.8.9.10", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.0.5", True),
        ("example.org", True),
    ],
)
@pytest.mark.parametrize("keys", [(), ("k",)])
def test_open_to_others_without_a_key_warns(
    host: str,
    warned: bool,
    keys: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = SimpleNamespace(sampling_defaults={}, close=lambda: None)
    monkeypatch.setattr(serve_module, "load", lambda choice: loaded)
    monkeypatch.setattr(serve_module, "serve", lambda *values: None)
    monkeypatch.setattr(serve_module, "bind", lambda settings: socket.socket())
    monkeypatch.setattr(signal, "signal", lambda *values: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **values: None)
    choice: Any = None
    serve_module.run_serve(choice, ServerSettings(host=host, api_keys=keys))
    told = capsys.readouterr().err
    assert ("warning: " in told) == (warned and not keys)
    if warned and not keys:
        assert host in told and "--api-key-file" in told


# --- a life ---------------------------------------------------------------------------------------


@contextmanager
def server(*arguments: str, **environment: str) -> Iterator[tuple[Command, httpx.Client]]:
    with command("serve", *SMALL, *arguments, **environment) as begun:
        url = begun.says(READY)[2]
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            yield begun, http


def long(tokens: int) -> dict[str, Any]:
    return {"prompt": STORY, "max_tokens": tokens, "ignore_eos": True, "stream": True}


def test_a_server_as_a_user_begins_it() -> None:
    """``python -m pyramidinfer serve`` in a process of its own, and Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-m", "pyramidinfer", "serve", *SMALL, "--served-model-name", "mine"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", KEYS_VARIABLE: "sesame"},
    ) as process:
        try:
            assert process.stderr is not None and process.stdout is not None
            found = None
            while found is None:
                line = process.stderr.readline()
                assert line, "it ended"
                found = re.search(READY, line)
            assert found[1] == "mine"
            url, head = found[2], {"Authorization": "Bearer sesame"}
            assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
            assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
            answer = httpx.get(f"{url}/v1/models", headers=head, trust_env=False).json()
            assert answer["data"][0]["id"] == "mine"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stdout.read() == ""
            assert "sesame" not in process.stderr.read()
        finally:
            process.kill()


def test_sigterm_lets_what_runs_end() -> None:
    """New requests are rotated away meanwhile, on a connection that was open before."""
    with (
        server() as (begun, http),
        http.stream("POST", "/v1/completions", json=long(1200)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        assert http.get("/ready").status_code == 200  # this connection stays
        os.kill(begun.pid, signal.SIGTERM)
        begun.says("stopping: waiting for running requests")
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "stopping")
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert int(refused.headers["Retry-After"]) > 0
        assert http.get("/health").status_code == 200
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) == 1200
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert begun.wait() == 0
        assert "Traceback" not in begun.err and begun.out == ""


@pytest.mark.parametrize("how", ["a second signal", "the time is over"])
def test_what_does_not_end_is_ended(how: str) -> None:
    options = ("--drain-timeout", "0.3") if how == "the time is over" else ()
    with (
        server(*options) as (begun, http),
        http.stream("POST", "/v1/completions", json=long(4000)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        os.kill(begun.pid, signal.SIGTERM)
        begun.says("stopping: waiting for running requests")
        if how == "a second signal":
            os.kill(begun.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["code"] == "stopping" and len(rest) < 4000
        assert begun.wait() == 0
        assert "Traceback" not in begun.err


def test_who_reads_slowly_gets_the_whole_answer() -> None:
    """After SIGTERM there is as much time to read as to answer, not a few seconds; two read at
    once, a stream and a whole answer."""
    with server() as (begun, http), socket.socket() as whole, socket.socket() as streamed:
        lines = {whole: b"", streamed: b""}
        for line in lines:
            body = {**long(2000), "logprobs": 5, "stream": line is streamed}
            content = json.dumps(body).encode()
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect((http.base_url.host, http.base_url.port or 0))
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            )
        for line in lines:
            lines[line] = line.recv(2048)  # the answer has begun
        os.kill(begun.pid, signal.SIGTERM)
        begun.says("stopping: waiting for running requests")
        end = time.monotonic() + 7  # longer than connections used to be given
        while time.monotonic() < end:
            for line in lines:
                lines[line] += line.recv(512)
            time.sleep(0.05)
        for line in lines:
            while piece := line.recv(65536):
                lines[line] += piece
        assert lines[streamed].endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        text = lines[whole].partition(b"\r\n\r\n")[2]
        assert json.loads(text)["usage"]["completion_tokens"] == 2000
        assert begun.wait() == 0


def test_many_connections_at_once_and_idle_ones() -> None:
    """A burst of connections waits while the server is busy, and is answered.  Connections that are
    open and idle do not hold up the end."""
    with server() as (begun, http):
        assert http.get("/health").status_code == 200
        place = (http.base_url.host, http.base_url.port or 0)
        os.kill(begun.pid, signal.SIGSTOP)  # as busy as can be
        lines = [socket.create_connection(place, timeout=10) for _ in range(100)]
        os.kill(begun.pid, signal.SIGCONT)
        for line in lines:
            with line:
                line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert line.recv(100).startswith(b"HTTP/1.1 200")
        with socket.create_connection(place):
            os.kill(begun.pid, signal.SIGTERM)
            assert begun.wait() == 0


def test_prompts_and_keys_stay_out_of_the_log(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame-17\n")
    with server("--api-key-file", str(keys)) as (begun, http):
        http.headers["Authorization"] = "Bearer sesame-17"
        assert http.post("/v1/completions", json={"prompt": STORY, "max_tokens": 3}).json()["usage"]
        assert http.post("/v1/completions", json={"prompt": STORY, "bogus": 1}).is_client_error
        os.kill(begun.pid, signal.SIGTERM)
        assert begun.wait() == 0
        assert "sesame" not in begun.err and "baker" not in begun.err


def test_a_log_of_json_and_a_key_for_metrics(tmp_path: Path) -> None:
    """Every line is an object, from the first to the last; the key opens what it should."""
    keys = tmp_path / "keys"
    keys.write_text("for-prometheus\n")
    options = ("--log-format", "json", "--access-log", "--metrics-key-file", str(keys))
    with server(*options, "--host", "127.0.0.1") as (begun, http):
        key = {"Authorization": "Bearer for-prometheus", "X-Request-Id": "scrape-1"}
        assert http.get("/metrics", headers=key).status_code == 200
        assert http.get("/metrics").status_code == 401
        os.kill(begun.pid, signal.SIGTERM)
        assert begun.wait() == 0
        lines = [json.loads(line) for line in begun.err.splitlines()]
    assert "pyramidinfer serves" in lines[0]["message"] and "stopping" in lines[-1]["message"]
    (told,) = [each for each in lines if each.get("request_id") == "scrape-1"]
    assert (told["path"], told["status"]) == ("/metrics", 200)
    assert "for-prometheus" not in str(lines)


def test_traces_that_cannot_be_sent_are_one_line() -> None:
    code, _, err = run("serve", *SMALL, "--otel-traces", OTEL_TRACES_EXPORTER="console")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: OTEL_TRACES_EXPORTER=console: traces are sent by OTLP")


def test_without_the_extra_it_is_one_line(tmp_path: Path) -> None:
    """Where FastAPI is missing, say what to install."""
    asked = tmp_path / "in.jsonl"
    asked.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}')
    commands = ["serve", "chat", "batch in.jsonl out.jsonl"]
    for code, err in each_without(["fastapi"], commands, tmp_path):
        assert code == 2
        assert err.strip().splitlines()[-1].startswith("error: this command needs fastapi")
        assert "pip install 'pyramidinfer[server]'" in err and "Traceback" not in err
