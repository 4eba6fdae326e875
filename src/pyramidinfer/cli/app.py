"""``pyramidinfer demo | generate | serve | chat | batch | inspect | calibrate | study | …``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import pyramidinfer
from pyramidinfer.cli.bench import bench
from pyramidinfer.cli.common import DEFAULT_POLICY, plain_errors, policy_from
from pyramidinfer.cli.looking import add_looking
from pyramidinfer.cli.models import add_models
from pyramidinfer.cli.old import Dtype, Keep, KvDtype, Model, Options, PolicyName, names_model
from pyramidinfer.cli.profile import add_profile
from pyramidinfer.cli.serving import add_serving
from pyramidinfer.cli.study import study, subject
from pyramidinfer.cli.study_real import add_real

__all__ = ["app", "main"]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pyramidinfer {pyramidinfer.__version__}")
        raise typer.Exit


app = typer.Typer(
    name="pyramidinfer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(study, name="study")
app.add_typer(bench, name="bench")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Language model inference in which fewer tokens are computed and fewer are kept."""


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
@plain_errors()
@names_model
def calibrate(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The profile. Default: in the user's cache folder."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the work.")] = False,
    keep: Annotated[float, typer.Option(help="The budget that is measured at.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    kv_memory: Annotated[str, typer.Option(help="Memory for the cache.")] = "512MiB",
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Find after which layer of a model tokens may be dropped, and write it into its profile."""
    from pyramidinfer.cli.calibrate import run_calibrate
    from pyramidinfer.lab.calibrate import Task

    task = Task(replace(subject(model, text, dtype, device), kv_memory=kv_memory), keep, seed=seed)
    run_calibrate(task.quick() if quick else task, output, as_json)


add_looking(app)
add_serving(app)
add_models(app)
add_profile(app)
add_real(study)


@app.command()
@plain_errors()
@names_model
def verify(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Share of the full cache's quality to be kept. Default: 0.8."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1000,
    seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 100.0,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text for needles, text and long answers. Default: real English."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    kv_memory: Annotated[str, typer.Option(help="Memory for the cache.")] = "1GiB",
    dtype: Dtype = "float32",
    kv_dtype: KvDtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Tell what share of the full cache's quality a setting keeps here; exit 1 below the floor."""
    from pyramidinfer.cli.verify import run_verify
    from pyramidinfer.lab.verify import FLOOR, Plan

    floor = FLOOR if floor is None else floor
    chosen = policy_from(policy, keep, option or [])
    where = subject(model, text, dtype, device)
    where = replace(where, kv_memory=kv_memory, kv_dtype=kv_dtype)
    if not run_verify(where, chosen, floor, Plan(length, seconds, seed), json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a wrong command or option is one line, too."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        tell = getattr(error, "format_message", None)  # what every usage error of typer has
        if tell is None:
            raise
        print(f"error: {tell()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
