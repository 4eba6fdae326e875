"""``pyramidinfer demo | inspect | profile | calibrate | verify | doctor``: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from pyramidinfer.cli.choices import (
    DemoOptions,
    DoctorOptions,
    InspectOptions,
    ModelOptions,
    ProfileOptions,
    VerifyOptions,
)
from pyramidinfer.cli.fields import command
from pyramidinfer.config import EngineConfig
from pyramidinfer.lab.plans import Task, VerifyPlan
from pyramidinfer.lab.samples import Subject
from pyramidinfer.options import pick

__all__ = ["add_looking"]


def add_looking(app: typer.Typer) -> None:
    """Register the commands."""
    for each in (demo, inspect, profile, calibrate, verify, doctor):
        command(app)(each)


def demo(
    model: Annotated[ModelOptions, pick("model")],
    asked: DemoOptions,
    engine: Annotated[
        EngineConfig,
        pick("kv_dtype", "weights", "tensor_parallel_size", "pipeline_parallel_size"),
    ],
) -> None:
    """Answer questions on long documents with four policies in equal memory, and draw a picture."""
    from pyramidinfer.cli.demo import run_demo

    run_demo(model.model, asked, engine)


def inspect(
    model: Annotated[ModelOptions, pick("model", "policy", "keep", "option", "dtype")],
    engine: Annotated[EngineConfig, pick("kv_dtype", "weights")],
    asked: InspectOptions,
) -> None:
    """Show what a policy computes and keeps in each layer, and its bytes; generates no text."""
    from pyramidinfer.cli.inspect import run_inspect

    run_inspect(model.model, model.chosen, model.dtype, engine, asked)


def profile(
    where: Annotated[Subject, pick("model", "text", "dtype", "device", kv_memory="128MiB")],
    options: Annotated[ProfileOptions, pick(without=("quick",))],
) -> None:
    """Measure how much of a text each KV head of a model needs, and store it."""
    from pyramidinfer.cli.profile import run_profile

    run_profile(where, options)


def calibrate(
    task: Task, options: Annotated[ProfileOptions, pick("output", "quick", "as_json")]
) -> None:
    """Find the layer after which tokens may be dropped, and store it in the head profile."""
    from pyramidinfer.cli.calibrate import run_calibrate
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    run_calibrate(task.quick() if options.quick else task, options.output, options.as_json)


def verify(
    where: Annotated[
        Subject,
        pick(
            *("model", "text", "kv_memory", "dtype", "kv_dtype", "weights", "device"),
            kv_memory="1GiB",
        ),
    ],
    model: Annotated[ModelOptions, pick("policy", "keep", "option")],
    plan: VerifyPlan,
    options: VerifyOptions,
) -> None:
    """Measure how much of the full cache's quality a policy keeps; exit code 1 if it is below
    --floor."""
    from pyramidinfer.cli.verify import run_verify
    from pyramidinfer.lab.verify import FLOOR

    floor = FLOOR if options.floor is None else options.floor
    if not run_verify(where, model.chosen, floor, plan, options.json):
        raise typer.Exit(1)


def doctor(options: DoctorOptions) -> None:
    """Show the machine's hardware, the kernels and attention backend in use, and why."""
    from pyramidinfer.cli.doctor import run_doctor

    run_doctor(options.as_json)
