"""kvpress: a compression method around transformers' ``generate``."""

from __future__ import annotations

from typing import Any

import kvpress
from drive_transformers import load_model, run_generate
from driver import Answers, Engine, drive


def load(job: dict[str, Any]) -> Engine:
    model = load_model(job)
    press = getattr(kvpress, job["options"]["press"])(
        compression_ratio=job["options"]["compression_ratio"]
    )

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        with press(model):
            return run_generate(model, prompts, max_new)

    return Engine(generate, ["kvpress", "transformers", "torch"])


if __name__ == "__main__":
    drive(load)
