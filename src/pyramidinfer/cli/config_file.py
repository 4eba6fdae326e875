"""Options from a YAML file, ``--config``; the command line and the environment override it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from pyramidinfer.cli.common import plain_errors
from pyramidinfer.options import hint

__all__ = ["read_config"]


@plain_errors()
def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Make a file's values the defaults of a command: a callback of typer.

    Keys are option names, ``kv-memory`` or ``kv_memory``.  ``ValueError`` for a key that is no
    option, with the nearest name, and for a key that is given twice.
    """
    if file is None:
        return None
    options = {
        flag.removeprefix("--"): each
        for each in context.command.params
        for flag in each.opts
        if flag.startswith("--") and flag not in ("--help", "--config")
    }
    found: dict[str, Any] = {}
    for key, value in _entries(file).items():
        name = str(key).replace("_", "-")
        if name not in options:
            raise ValueError(f"{file}: {key!r} is no option{hint(name, options)}")
        option: Any = options[name]
        if option.name in found:
            raise ValueError(f"{file}: {key!r} is given twice")
        found[option.name] = _value(f"{file}: {key}", value, option.multiple)
    context.default_map = {**(context.default_map or {}), **found}
    return file


def _entries(file: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read --config {str(file)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"--config {str(file)!r} is not YAML: {told}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {str(file)!r} must hold lines NAME: VALUE")
    return found


def _value(place: str, value: Any, repeated: bool) -> Any:
    """A value as on the command line: a list as ``A,B`` or one by one, a mapping as JSON."""
    if value is None:
        raise ValueError(f"{place} has no value; leave it out")
    if isinstance(value, dict):
        return json.dumps(value)
    if repeated:
        return list(map(str, value if isinstance(value, list) else [value]))
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, bool) else str(value)
