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

__all__ = ["run_calibrate"]


def run_calibrate(task: Task, output: Path | None, as_json: bool) -> None:
    """Measure, write the model's profile anew, and say what was found."""
    llm = task.subject.llm(Full())
    check_place(look_up(llm), output)
    profile, begun = ensure_profile(llm), time.monotonic()
    made = calibrate(llm, profile, task, tell=lambda text: print(text, file=sys.stderr, flush=True))
    seconds = time.monotonic() - begun
    path = store_profile(made) if output is None else made.save(output)
    found = made.calibrated
    assert found is not None
    if as_json:
        print(json.dumps({
            "model": task.subject.model, "path": str(path), "seconds": seconds,
            "profile": made.as_dict(),
        }))  # fmt: skip
        return
    going = (
        f"{found.propagate_ratio:.0%} of the text"
        if found.propagate_ratio < 1
        else "what the fullest deeper head keeps"
    )
    Console(highlight=False, soft_wrap=True).print(
        f"after layer {found.start_layer} of {made.layers}, {going} goes deeper: "
        f"{found.computed:.0%} of layer-tokens, {found.score:.0%} of the right answers that all "
        f"tokens give at keep={found.keep:g} ({seconds / 60:.1f} minutes)"
    )
    print(path)
