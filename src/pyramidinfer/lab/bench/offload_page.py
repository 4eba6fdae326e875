"""The table in ``docs/serving.md`` and in the terminal, from results of ``bench offload``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from pyramidinfer.lab.bench.offload import WAYS
from pyramidinfer.lab.bench.table import mebibytes
from pyramidinfer.lab.numbers_studies import origin

__all__ = ["PAGE", "offload_table", "render_offload"]

PAGE = Path("docs/serving.md")
BEGIN, END = "<!-- from benchmarks/results/offload.json -->", "<!-- end -->"


def render_offload(page: str, entry: dict[str, Any]) -> str:
    """The page with the table of this result between the two marks."""
    plan = entry["configuration"]
    head, *rows = _rows(entry["result"])
    lines = [
        BEGIN,
        origin(entry),
        f"`{entry['command']}` on "
        f"`{Path(plan['model']).name}`. *Held*: number of conversations of "
        f"{plan['tokens']:,} tokens that each place holds (device: half of {plan['kv_memory']} of "
        f"`kv_memory`; host: {plan['host']}; disk: {plan['disk']}). *First token*: "
        f"time to first token of a second turn of {plan['turn']} tokens after a first turn of "
        f"{plan['prompt']:,}, by the place of its cache: the median of "
        f"{plan['repeats']} measurements and their range. The four cases were measured in turn, "
        f"and files were not in the page cache of the operating system.\n",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        END,
    ]
    before, _, rest = page.partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


def offload_table(result: dict[str, Any]) -> Table:
    """The terminal's output after ``bench offload``."""
    table, (head, *rows) = Table(title="conversations"), _rows(result)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(result: dict[str, Any]) -> list[list[str]]:
    found = [["policy", "place of the cache", "held", "bytes of the timed cache", "first token"]]
    for row in result["rows"]:
        for way in WAYS:
            seconds = row["first_token_seconds"][way]
            found.append(
                [
                    row["policy"],
                    "computed again" if way == "anew" else way,
                    str(row["held"].get(way, "–")),
                    mebibytes(row["bytes"][way]) if way in row["bytes"] else "–",
                    f"{seconds['median']:.2f} s ({seconds['min']:.2f} to {seconds['max']:.2f})",
                ]
            )
    return found
