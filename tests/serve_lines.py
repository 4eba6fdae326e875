"""Command lines of ``pyramidinfer`` as documents show them, checked by the real parser."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer.main

from pyramidinfer.cli.app import app

__all__ = ["code_lines", "options_of", "parsed"]

GROUP: Any = typer.main.get_command(app)


def parsed(words: list[str]) -> dict[str, Any]:
    """What ``pyramidinfer WORDS …`` takes these options for; an error where it takes them not."""
    command, rest = GROUP, list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    found: dict[str, Any] = command.make_context("pyramidinfer", rest).params
    return found


def options_of(command: str) -> dict[str, Any]:
    """The parameters of a command by their longest option, ``{"--port": …}``."""
    found = {}
    for each in GROUP.commands[command].params:
        if each.param_type_name == "option" and "--help" not in each.opts:
            found[max(each.opts, key=len)] = each
    return found


def code_lines(text: str) -> list[list[str]]:
    """Words of all commands of ours in the ``bash`` blocks of a document, without the program."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pyramidin")]
