"""``pyramidinfer calibrate``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from pyramidinfer.cli.profile import check_place
from pyramidinfer.engine.profiling import ensure_profile, look_up, store_profile
from pyramidinfer.lab.calibrate import Task, calibrate
from pyramidinfer.policies import Full
from pyramidinfer.policies.profile import check_target

__all__ = ["run_calibrate"]


def run_calibrate(task: Task, output: Path | None, as_json: bool) -> None:
    """Measure, rewrite the model's profile, and print the result."""
    if output is not None:
        check_target(output, "the profile")
    llm = task.subject.llm(Full())
    check_place(look_up(llm.engine.runner), output)
    profile, begun = ensure_profile(llm.engine.shared), time.monotonic()
    made = calibrate(llm, profile, task, tell=lambda text: print(text, file=sys.stderr, flush=True))
    seconds = time.monotonic() - begun
    path = store_profile(made) if output is None else made.save(output)
    found = made.calibrated
    assert found is not None
    if as_json:
        print(
            json.dumps(
                {
                    "model": task.subject.model,
                    "path": str(path),
                    "seconds": seconds,
                    "profile": made.as_dict(),
                }
            )
        )
        return
    Console(highlight=False, soft_wrap=True).print(
        f"{found.going}: {found.computed:.0%} of layer-tokens, {found.score:.0%} of the right "
        f"answers that all tokens give at keep={found.keep:g} ({seconds / 60:.1f} minutes)"
    )
    print(path)
