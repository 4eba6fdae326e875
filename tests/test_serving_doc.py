"""docs/serving.md agrees with the command line, the metrics and the protocol, and its code runs."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyramidinfer import LLM
from pyramidinfer.cli import options_page
from pyramidinfer.cli.app import main
from pyramidinfer.config import parse_bytes
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.server import jobs
from pyramidinfer.server.protocol import ChatRequest, CompletionRequest
from pyramidinfer.server.protocol_base import Compression
from pyramidinfer.server.protocol_responses import ResponseRequest
from pyramidinfer.server.response_store import MOST_BYTES, MOST_RESPONSES
from pyramidinfer.server.run import HEAD_TIMEOUT
from tests.serve_lines import code_lines, options_of, parsed
from tests.server.live import Live, serving

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
URL = "http://127.0.0.1:8000"


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return str(found)


def rows(text: str) -> list[list[str]]:
    """The cells of a section's table rows, without their heads."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    rules = [at for at, row in enumerate(cells) if set("".join(row)) == {"-"}]
    return [row for at, row in enumerate(cells) if not {at, at + 1} & set(rules)]


def block(after: str, language: str = "") -> str:
    """The first code block of a language behind a text."""
    text = PAGE[PAGE.index(after) + len(after) :]
    found = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """As the page starts it."""
    (words,) = [line for line in code_lines(section("Run")) if line[0] == "serve"]
    options = parsed(words)
    assert options["port"] == 8000
    llm = LLM(
        shipped_model(), options["policy"], keep=options["keep"], kv_memory=options["kv_memory"]
    )
    with serving(llm) as live:
        yield live


# --- what it lists --------------------------------------------------------------------------------


def test_the_options_are_generated() -> None:
    """``make pages`` writes what stands there, and the command line has no other option."""
    assert options_page.render(PAGE) == PAGE
    listed = {}
    for names, *_ in rows(section("Configure")):
        found = re.findall(r"`(-[\w-]+)`", names)
        if found and found != ["--OPTION VALUE"]:
            listed[next(name for name in found if name.startswith("--"))] = set(found)
    options = options_of("serve")
    assert listed == {
        name: {*option.opts, *option.secondary_opts} for name, option in options.items()
    }


def test_its_file_of_options_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(block("## Configure", "yaml"))
    taken = parsed(["serve", "--config", str(file), "--keep", "0.5"])
    assert taken["keep"] == 0.5 and taken["kv_memory"] == "8GiB"
    assert taken["policies"] == "full,snapkv"
    assert taken["cors_origin"] == ["https://chat.example.com"]


def test_every_metric_is_listed_with_its_type(live: Live) -> None:
    endings = {"counter": "_total", "info": "_info"}
    found = {}
    for metric in live.service.metrics.registry.collect():
        found[metric.name + endings.get(metric.type, "")] = metric.type
    listed = {name.strip("`"): kind for name, kind, _ in rows(section("Observe"))}
    assert listed == found


def test_queries_and_alerts_name_metrics_there_are(live: Live) -> None:
    live.complete()
    shown = set(re.findall(r"^([\w:]+)(?:\{| )", live.http.get("/metrics").text, re.MULTILINE))
    shown |= {f"{name}_total" for name in ("pyramidinfer:requests_rejected",)}  # had by none yet
    asked = re.findall(r"(?:vllm|pyramidinfer):\w+", PAGE)
    assert asked and set(asked) <= shown | {each.removesuffix("_bucket") for each in shown}


def test_every_field_of_a_request_is_listed() -> None:
    listed = {
        name for row in rows(section("OpenAI API")) for name in re.findall(r"`(\w+)`", row[0])
    }
    fields = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert listed == set(fields)
    of_responses = {
        name for row in rows(section("Responses")) for name in re.findall(r"`(\w+)`", row[0])
    }
    assert of_responses == set(ResponseRequest.model_fields)
    shown = {row[0].strip("`") for row in rows(section("Compression, request by request"))}
    assert shown >= Compression.model_fields.keys()


def test_every_field_of_the_usage_is_listed(live: Live) -> None:
    usage = live.complete().json()["usage"]
    text = section("Compression, request by request")
    listed = {name for row in rows(text) for name in re.findall(r"`([\w.]+)`", row[0])}
    assert usage.keys() - {"prompt_tokens_details"} <= listed
    (name,) = usage["prompt_tokens_details"]
    assert f"prompt_tokens_details.{name}" in listed


def test_every_route_is_named(live: Live) -> None:
    for path in live.http.get("/openapi.json").json()["paths"]:
        assert f" {path.replace('{model}', 'NAME')}`" in PAGE or f"`{path}`" in PAGE, path


