"""``pyramidinfer demo | generate | serve | chat | batch | inspect | calibrate | study | …``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import pyramidinfer
from pyramidinfer.cli.bench import bench
from pyramidinfer.cli.looking import add_looking
from pyramidinfer.cli.models import add_models
from pyramidinfer.cli.serving import add_serving
from pyramidinfer.cli.study import study

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
    """Language model inference that computes fewer prompt tokens and keeps a smaller KV cache."""


add_serving(app)
add_looking(app)
add_models(app)


def main() -> None:
    """Run the command line; a wrong command or option is a one-line error too."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        tell = getattr(error, "format_message", None)  # every usage error of typer has it
        if tell is None:
            raise
        print(f"error: {tell()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
