"""``pyramidinfer demo``, ``inspect`` and ``doctor``: their options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pyramidinfer.cli.choices import ModelOptions
from pyramidinfer.cli.fields import command
from pyramidinfer.config import EngineConfig
from pyramidinfer.options import Option, at_least, check_options, pick

__all__ = ["DemoOptions", "InspectOptions", "add_looking"]

AsJson = Annotated[bool, Option("Print one JSON object.", flags=("--json",))]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo asks, and in which memory; None is what suits the model."""

    fetch: Annotated[
        str | None,
        Option("Download this model and run on it; where that fails, on the shipped one."),
    ] = None
    documents: Annotated[
        int | None, Option("Documents, each with one question.", unset="24, or 15 for --fetch")
    ] = None
    length: Annotated[
        int | None, Option("Tokens of each document.", unset="2000, or 1500 for --fetch")
    ] = None
    kv_memory: Annotated[
        str | None, Option("Memory for all caches.", unset="64MiB, or 256MiB for --fetch")
    ] = None
    keep: Annotated[
        float | None, Option("Share of the cache that is kept.", unset="0.3, or 0.25 for --fetch")
    ] = None
    out: Annotated[Path, Option("Folder for the picture and the figures.")] = Path("out")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The request that is forecast."""

    prompt_len: Annotated[int, Option("Tokens of the prompt.", check=at_least(1))] = 2048
    max_tokens: Annotated[int, Option("Tokens to generate, at most.", check=at_least(1))] = 256
    as_json: AsJson = False

    def __post_init__(self) -> None:
        check_options(self, as_flags=True)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """How the report is printed."""

    as_json: AsJson = False


def add_looking(app: typer.Typer) -> None:
    """Register the commands."""
    for each in (demo, inspect, doctor):
        command(app)(each)


def demo(
    model: Annotated[ModelOptions, pick("model")],
    asked: DemoOptions,
    engine: Annotated[
        EngineConfig,
        pick("kv_dtype", "weights", "tensor_parallel_size", "pipeline_parallel_size"),
    ],
) -> None:
    """Answer questions about long documents in one memory budget, four ways, and draw it."""
    from pyramidinfer.cli.demo import run_demo

    run_demo(model.model, asked, engine)


def inspect(
    model: Annotated[ModelOptions, pick("model", "policy", "keep", "option", "dtype")],
    engine: Annotated[EngineConfig, pick("kv_dtype", "weights")],
    asked: InspectOptions,
) -> None:
    """Show what a policy would compute and keep in each layer, and the bytes; generates nothing."""
    from pyramidinfer.cli.inspect import run_inspect

    run_inspect(model.model, model.chosen, model.dtype, engine, asked)


def doctor(options: DoctorOptions) -> None:
    """Tell what this machine has, which kernels and attention backend are in use, and why."""
    from pyramidinfer.cli.doctor import run_doctor

    run_doctor(options.as_json)
