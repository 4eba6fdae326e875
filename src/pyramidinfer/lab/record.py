"""Results that say where they come from: commit, machine, configuration."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from pyramidinfer.lab import documents

__all__ = ["commit", "machine", "write_result"]


def commit() -> str:
    """The checkout's commit, with a mark where the code differs from it; ``unknown`` outside one.

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


def machine() -> dict[str, Any]:
    """What it ran on."""
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
    """One JSON file: commit, machine, ``more``, configuration, result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
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
