"""The package's docstrings as Markdown, for the API reference.

They describe parameters as ``name : text`` with further lines indented, below a heading or without
one, and other pages as ``docs/page.md``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAMETER = re.compile(r"^(\w+(?:, \w+)*) ?: (?=\S)")
HEADING = re.compile(r"^(\w+)\n-{3,}$", re.MULTILINE)
PAGE = re.compile(r"`{0,2}docs/(\w+)\.md`{0,2}")


def as_markdown(text: str) -> str:
    lines: list[str] = []
    in_list = False
    for line in HEADING.sub(r"**\1**\n", text).splitlines():
        if PARAMETER.match(line):
            if not in_list and lines and lines[-1]:
                lines.append("")
            in_list = True
            names = PARAMETER.match(line)[1]  # type: ignore[index]
            marked = ", ".join(f"`{name}`" for name in names.split(", "))
            lines.append(f"- {marked}: {line[PARAMETER.match(line).end() :]}")  # type: ignore[union-attr]
            continue
        if in_list and line and not line.startswith(" "):
            in_list = False
            if lines[-1]:
                lines.append("")
        lines.append(line)
    return PAGE.sub(r"[docs/\1.md](../\1.md)", "\n".join(lines))


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
