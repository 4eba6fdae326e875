"""Processes for tests of several ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.scale.worker import Case

__all__ = ["run_cases"]

ROOT = Path(__file__).parents[2]


def run_cases(cases: list[Case], folder: Path, timeout: float = 600) -> list[dict[str, Any]]:
    """Run cases one after the other on processes that are started once; what rank 0 said."""
    cases = sorted(cases, key=lambda case: -case.ranks)  # who is not needed any longer is done
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]))
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = line.getsockname()[1]
    processes = []
    for rank in range(max(case.ranks for case in cases)):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYRAMIDINFER_CACHE": str(folder),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.scale.worker", str(path)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [each.communicate(timeout=timeout) for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert not any(each.returncode for each in processes), "\n".join(error for _, error in said)
    found = [json.loads(line) for line in said[0][0].splitlines()]
    assert len(found) == len(cases)
    return [{"case": case, **each} for case, each in zip(cases, found, strict=True)]
