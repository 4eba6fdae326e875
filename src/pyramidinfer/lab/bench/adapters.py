"""``bench adapters``: decode steps and prefill of requests that each have one of several LoRA
adapters, compared with those of the model alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.plans import AdaptersPlan
from pyramidinfer.lab.bench.setting import Pass, Rig, progress, run_pass
from pyramidinfer.lab.bench.timing import ratios, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.families import find_family
from pyramidinfer.models.loading import empty_model, shipped_model
from pyramidinfer.models.runner import ModelRunner

__all__ = ["adapter_words", "run_adapters", "write_adapter"]


def run_adapters(plan: AdaptersPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result: a row for each number of adapters."""
    plan.check()
    rig, (spec,) = Rig(plan.setting), plan.setting.policies
    rig.check_length(plan.prompt_len, plan.output_len)
    prompts = rig.prompts(plan.batch, plan.prompt_len)
    counts = (0, *plan.adapters)
    clock = time.process_time if plan.setting.threads == 1 else time.monotonic
    rounds = plan.setting.warmup + plan.setting.repeats
    passes: dict[int, list[Pass]] = {count: [] for count in counts}
    with TemporaryDirectory() as inside, progress("adapters", len(counts) * rounds) as done:
        engines = {count: _engine(plan, rig, spec, count, Path(inside)) for count in counts}
        for repeat in range(rounds):
            for count, engine in engines.items():
                names: list[str | None] = [*engine.adapters]
                names = names or [None]
                loras = [names[index % len(names)] for index in range(plan.batch)]
                run = run_pass(engine, prompts, plan.output_len, loras, clock)
                if repeat >= plan.setting.warmup:
                    passes[count].append(run)
                done(f"{count} adapters")
    rows = [{"adapters": count, **_figures(passes[0], passes[count])} for count in counts]
    result = {"backend": rig.shared.backend.name, "rows": rows}
    write_result(out, plan.configuration, result)
    return result


def _engine(plan: AdaptersPlan, rig: Rig, spec: str, count: int, inside: Path) -> Engine:
    modules = {}
    for number in range(count):
        folder = inside / f"{count}-{number}"
        write_adapter(folder, rig.shared, plan.rank, plan.setting.seed + number)
        modules[f"adapter-{number}"] = str(folder)
    return rig.engine(spec, plan.batch, plan.prompt_len, plan.output_len, lora_modules=modules)


def write_adapter(folder: Path, runner: Any, rank: int, seed: int) -> None:
    """A random adapter on all linears of a model's layers, as peft would save it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for place, linear in runner.body.named_modules():
        if place.startswith("layers.") and isinstance(linear, nn.Linear):
            name = f"base_model.model.{find_family(runner.config).body}.{place}"
            for which, *sizes in (
                ("A", rank, linear.in_features),
                ("B", linear.out_features, rank),
            ):
                tensor = torch.randn(*sizes, generator=draw) * 0.01
                tensors[f"{name}.lora_{which}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")


def adapter_words(model: str | None, count: int, folder: Path) -> list[str]:
    """Arguments of ``pyramidinfer serve`` for this many random adapters, written into ``folder``.

    model : as for ``serve``; None is the shipped model.
    """
    if not count:
        return []
    runner = ModelRunner(empty_model(model or shipped_model())[0], "reference")
    words = []
    for number in range(count):
        name = f"adapter-{number}"
        write_adapter(folder / name, runner, 4, number)
        words += ["--lora-modules", f"{name}={folder / name}"]
    return words


def _figures(base: list[Pass], mine: list[Pass]) -> dict[str, Any]:
    steps = [[float(np.median(each.step_seconds())) for each in runs] for runs in (base, mine)]
    prefills = [[each.prefill_seconds for each in runs] for runs in (base, mine)]
    return {
        "step_seconds": spread(steps[1]),
        "prefill_seconds": spread(prefills[1]),
        "step_ratio": ratios(steps[1], steps[0]),
        "prefill_ratio": ratios(prefills[1], prefills[0]),
    }
