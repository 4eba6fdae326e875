"""The package's docstrings as Markdown, for the API reference.

They describe parameters as ``name : text`` with further lines indented, below a heading or without
one, and other pages as ``docs/page.md``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAMETER = re.compile(r"^(\w+(?:, \w+)*) : (?=\S)")
HEADING = re.compile(r"^(\w+)\n-{3,}$", re.MULTILINE)
PAGE = re.compile(r"`{0,2}docs/(\w+)\.md`{0,2}")


def as_markdown(text: str) -> str:
    lines: list[str] = []
    in_list = False
    for line in HEADING.sub(r"**\1**\n", text).splitlines():
        if found := PARAMETER.match(line):
            if not in_list:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            line = f"- {names}: {line[found.end() :]}"
            in_list = True
        elif in_list and line and not line.startswith(" "):
            lines.append("")
            in_list = False
        lines.append(line)
    return PAGE.sub(r"[docs/\1.md](../\1.md)", "\n".join(lines))


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
