"""Results with their origin: commit, machine, configuration."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from pyramidinfer.lab import documents

__all__ = ["command", "commit", "machine", "write_result"]


#: The option whose value must not appear in a result.
SECRET = "--api-key"


def commit() -> str:
    """The checkout's commit, with a mark if the code differs from it; ``unknown`` outside a
    checkout.

    Results and what is generated from them do not count as code.
    """
    package = Path(documents.__file__).parents[1]

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", *words], cwd=package, capture_output=True, text=True, check=True, timeout=10
        )
        return run.stdout.strip()

    try:
        found = git("describe", "--always", "--abbrev=12")
        changed = git("status", "--porcelain", "--", ".", ":!assets")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{found}-dirty" if changed else found


def command() -> str:
    """The current command line as given, without API keys."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    program, words = [Path(sys.argv[0]).name], sys.argv[1:]
    if program == ["__main__.py"]:
        program = ["pyramidinfer"]
    elif module.startswith("pyramidinfer."):
        program = ["python", "-m", module]
    for at, word in enumerate(words):
        if word == SECRET and at + 1 < len(words):
            words[at + 1] = "…"
        elif word.startswith(f"{SECRET}="):
            words[at] = f"{SECRET}=…"
    return shlex.join([*program, *words])


def machine() -> dict[str, Any]:
    """The machine of a run."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_result(
    path: Path, configuration: dict[str, Any], result: dict[str, Any], **more: Any
) -> Path:
    """One JSON file: command, commit, machine, ``more``, configuration, result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        **more,
        "configuration": configuration,
        "result": result,
    }
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
