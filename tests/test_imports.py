"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyramidinfer

ROOT = Path(pyramidinfer.__file__).parent
ORDER = [
    {"types", "sampling", "config", "native"},
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


def test_no_policy_is_asked_for_its_class() -> None:
    """No ``isinstance(policy, …)`` outside the registry, which checks what a user handed in."""
    for path in FILES:
        if path.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert "policy" not in ast.unparse(node.args[0]), path


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
