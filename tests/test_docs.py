"""What the documents show is run: the README's snippet and commands, the policy example."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cli.app import main
from pyramidinfer.lab.numbers import render
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Policy
from tests.tiny import random_prompt, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_readme_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, with the shipped model in place of the reader's own."""
    snippets = blocks(README, "python")
    assert snippets
    for snippet in snippets:
        assert '"path-or-hub-id"' in snippet
        exec(snippet.replace('"path-or-hub-id"', repr(shipped_model())), {})
    assert "room 472" in capsys.readouterr().out


def commands() -> list[str]:
    lines = "\n".join(blocks(README, "bash")).splitlines()
    return [line for line in lines if line.startswith("pyramidinfer ")]


@pytest.mark.parametrize("line", commands())
def test_readme_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The old baker walked to the market .")
    words = shlex.split(line, comments=True)
    places = {"PATH_OR_HUB_ID": shipped_model(), "prompt.txt": str(prompt)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [places.get(word, word) for word in words])
    if words[1] == "demo":
        sys.argv += ["--documents", "2", "--length", "300"]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


def test_readme_shows_commands() -> None:
    assert {line.split()[1] for line in commands()} == {"demo", "generate", "inspect"}


def test_makefile_has_the_readmes_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_links_and_pictures_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_policy_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    code = blocks((ROOT / "docs" / "add_a_policy.md").read_text(), "python")[0]
    exec(code, module.__dict__)
    chosen: Policy = module.LastLook(budget=20, window=4)
    llm = LLM(tiny_model("llama", torch.float64), policy=chosen, kv_memory="4MiB", page_size=4,
              poison=True)  # fmt: skip
    trace = llm.trace(random_prompt(1, 80), max_tokens=10, protect=[(30, 33)])
    for positions in trace.prefill_positions:
        assert positions.shape == (2, 20)
        for head in positions.tolist():
            assert {30, 31, 32, 76, 77, 78, 79} <= set(head)
    assert trace.kept_len_by_step[-1] == [30] * 4
    outs = llm.generate([random_prompt(i, 50) for i in range(3)], SamplingParams(max_tokens=5))
    assert all(out.kv.bytes < out.kv.full_bytes for out in outs)
    llm.engine.check()


def test_numbers_are_generated_from_committed_results() -> None:
    results = {
        path.stem: json.loads(path.read_text())
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
    }
    assert (ROOT / "docs" / "numbers.md").read_text() == render(results)
    for name, result in results.items():
        assert {"commit", "machine", "configuration", "result"} <= result.keys(), name


def test_readme_repeats_the_committed_demo() -> None:
    """The figures in the README's table are those of the committed run."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["result"]
    for run in figures.values():
        assert f"{run['right']:.0f} of {run['questions']:.0f}" in README
        assert f"{run['output_tokens_per_second']:.0f}" in README
        assert f"{run['first_token_seconds']:.2f} s" in README
