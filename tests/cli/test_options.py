"""Options that are dataclasses' fields: command line, environment, file, and which goes first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.cli import serve as serve_module
from pyramidinfer.cli.app import main
from pyramidinfer.cli.choices import ModelOptions
from pyramidinfer.cli.serve import ModelChoice
from pyramidinfer.cli.serving import ServeOptions
from pyramidinfer.config import EngineConfig
from pyramidinfer.options import option_fields, show_bytes
from pyramidinfer.server.settings import ServerSettings
from tests.serve_lines import options_of

Taken = list[tuple[ModelChoice, ServerSettings]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """What ``serve`` would have run with."""
    found: Taken = []
    monkeypatch.setattr(serve_module, "run_serve", lambda *values: found.append(values[:2]))
    return found


def serve(monkeypatch: pytest.MonkeyPatch, *words: str, command: str = "serve") -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", command, *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_every_option_of_serve_is_one_field() -> None:
    fields: list[str] = []
    for kind in (ModelOptions, EngineConfig, ServerSettings, ServeOptions):
        for each in option_fields(kind).values():
            assert each.option.help.endswith(".") and len(each.option.help) > 15, each.name
            fields.append(max(each.flags, key=len))
    assert len(set(fields)) == len(fields)
    assert set(fields) == set(options_of("serve"))


def test_the_command_line_goes_before_the_environment_before_the_file(
    taken: Taken, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: of-the-file\nport: 1\nmax_waiting: 1\nkv-memory: 1MiB\npage: false\n"
        "policies: [full, snapkv]\nallowed-host: a.example\nno-profile: true\n"
        "default-chat-template-kwargs: {deep: true}\nmodel-name: mine\n"
    )
    monkeypatch.setenv("PYRAMIDINFER_MAX_WAITING", "2")
    monkeypatch.setenv("PYRAMIDINFER_KV_MEMORY", "2MiB")
    monkeypatch.setenv("PYRAMIDINFER_CORS_ORIGIN", "https://a https://b")
    monkeypatch.setenv("PYRAMIDINFER_ACCESS_LOG", "1")
    assert serve(monkeypatch, "--config", str(file), "--kv-memory", "3MiB") == 0
    ((choice, settings),) = taken
    assert choice.engine == EngineConfig(kv_memory="3MiB", profile=False)
    assert choice.model == ModelOptions(model="of-the-file")
    assert settings == ServerSettings(
        port=1,
        max_waiting=2,
        page=False,
        policies=("full", "snapkv"),
        allowed_hosts=("a.example",),
        cors_origins=("https://a", "https://b"),
        chat_template_kwargs={"deep": True},
        access_log=True,
        model_name="mine",
    )


def test_a_model_that_stands_alone_goes_before_the_environment(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRAMIDINFER_MODEL", "of-the-environment")
    for words in ((), ("alone",), ("--model", "named")):
        assert serve(monkeypatch, *words) == 0
    models = [choice.model.model for choice, _ in taken]
    assert models == ["of-the-environment", "alone", "named"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv-memroy: 1GiB", "'kv-memroy' is no option; did you mean 'kv-memory'?"),
        ("config: other.yaml", "'config' is no option"),
        ("keep: 0.3\nmax-n: 2\nmax_n: 3", "'max_n' is given twice"),
        ("keep:", "keep has no value"),
        ("- keep", "must hold lines NAME: VALUE"),
        ("keep: [", "is not YAML"),
        ("port: many", "Invalid value for '--port'"),
        ("port: 70000", "port=70000 must lie between 0 and 65535"),
    ],
)
def test_a_bad_file_is_one_line(
    taken: Taken,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    message: str,
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert serve(monkeypatch, "--config", str(file)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line and not taken


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_an_unknown_variable_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("PYRAMIDINFER_KV_MEMROY", "1GiB")
    assert serve(monkeypatch, command=command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "PYRAMIDINFER_KV_MEMROY is unknown; did you mean 'PYRAMIDINFER_KV_MEMORY'?" in line


def test_variables_of_other_commands_and_places_are_known(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SYSTEM", "TOP_P", "CACHE", "API_KEYS"):
        monkeypatch.setenv(f"PYRAMIDINFER_{name}", "1")
    assert serve(monkeypatch) == 0
    assert taken[0][1].api_keys == ("1",)


def test_a_variables_value_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYRAMIDINFER_PORT", "tcp://10.0.0.1:80")  # of a service named so
    assert serve(monkeypatch) == 2
    assert "(env var: 'PYRAMIDINFER_PORT')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1"), (1000, "1000"), (2**16, "64KiB"), (3 * 2**29, "1536MiB")]
)
def test_bytes_are_shown_as_they_are_read(size: int, text: str) -> None:
    assert show_bytes(size) == text


def test_help_names_the_variables(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve(monkeypatch, "--help", command="chat") == 0
    assert "PYRAMIDINFER_KEEP" in capsys.readouterr().out
