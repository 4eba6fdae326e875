"""``pyramidinfer study …``: measurements of a model under compression, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyramidinfer.cli.common import plain_errors

if TYPE_CHECKING:
    from pyramidinfer.lab.samples import Subject

__all__ = ["study"]

study = typer.Typer(
    help="Measure a model under compression: JSON, pictures, resumable.", no_args_is_help=True
)

Model = Annotated[
    str | None, typer.Option(help="Folder or hub id. Default: the model shipped with the package.")
]
Text = Annotated[
    Path | None, typer.Option(help="UTF-8 text to draw passages from. Default: generated text.")
]
Json = Annotated[Path, typer.Option("--json", help="Where the result goes; pictures beside it.")]
Samples = Annotated[int, typer.Option(help="Passages a figure rests on.")]
Context = Annotated[int, typer.Option(help="Tokens of context.")]
Seed = Annotated[int, typer.Option(help="Which passages are drawn.")]
Workers = Annotated[int, typer.Option(help="Processes of one thread each; 1 runs in this one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def subject(model: str | None, text: Path | None, dtype: str, device: str) -> Subject:
    """What is studied, with the shipped model as the default."""
    from pyramidinfer.lab.samples import Subject
    from pyramidinfer.models.loading import quiet_transformers, shipped_model

    quiet_transformers()
    path = None if text is None else str(text)
    return Subject(model or shipped_model(), path, dtype, device)


@study.command()
@plain_errors()
def icr(
    model: Model = None,
    text: Text = None,
    context: Context = 1000,
    samples: Samples = 24,
    seed: Seed = 0,
    json: Json = Path("out/icr.json"),
    workers: Workers = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Prune one layer at a time to a share, all others whole: what does each layer need?"""
    from pyramidinfer.lab.icr import run_icr

    picture = run_icr(subject(model, text, dtype, device), context, samples, seed, json, workers)
    print(f"{json}\n{picture}")
