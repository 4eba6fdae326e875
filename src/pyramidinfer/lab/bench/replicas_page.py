"""The table of replicas in ``docs/scaling.md`` and in the terminal, from ``bench replicas``."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pyramidinfer.lab.bench.scale_page import as_markdown, as_terminal
from pyramidinfer.lab.bench.table import mebibytes
from pyramidinfer.lab.numbers_studies import origin

__all__ = ["render_replicas", "replicas_table"]

BEGIN, END = "<!-- from benchmarks/results/replicas.json -->", "<!-- end -->"


def render_replicas(page: str, entry: dict[str, Any]) -> str:
    """The page with the table of this result between its two marks."""
    plan, result = entry["configuration"], entry["result"]
    killed = next(row for row in result["rows"] if "killed_after" in row)
    sizes = ", ".join(f"{name} {mebibytes(size)}" for name, size in result["process_bytes"].items())
    back = killed["seconds_back"]
    again = "none was back in time" if back is None else f"two ran again {back:.0f} s later"
    lines = [
        BEGIN,
        origin(entry),
        f"`{entry['command']}` on the model `{plan['model']}`, Ray {plan['ray']} with two "
        f"CPUs: {plan['chats']} chats of {plan['turns']} turns, {plan['at_once']} at a time, a "
        f"first turn of {plan['words']} words; a turn that gets a 503 is sent again. One replica "
        f"was killed (SIGKILL) after {killed['killed_after']} of "
        f"{plan['chats'] * plan['turns']} answers; {again}.\n",
        *as_markdown(_rows(result["rows"])),
        "",
        f"Memory of its own of each process: {sizes}.",
        END,
    ]
    before, _, rest = page.partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


def replicas_table(result: dict[str, Any]) -> Table:
    """The output in the terminal."""
    return as_terminal("two replicas", _rows(result["rows"]))


def _rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = [
        [
            "chats go",
            "answered",
            "others",
            "hung",
            "same replica",
            "cache taken up",
            "turn, median",
        ]
    ]
    for row in rows:
        codes = {code: count for code, count in row["codes"].items() if code != "200"}
        median = row["seconds_median"]
        found.append(
            [
                row["way"],
                str(row["turns_answered"]),
                ", ".join(f"{count} × {code}" for code, count in codes.items()) or "–",
                str(row["hung"]),
                f"{row['same_replica']:.0%}",
                f"{row['cache_taken_up']:.0%}",
                "–" if median is None else f"{median:.2f} s",
            ]
        )
    return found
