"""What the commands share."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import typer

from pyramidinfer.config import nearest
from pyramidinfer.policies import POLICIES, Policy, make_policy

__all__ = ["human_bytes", "plain_errors", "policy_from"]


@contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; Ctrl-C leaves what is done and exits 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        print(f"\nstopped{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        raise typer.Exit(130) from None


def policy_from(name: str, keep: float | None, options: list[str]) -> Policy:
    """A policy from ``--policy``, ``--keep`` and ``--option NAME=VALUE``."""
    values: dict[str, Any] = {}
    for item in options:
        key, sign, text = item.partition("=")
        if not sign:
            raise ValueError(f"--option {item!r}: write NAME=VALUE")
        known = [each.name for each in fields(POLICIES[name])] if name in POLICIES else []
        if known and key not in known:
            raise ValueError(f"policy {name!r} has no option {key!r}; {nearest(key, known)}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    if keep is not None and "keep" in values:
        raise ValueError(f"keep is given twice: --keep {keep} and --option keep={values['keep']}")
    return make_policy(name, values.pop("keep", keep), **values)


def human_bytes(count: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
