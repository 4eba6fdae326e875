"""The table of options in ``docs/serving.md``: ``python -m pyramidinfer.cli.options_page``."""

from __future__ import annotations

from pathlib import Path

from pyramidinfer.cli.fields import options_of
from pyramidinfer.cli.serving import serve
from pyramidinfer.options import Field

__all__ = ["PAGE", "render"]

PAGE = Path("docs/serving.md")
BEGIN, END = "<!-- options of serve -->\n", "<!-- end -->\n"


def render(page: str) -> str:
    """The page with a new table."""
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    lines = ["| option | default | meaning |", "|---|---|---|"]
    lines += [_row(field, shown) for field, shown in options_of(serve)]
    return f"{before}{BEGIN}" + "".join(f"{line}\n" for line in lines) + f"{END}{after}"


def _row(field: Field, default: str) -> str:
    option, names = field.option, list(field.flags)
    if field.default is True and not option.inverted:
        names.append(f"--no-{names[0].removeprefix('--')}")
    text = option.help.replace("|", "\\|")
    if option.see:
        title = option.see.removeprefix("#").replace("-", " ")
        text += f" See [{title}]({option.see})."
    return f"| {', '.join(f'`{name}`' for name in names)} | {default} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
