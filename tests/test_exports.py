"""What the package gives out is what it says."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import pyramidinfer

ROOT = Path(pyramidinfer.__file__).parent
MODULES = sorted(
    "pyramidinfer." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)
#: Modules that cannot be imported without the extra ``ray``, and say so in a line.
WITH_RAY = {f"pyramidinfer.integrations.{name}" for name in ("ray_data", "ray_serve")}


def test_public_names() -> None:
    assert sorted(pyramidinfer.__all__) == [
        "Full",
        "KVUsage",
        "LLM",
        "Prefix",
        "Pyramid",
        "PyramidInfer",
        "RequestMetrics",
        "RequestOutput",
        "SamplingParams",
        "Score",
        "StructuredOutputsParams",
        "Trace",
    ]
    assert len(pyramidinfer.__all__) <= 12


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist(name: str) -> None:
    if name in WITH_RAY and find_spec("ray") is None:
        with pytest.raises(ImportError, match=r"pip install 'pyramidinfer\[ray\]'"):
            importlib.import_module(name)
        return
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} says nothing about itself"
    for each in getattr(module, "__all__", []):
        assert hasattr(module, each), f"{name}.__all__ names {each}"


def test_extras() -> None:
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    extras = {"server", "lab", "lm_eval", "peft", "otel", "ray", "gpu", "dev", "docs", "all"}
    assert set(project["optional-dependencies"]) == extras


def test_the_version_is_written_once() -> None:
    """``__version__`` is it; the package's metadata and the newest entry of the log follow."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    attribute = {"attr": "pyramidinfer.__version__"}
    assert project["tool"]["setuptools"]["dynamic"]["version"] == attribute
    assert metadata("pyramidinfer")["Version"] == pyramidinfer.__version__
    log = (ROOT.parents[1] / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[(\d[^]]*)\]", log, re.MULTILINE)[0]
    assert newest == pyramidinfer.__version__
