"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyramidinfer
from tests.commands import each_without

ROOT = Path(pyramidinfer.__file__).parent
ORDER = [
    {"types", "sampling", "options", "config", "native", "codec", "triton_codec"},
    {"policies", "attention", "cache"},
    {"models"},
    {"engine"},
    {"server", "integrations", "lab"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
#: ``config``, ``types`` and ``native`` may be used by each other and by all; the three never meet.
APART = {"policies", "attention", "cache"}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every part of the package a file imports, lazily and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "pyramidinfer":
                names = [f"pyramidinfer.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pyramidinfer.")}
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    mine = part(path)
    for other in imported(path):
        assert other in RANK, f"{path}: {other} has no place in the order"
        if other != mine:
            assert RANK[other] <= RANK[mine], f"{path} ({mine}) imports {other}"
            assert not {mine, other} <= APART, f"{mine} and {other} must meet in models only"


def file_of(name: str) -> Path | None:
    """The file of a module or package of ours; None for what is neither."""
    inside = ROOT.joinpath(*name.split(".")[1:])
    found = [inside.with_suffix(".py"), inside / "__init__.py"]
    return next(
        (each for each in found if name.startswith("pyramidinfer.") and each.exists()), None
    )


def modules(path: Path) -> set[Path]:
    """Files of the package that a file imports, lazily and under TYPE_CHECKING too: the file of
    every module that is named, and a package's ``__init__`` for a name that it hands on."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            found |= {file_of(f"{whole}.{alias.name}") or file_of(whole) for alias in node.names}
    return {each for each in found if each is not None} - {path}


def test_no_files_import_each_other_in_a_circle() -> None:
    others = {path: modules(path) for path in FILES}
    while free := [path for path, known in others.items() if not known & others.keys()]:
        for path in free:
            del others[path]
    while free := [path for path in others if not any(path in each for each in others.values())]:
        for path in free:  # those that only use what is in a circle
            del others[path]
    circles = sorted(str(path.relative_to(ROOT)) for path in others)
    assert not circles, f"these import each other, directly or by way of others: {circles}"


def test_no_policy_is_asked_for_its_class() -> None:
    """No ``isinstance(policy, …)`` outside the registry, which checks what a user handed in."""
    for path in FILES:
        if path.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert "policy" not in ast.unparse(node.args[0]), path


LAB_ALONE = "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'scipy']));"


def test_the_engine_needs_nothing_of_the_lab() -> None:
    """All but ``lab`` is imported, and a model answers, without matplotlib and scipy."""
    parts = [path.relative_to(ROOT.parent).with_suffix("") for path in FILES]
    others = {"lab", "integrations", "__main__", "triton_kernels", "triton_ops", "triton_compact"}
    names = [".".join(path.parts) for path in parts if not others & set(path.parts)]
    lab = {"cli.demo", "cli.verify", "cli.calibrate"}  # commands of the lab
    names = [name for name in names if not any(name.endswith(each) for each in lab)]
    code = (
        f"{LAB_ALONE} import importlib; [importlib.import_module(each) for each in {names}];"
        "from pyramidinfer import LLM, SamplingParams;"
        "from pyramidinfer.models.loading import shipped_model;"
        "llm = LLM(shipped_model(), kv_memory='32MiB');"
        "print(llm.generate('The old baker', SamplingParams(max_tokens=3))[0].token_ids)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(",") == 2


def test_what_the_lab_needs_is_named(tmp_path: Path) -> None:
    commands = ["demo", "study icr", "bench kernels", "calibrate", "verify"]
    for code, err in each_without(["matplotlib", "scipy"], commands, tmp_path):
        assert code == 2 and "Traceback" not in err
        assert "pip install 'pyramidinfer[lab]'" in err


def test_importing_does_nothing() -> None:
    code = (
        "import sys, logging, torch; from transformers import AttentionInterface;"
        "before = set(AttentionInterface._global_mapping), torch.get_num_threads(), "
        "len(logging.root.handlers);"
        "import pyramidinfer; pyramidinfer.LLM;"
        "after = set(AttentionInterface._global_mapping), torch.get_num_threads(), "
        "len(logging.root.handlers);"
        "assert before == after; assert not torch.cuda.is_initialized();"
        "assert 'matplotlib' not in sys.modules and 'typer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
