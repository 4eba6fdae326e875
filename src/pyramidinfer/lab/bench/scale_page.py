"""The tables of ``bench scale``'s results, for ``docs/scaling.md`` and for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from pyramidinfer.lab.bench.table import mebibytes
from pyramidinfer.lab.numbers_studies import origin

__all__ = ["PAGE", "as_markdown", "as_terminal", "render_scale", "scale_table", "stages_table"]

PAGE = Path("docs/scaling.md")
BEGIN, END = "<!-- from benchmarks/results/scale.json and stages.json -->", "<!-- end -->"
KINDS = ("layers", "policy", "logits", "rows", "prompts", "results")

Row = dict[str, Any]


def render_scale(page: str, entry: dict[str, Any], dealt: dict[str, Any] | None = None) -> str:
    """The page with its tables generated from the results, between the two marks.  dealt : the
    result of ``bench stages``."""
    plan, result = entry["configuration"], entry["result"]
    paper = result["paper"][0]
    lines = [
        BEGIN,
        "## Measured\n",
        origin(entry),
        f"`{entry['command']}` on `{Path(plan['model']).name}` in {plan['dtype']}: one "
        f"request of {plan['prompt']:,} prompt tokens and {plan['new']} generated ones. *Ranks*: "
        "ranks that split layers × stages. Figures are kB, counted / by formula, of the stage with "
        "the most.\n",
        *as_markdown(_measured(result["rows"])),
        "",
        *([] if dealt is None else _stages_section(dealt)),
        "## Computed by formula\n",
        f"`{paper['shape']}` in bfloat16, one request of {paper['prompt']:,} prompt tokens and "
        f"{paper['new']} generated ones.\n",
        *as_markdown(_on_paper(result["paper"])),
        END,
    ]
    before, _, rest = page.partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


def _stages_section(entry: dict[str, Any]) -> list[str]:
    plan = entry["configuration"]
    return [
        "## Even stages and stages by forecast\n",
        origin(entry),
        f"`{entry['command']}` on `{Path(plan['model']).name}` in {plan['dtype']}, two "
        f"stages: {plan['requests']} requests at once of {plan['prompt']:,} prompt tokens and "
        f"{plan['new']} generated ones, {plan['repeats']} runs each, taking turns. *Busiest*: the "
        "busier stage's share of all work, by forecast and in CPU seconds; a half is best.\n",
        *as_markdown(_dealt(entry["result"]["rows"])),
        "",
    ]


def _dealt(rows: list[Row]) -> list[list[str]]:
    found = [
        [
            "policy",
            "stages",
            "layers",
            "busiest, forecast",
            "busiest, CPU",
            "seconds",
            "even / this",
        ]
    ]
    for row in rows:
        times = row["times_even"]
        for way in ("even", "forecast"):
            each, low_high = row[way], f"{times['min']:.2f} to {times['max']:.2f}"
            found.append(
                [
                    row["policy"],
                    way,
                    ", ".join(map(str, each["layers"])),
                    f"{each['busiest_by_forecast']:.0%}",
                    f"{each['busiest']['median']:.0%}",
                    f"{each['seconds']['median']:.1f}",
                    "1" if way == "even" else f"{times['median']:.2f} ({low_high})",
                ]
            )
    return found


def stages_table(result: dict[str, Any]) -> Table:
    """The terminal's table after ``bench stages``."""
    return as_terminal("two stages", _dealt(result["rows"]))


def scale_table(result: dict[str, Any]) -> Table:
    """The terminal's table after ``bench scale``."""
    lines = [["policy", "ranks", "same tokens", "sent", "cache", "weights", "equals formula"]]
    for row in result["rows"]:
        pairs = [
            (row["sent"], row["sent_by_formula"]),
            *((row[f"{name}_bytes"], row[f"{name}_by_formula"]) for name in ("cache", "weights")),
        ]
        most = [max(sum(each.values()) for each in row["sent"])]
        most += [max(row["cache_bytes"]), max(row["weights_bytes"])]
        held = all(counted == said for counted, said in pairs)
        lines.append(
            [
                row["policy"],
                _size(row),
                _yes(row["same_tokens"]),
                *(f"{each / 1e3:,.0f} kB" for each in most),
                _yes(held),
            ]
        )
    return as_terminal("the rank with the most", lines)


def as_terminal(title: str, lines: list[list[str]]) -> Table:
    """A table whose first line is its header."""
    table = Table(title=title)
    head, *rows = lines
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _measured(rows: list[Row]) -> list[list[str]]:
    found = [["policy", "ranks", "layers", "same tokens", *KINDS, "cache", "weights", "process"]]
    for row in rows:
        sent, said = row["sent"], row["sent_by_formula"]
        found.append(
            [
                row["policy"],
                _size(row),
                ", ".join(map(str, row["layers"])),
                _yes(row["same_tokens"]),
                *(
                    _pair(*([e.get(name, 0) for e in each] for each in (sent, said)))
                    for name in KINDS
                ),
                _pair(row["cache_bytes"], row["cache_by_formula"]),
                _pair(row["weights_bytes"], row["weights_by_formula"]),
                mebibytes(max(row["process_bytes"])),
            ]
        )
    return found


def _yes(held: bool) -> str:
    return "yes" if held else "no"


def _size(row: Row) -> str:
    return f"{row['tensor']} × {row['stages']}"


def _pair(counted: list[int], said: list[int]) -> str:
    """The figures of the stage with the largest ones."""
    if not max(said) and not max(counted):
        return "–"
    return f"{max(counted) / 1e3:,.0f} / {max(said) / 1e3:,.0f}"


def _on_paper(rows: list[Row]) -> list[list[str]]:
    found = [["ranks", "policy", "weights", "cache", "wire, prompt", "wire, token", "waits, token"]]
    for row in rows:
        waits = row["waits_token"]
        found.append(
            [
                _size(row),
                row["policy"],
                f"{row['weights'] / 2**30:.1f} GiB",
                mebibytes(row["cache"]),
                mebibytes(row["wire_prompt"]),
                f"{row['wire_token'] / 2**10:,.0f} KiB",
                f"{waits} ({waits * 0.01:.1f} ms)",
            ]
        )
    return found


def as_markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first row is its header."""
    head, *lines = rows
    every = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return [f"| {' | '.join(row)} |" for row in every]
