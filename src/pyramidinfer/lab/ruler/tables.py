"""The output of ``study ruler``: means over tasks, one line per policy and keep."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pyramidinfer.lab.asking import PROTOCOLS
from pyramidinfer.lab.rows import series
from pyramidinfer.lab.study import Row

__all__ = ["means_table"]


def means_table(means: Sequence[Row]) -> Table:
    """Score of both protocols with its interval, and its cost, by length."""
    table = Table(title="RULER: mean score over tasks [95 % interval]")
    for column in ("tokens", "policy", "keep", "KV kept", "computed", *PROTOCOLS):
        if column == "policy":
            table.add_column(column, overflow="fold", min_width=13)
        else:
            table.add_column(column, justify="right", no_wrap=column in PROTOCOLS)
    cells: dict[tuple[int, str, float], dict[str, Row]] = {}
    for row in means:
        cell = cells.setdefault((row["length"], series(row), row["keep"]), {})
        cell[row["protocol"]] = row
    for (length, policy, keep), found in cells.items():
        any_row = next(iter(found.values()))
        table.add_row(
            f"{length:,}",
            policy,
            f"{keep:g}",
            f"{any_row['kv_share']:.2f}",
            f"{any_row['prefill_share']:.2f}",
            *(_score(found.get(protocol)) for protocol in PROTOCOLS),
        )
    if not means:
        table.caption = "the full cache solves none of the tasks on this model: nothing to compare"
    left_out = sorted({task for row in means for task in row["left_out"]})
    if left_out:
        table.caption = f"left out, because the full cache fails on them: {', '.join(left_out)}"
    return table


def _score(row: Row | None) -> str:
    if row is None:
        return "–"
    low, high = row["score_ci"]
    return f"{row['score']:.2f} [{low:.2f}, {high:.2f}]"