def test_the_statuses_are_what_it_says(live: Live) -> None:
    """400 for what is not there, 404 for another model, and no JSON from the shipped model."""
    turns = [{"role": "user", "content": "Where is the archive ?"}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for refused in (
        {"tools": [tool], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"unheard_of": 1},
        {"messages": [{"role": "user", "content": image}]},
        {"max_tokens": 5000},
        {"n": 9},
        {"compression": {"policy": "full", "keep": 0.5}},
        {"compression": {"keep": 0.001}},
        {"compression": {"policy": "h2o"}},
    ):
        answer = live.http.post("/v1/chat/completions", json={"messages": turns, **refused})
        assert answer.status_code == 400, refused
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert live.complete(suffix="x").status_code == 400
    assert live.complete(echo=True, logprobs=1).status_code == 400
    assert live.complete(echo=True, logprobs=1, compression={"policy": "full"}).is_success
    assert live.complete(model="another").status_code == 404


# --- what it shows --------------------------------------------------------------------------------


def test_all_its_commands_parse() -> None:
    lines = code_lines(PAGE)
    assert {words[0] for words in lines} == {"serve", "inspect", "batch", "bench"}
    for words in lines:
        parsed(words)


def test_its_python_runs_and_prints_what_it_shows(live: Live) -> None:
    code = block("## Run", "python")
    assert code.count(URL) == 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace(URL, live.url), {})
    shown, found = block(code + "```").splitlines(), printed.getvalue().splitlines()
    assert len(shown) == len(found) == 4
    for mine, its in zip(shown, found, strict=True):
        if mine.startswith("{"):  # bytes and kept tokens are the same on every machine
            assert ast.literal_eval(mine) == ast.literal_eval(its)
        else:
            assert mine == its


def test_its_responses_go_on(live: Live) -> None:
    code = block("## Responses", "python")
    printed = io.StringIO()
    with live.openai() as client, contextlib.redirect_stdout(printed):
        exec(code, {"client": client})
    assert int(printed.getvalue().split()[-1]) > 0  # of the first turn's cache


def test_its_curl_is_answered_as_shown(live: Live) -> None:
    (body,) = re.findall(r"-d '(\{.*?\})'", block("stops it.", "bash"), flags=re.DOTALL)
    answer = live.http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    ).json()
    for volatile in ("id", "created"):
        answer.pop(volatile)
    shown = re.sub(r'"(id|created)":("[^"]*"|\d+),', "", block("stops it.", "json"))
    live.settle()
    assert ast.literal_eval(python(shown)) == answer


def python(text: str) -> str:
    return text.replace("null", "None").replace("true", "True").replace("false", "False").strip()


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


def test_the_worked_example_is_what_inspect_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [words for words in code_lines(section("Size the memory")) if words[0] == "inspect"]
    for words, shown in zip(lines, block("Their last lines:").splitlines(), strict=True):
        run(words, monkeypatch)
        assert capsys.readouterr().out.splitlines()[-1] == shown


def test_its_batch_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (words,) = [words for words in code_lines(PAGE) if words[0] == "batch"]
    monkeypatch.chdir(tmp_path)
    Path(words[1]).write_text(block("## Batch and chat", "json"))
    run(words, monkeypatch)
    answers = [ast.literal_eval(python(line)) for line in Path(words[2]).read_text().splitlines()]
    assert {each["custom_id"] for each in answers} == {"a", "b"}
    assert [each["response"]["status_code"] for each in answers] == [200, 200]


def test_the_proxies_limits_are_the_servers() -> None:
    options = {name: option.default for name, option in options_of("serve").items()}
    for language, pattern in (
        ("nginx", r"client_max_body_size (\w+);"),
        ("caddy", r"max_size (\w+)"),
    ):
        (size,) = re.findall(pattern, block("## Secure", language))
        assert parse_bytes(size) >= parse_bytes(options["--max-body"])
        assert f"127.0.0.1:{options['--port']}" in block("## Secure", language)
    nginx = block("## Secure", "nginx")
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", nginx)
    assert int(seconds) > options["--request-timeout"]
    assert "proxy_buffering off;" in nginx


def test_numbers_in_the_text_are_the_codes(live: Live) -> None:
    settings = live.service.settings
    assert f"the {MOST_RESPONSES} used last" in PAGE and f"in {MOST_BYTES // 2**20} MiB;" in PAGE
    assert f"texts of {jobs.MAX_STOP_LENGTH} characters" in PAGE
    assert f"up to {settings.max_logprobs} of the likeliest" in PAGE
    assert settings.body_timeout == HEAD_TIMEOUT == 30 and "within 30 s each" in PAGE
