"""Adapters on the command line: ``generate --lora`` and a batch's ``model``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramidinfer.cli.app import app
from pyramidinfer.lab.bench.adapters import write_adapter
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import empty_model, shipped_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random adapter of the shipped model."""
    made = tmp_path_factory.mktemp("adapters") / "mine"
    write_adapter(made, ModelRunner(empty_model(shipped_model())[0], "reference"), 4, 0)
    return str(made)


def run(*words: str) -> tuple[int, str, str]:
    ran = CliRunner().invoke(app, [*words, "--kv-memory", "32MiB", "--policy", "full"])
    return ran.exit_code, ran.stdout, ran.stderr


def test_generate_with_an_adapter(folder: str) -> None:
    words = ("generate", "--prompt", "Where ?", "--max-tokens", "3", "--lora-modules")
    entry = json.dumps({"name": "mine", "path": folder})
    assert run(*words, entry, "--lora", "mine")[0] == 0
    code, _, told = run(*words, f"mine={folder}")
    assert code == 2 and "--lora-modules mine has no effect without --lora NAME" in told
    code, _, told = run(*words, f"mine={folder}", "--lora", "your")
    assert code == 2 and "lora='your' is unknown" in told and "Traceback" not in told
    code, _, told = run(*words, "mine=no/where/at/all", "--lora", "mine")
    assert code == 2 and "adapter 'mine' (no/where/at/all)" in told


def test_a_chat_changes_its_adapter(folder: str) -> None:
    words = [
        "chat",
        "--max-tokens",
        "2",
        "--kv-memory",
        "32MiB",
        "--lora-modules",
        f"mine={folder}",
    ]
    lines = "Where ?\n/lora\nWhere ?\n/lora your\n/lora mine\nWho ?\n"
    ran = CliRunner().invoke(app, [*words, "--lora", "mine"], input=lines)
    assert ran.exit_code == 0, ran.stderr
    told = ran.stderr
    assert told.index("the model alone") < told.index("lora='your' is unknown")
    assert told.index("lora='your' is unknown") < told.index("adapter mine")
    reused = [line for line in told.splitlines() if "of them reused" in line]
    assert len(reused) == 3 and ", 0 of them" in reused[1]  # another adapter's cache is not used
    ran = CliRunner().invoke(app, [*words, "--lora", "your"], input=lines)
    assert ran.exit_code == 2 and "lora='your' is unknown" in ran.stderr


def test_a_batchs_lines_choose_adapters(folder: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = ["base", "mine", "nobody"]
    lines = [
        {
            "custom_id": name,
            "url": "/v1/completions",
            "body": {"model": name, "prompt": "Where ?", "max_tokens": 2},
        }
        for name in names
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("batch", str(source), str(target), "--model-name", "base")
    run(*words, "--lora-modules", f"mine={folder}")
    found = {}
    for line in map(json.loads, target.read_text().splitlines()):
        found[line["custom_id"]] = line["response"]
    assert [found[name]["status_code"] for name in names] == [200, 200, 404]
    assert found["mine"]["body"]["model"] == "mine"
