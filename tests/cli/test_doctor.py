"""``doctor`` reports what is there and what is not; backends can be chosen by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer.attention import select_backend
from pyramidinfer.cli import doctor
from pyramidinfer.native import NoCompilerError, kernels
from pyramidinfer.native.build import compile_kernels, find_compiler
from tests.commands import run_done as run

PROMPT = ["generate", "--prompt", "The old baker walked to the", "--max-tokens", "4"]


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except NoCompilerError:
        return False


compiled = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@compiled
def test_the_report_is_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run_doctor(as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "triton", "pyramidinfer"} <= found["versions"].keys()
    assert found["threads"] == torch.get_num_threads()
    assert found["compiler"] == find_compiler()
    made = found["kernels"]
    assert made["reason"] is None
    assert made["instructions"] == kernels().instructions
    assert Path(made["path"]) == compile_kernels() and Path(made["path"]).exists()
    for name in ("float32", "bfloat16", "float16"):
        assert (name in made["linears"]) == kernels().multiplies(getattr(torch, name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert found["backend"]["device"].startswith(device)
    assert found["backend"]["name"] == select_backend("auto", device).name
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["huge_pages"] in (None, "always", "madvise", "never")
    doctor.run_doctor(as_json=False)
    shown = "".join(capsys.readouterr().out.split())
    shown = shown.replace("│", "")  # a long path goes over several lines
    for text in (made["path"], made["instructions"], find_compiler(), torch.__version__):
        assert text in shown


@on_cpu
def test_without_a_compiler_it_says_what_to_install() -> None:
    """A report, not an error; nothing but the table is printed."""
    done = run("doctor", CXX="no-such-compiler")
    assert done.returncode == 0 and not done.stderr
    shown = " ".join(done.stdout.replace("│", " ").split())
    assert "apt install g++" in shown
    assert "reference: there is no GPU, and the C++ kernels cannot be built" in shown


@on_cpu
def test_the_fallback_is_told_in_one_line() -> None:
    done = run(*PROMPT, "--json", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("warning: slow attention in plain torch: no C++ compiler was found")
    chosen = run(*PROMPT, "--backend", "reference", "--json", CXX="no-such-compiler")
    assert chosen.returncode == 0 and not chosen.stderr
    assert json.loads(chosen.stdout)["token_ids"] == json.loads(done.stdout)["token_ids"]


def test_a_backend_that_does_not_work_here_is_one_line() -> None:
    done = run(*PROMPT, "--backend", "cpu", "--device", "cpu", CXX="no-such-compiler")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: backend='cpu' does not work here: no C++ compiler")
    assert len(done.stderr.strip().splitlines()) == 1


def test_inspect_needs_no_kernels(tmp_path: Path) -> None:
    """It attends to nothing where the profile is there, so nothing is built nor warned of."""
    done = run("inspect", "--json", PYRAMIDINFER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and not done.stderr
    assert not (tmp_path / "cache").exists()
