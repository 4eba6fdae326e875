"""The table in ``docs/serving.md`` and in the terminal, from results of ``bench prefix``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from pyramidinfer.lab.bench.prefix import WAYS
from pyramidinfer.lab.bench.table import mebibytes
from pyramidinfer.lab.numbers_studies import origin

__all__ = ["BEGIN", "END", "PAGE", "prefix_table", "render_prefix"]

PAGE = Path("docs/serving.md")
BEGIN, END = "<!-- from benchmarks/results/prefix.json -->", "<!-- end -->"


def render_prefix(page: str, entry: dict[str, Any]) -> str:
    """The page with the table of this result between the two marks."""
    plan = entry["configuration"]
    head, *rows = _rows(entry["result"])
    lines = [
        BEGIN,
        origin(entry),
        f"`pyramidinfer bench prefix --repeats {plan['repeats']} --threads {plan['threads']}` on "
        f"`{Path(plan['model']).name}`: chats with a system prompt of {plan['system']:,} tokens, a "
        f"question of {plan['question']} and {plan['output']} generated tokens. *First token*: "
        f"time to first token of one chat, after another one was answered. *Tokens per second* and "
        f"*peak*: {plan['chats']} chats that arrive together, with no held caches. Median and "
        f"range of {plan['repeats']} runs, in which both ways take turns. *Computed again* is "
        f'`"reuse": false`; with a policy that drops entries, both ways set `prefix`.\n',
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        END,
    ]
    before, _, rest = page.partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


def prefix_table(result: dict[str, Any]) -> Table:
    """The terminal's output after ``bench prefix``."""
    table, (head, *rows) = Table(title="system prompt"), _rows(result)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(result: dict[str, Any]) -> list[list[str]]:
    found = [["policy", "system prompt", "first token", "tokens per second", "peak"]]
    for row in result["rows"]:
        for way in WAYS:
            first, rate = row["first_token_seconds"][way], row["tokens_per_second"][way]
            found.append(
                [
                    row["policy"],
                    "computed again" if way == "anew" else way,
                    f"{first['median']:.2f} s ({first['min']:.2f} to {first['max']:.2f})",
                    f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
                    mebibytes(row["peak_bytes"][way]),
                ]
            )
    return found
