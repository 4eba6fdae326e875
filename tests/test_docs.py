"""What the documents show is run: the README's snippet and commands, the policy example."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch

import pyramidinfer
from pyramidinfer import LLM, SamplingParams, policies
from pyramidinfer.cli.app import main
from pyramidinfer.lab import calibrate, methods
from pyramidinfer.lab.numbers import render
from pyramidinfer.lab.numbers_studies import load_results
from pyramidinfer.lab.samples import Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES, Policy, make_policy
from tests.policies import judge, test_judges, test_matrix, test_options, test_pyramidinfer
from tests.tiny import lengths_of, of_layers, random_prompt, tiny_model

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


@pytest.mark.parametrize("page", ["transformers.md", "heads.md"])
def test_a_pages_python_runs(page: str) -> None:
    """As it stands, with the shipped model in place of the reader's own."""
    (snippet,) = blocks((ROOT / "docs" / page).read_text(), "python")
    exec(snippet.replace('"path-or-hub-id"', repr(shipped_model())), {})


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_python_on_every_page_names_what_there_is(page: Path) -> None:
    """Every block compiles, and what it imports of this package can be imported."""
    for block in blocks(page.read_text(), "python"):
        tree = ast.parse(textwrap.dedent(block))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyramidinfer"):
                if "ray" in str(node.module) and find_spec("ray") is None:
                    continue
                module = import_module(str(node.module))
                missing = [each.name for each in node.names if not hasattr(module, each.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


def commands(text: str = README) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).splitlines()
    return [line for line in lines if line.startswith("pyramidinfer ")]


#: What makes a command of the documents small enough for a test.
SMALL = {
    "demo": ["--documents", "2", "--length", "300"],
    "generate": ["--max-tokens", "3"],
    "calibrate": ["--quick", "--output", "mine.json"],
    "study quality": ["--contexts", "100", "--samples", "1"],
    "study icr": ["--context", "100", "--samples", "2", "--layers", "4", "--shares", ".5"],
    "study rac": ["--context", "100", "--samples", "2"],
    "study map": ["--context", "100"],
}


def run_command(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command as it stands, with the shipped model, in a folder that holds what it reads."""
    (folder / "prompt.txt").write_text("The old baker walked to the market .")
    (folder / "text.txt").write_text("The storm touched the bridge . " * 50)
    few = partial(replace, context=300, samples=1, passages=1)
    monkeypatch.setattr(calibrate.Task, "quick", lambda self: few(self))
    build = Subject.llm  # a pool of 512 MiB takes longer to make than such a study to run
    monkeypatch.setattr(
        Subject, "llm", lambda self, policy: build(replace(self, kv_memory="16MiB"), policy)
    )
    words = shlex.split(line, comments=True)
    name = " ".join(words[1:3] if words[1] == "study" else words[1:2])
    words = [shipped_model() if word == "PATH_OR_HUB_ID" else word for word in words]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", words + SMALL.get(name, []))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


@pytest.mark.parametrize("line", [line for line in commands() if " serve " not in line])
def test_readme_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command(line, tmp_path, monkeypatch)


def test_readme_server_answers() -> None:
    """What the README starts answers what the README asks, and SIGTERM ends it."""
    (line,) = (line for line in commands() if " serve " in line)
    (curl,) = re.findall(r"^(curl .+?})'$", README, flags=re.MULTILINE | re.DOTALL)
    words = shlex.split(line, comments=True)[1:]
    command = [sys.executable, "-m", "pyramidinfer", *words, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            told = next(line for line in process.stderr if " serves " in line)
            asked = shlex.split(f"{curl}'")
            url = asked[1].replace("http://127.0.0.1:8000", told.split()[-1])
            answer = httpx.post(url, json=json.loads(asked[-1]), timeout=60, trust_env=False)
            assert "room 472" in answer.json()["choices"][0]["message"]["content"]
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_readme_shows_commands() -> None:
    shown = {line.split()[1] for line in commands()}
    known = {*SMALL, "inspect", "study", "doctor", "serve", "profile"}
    assert {"demo", "generate", "inspect", "serve"} <= shown <= known


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


# --- adding a policy ------------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "add_a_policy.md").read_text()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The guide's file, imported and registered as it says; and its second class."""
    module = ModuleType("last_look")
    monkeypatch.setitem(sys.modules, "last_look", module)
    code = [block for block in blocks(GUIDE, "python") if "\nclass " in block]
    (first, second) = code
    exec(first, module.__dict__)
    exec(second, module.__dict__)
    for kind in (module.LastLook, module.HalfLook):
        monkeypatch.setitem(POLICIES, kind.name, kind)
    return module


def tiny(policy: Policy) -> LLM:
    return LLM(
        tiny_model("llama", torch.float64),
        policy=policy,
        kv_memory="4MiB",
        page_size=4,
    )


def test_the_policy_example_works(added: ModuleType) -> None:
    llm = tiny(added.LastLook(capacity=20, window=4))
    trace = llm.trace(random_prompt(1, 80), max_tokens=10, protect=[(30, 33)])
    for positions in trace.prefill_positions:
        assert list(map(len, positions)) == [20, 20]
        for head in positions:
            assert {30, 31, 32, 76, 77, 78, 79} <= set(head.tolist())
    assert of_layers(trace.kept_len_by_step[-1]) == [30] * 4
    outs = llm.generate([random_prompt(i, 50) for i in range(3)], SamplingParams(max_tokens=5))
    assert all(out.kv.bytes < out.kv.full_bytes for out in outs)
    llm.engine.check()


def test_the_example_that_computes_less_works(added: ModuleType) -> None:
    policy = added.HalfLook(keep=0.4, window=4)
    trace = tiny(policy).trace(random_prompt(1, 80), protect=[(30, 33)])
    assert trace.computed_by_layer == [80, 40, 40, 40]
    assert lengths_of(trace.prefill_positions) == [32] * 4
    for positions in trace.prefill_positions:
        assert all({30, 31, 32, 79} <= set(head.tolist()) for head in positions)


@pytest.mark.parametrize("name", ["last_look", "half_look"])
def test_the_registrys_tests_take_the_example(added: ModuleType, name: str) -> None:
    for dtype in test_matrix.DTYPES:
        test_matrix.test_a_ragged_batch_equals_each_alone(name, "reference", dtype, new=8)
    test_pyramidinfer.test_protected_spans_survive_every_policy(name)
    test_pyramidinfer.test_forecast_bounds_what_happens(name, 200, 70)
    if name == "last_look":
        test_matrix.test_bytes_fall_with_keep(name, "reference")
    for option in fields(POLICIES[name]):
        test_options.test_wrong_values_are_shown(name, option)


def test_the_examples_judge_agrees(added: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (each for each in blocks(GUIDE, "python") if each.startswith("    def last_look"))
    space: dict[str, Any] = dict(vars(judge))
    exec(textwrap.dedent(code), space)
    monkeypatch.setattr(judge.Judge, "last_look", space["last_look"], raising=False)
    monkeypatch.setattr(test_judges, "PER_HEAD", {*test_judges.PER_HEAD, "last_look"})
    (case,) = re.findall(r'`(\("last_look", .+?\))`', GUIDE)
    line = eval(case, {"SPANS": test_judges.SPANS})
    test_judges.test_method_equals_its_judge(*line)


def test_the_guides_commands_run(
    added: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands(GUIDE)
    assert {" ".join(line.split()[1:3]) for line in lines} >= {"study quality", "study map"}
    for line in lines:
        run_command(line, tmp_path, monkeypatch)
    rows = json.loads((tmp_path / "out" / "look.json").read_text())["rows"]
    assert {"full", "last_look", "snapkv"} == {row["policy"] for row in rows}


def test_the_example_gets_a_section(added: ModuleType) -> None:
    page = methods.render({}, {"last_look": added.LastLook})
    assert "## last_look" in page and "Deviation" in page
    assert all(option.text for option in methods.options(added.LastLook))


# --- generated pages ------------------------------------------------------------------------------


def test_methods_are_generated_from_docstrings_and_results() -> None:
    """``make pages`` writes what stands there."""
    assert (ROOT / "docs" / "methods.md").read_text() == methods.render(load_results(ROOT))


def test_numbers_are_generated_from_committed_results() -> None:
    assert (ROOT / "docs" / "numbers.md").read_text() == render(load_results(ROOT))


def test_results_say_where_they_come_from() -> None:
    for name, result in load_results(ROOT).items():
        assert is_result(result), name


def is_result(found: dict[str, Any]) -> bool:
    """A result or a study that says where it comes from."""
    origin = {"commit", "machine"}
    if "rows" in found:
        return {*origin, "study", "configuration"} <= found["meta"].keys()
    return {*origin, "configuration", "result"} <= found.keys()


def test_every_method_can_be_had_as_its_section_says() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    lines = [line for block in blocks(page, "python") for line in block.splitlines()]
    for line, (name, kind) in zip(lines, POLICIES.items(), strict=True):
        (made,) = re.findall(r"policy=(.+)\)$", line)
        assert eval(made, {kind.__name__: getattr(policies, kind.__name__)}) == make_policy(
            name, None if name == "full" else 0.45
        )


@pytest.mark.parametrize("line", commands((ROOT / "docs" / "methods.md").read_text()))
def test_methods_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command(line, tmp_path, monkeypatch)


# --- the README's figures -------------------------------------------------------------------------


def test_readme_repeats_the_committed_demo() -> None:
    """The figures in the README's table are those of the committed run."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "demo_real.json").read_text())["result"]
    for run in figures.values():
        assert f"{run['right']:.0f} of {run['questions']:.0f}" in README
        assert f"{run['output_tokens_per_second']:.0f}" in README
        assert f"{run['first_token_seconds']:.2f} s" in README


def test_the_files_that_answer_questions_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "where.md").read_text())
    assert len(named) > 20
    assert [each for each in named if not (ROOT / "src" / "pyramidinfer" / each).exists()] == []


def test_the_map_names_every_file() -> None:
    """Package by package; files of a nested folder are named without their ending."""
    code = ROOT / "src" / "pyramidinfer"
    page = (ROOT / "docs" / "architecture.md").read_text()
    parts = dict(re.findall(r"\*\*`(\w+)/`\*\*[^`]*```\n(.*?)```", page, flags=re.DOTALL))
    packages = {each.name for each in code.iterdir() if (each / "__init__.py").exists()}
    assert set(parts) == packages
    assert all(each.name in page for each in code.glob("[!_]*.py"))
    for package, text in parts.items():
        for suffix in ("py", "h", "cpp"):
            found = {each.name for each in (code / package).glob(f"*.{suffix}")} - {"__init__.py"}
            named = set(re.findall(rf"\b\w+\.{suffix}\b", text))
            assert named == found, package
        nested = {each.stem for each in (code / package).glob("*/*.py")} - {"__init__"}
        assert nested <= set(re.findall(r"\w+", text)), package


# --- the site -------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_output(path: Path) -> None:
    """``make docs`` runs them; what is committed is what a reader runs."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] for cell in code)
    assert all(cell["execution_count"] is None for cell in code)
    assert cells[0]["source"][0].startswith("# ")


def test_the_reference_has_all_public_names() -> None:
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
    named = set(re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.MULTILINE))
    for name in pyramidinfer.__all__:
        module = getattr(pyramidinfer, name).__module__
        assert named & {module, f"{module}.{name}"}, name
    for kind in POLICIES.values():
        assert kind.__module__ in named
