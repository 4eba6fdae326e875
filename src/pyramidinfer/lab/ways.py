"""Results of the policies and budgets that a study compares with the full cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.table import Table

from pyramidinfer.lab.plans import Ways
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.rows import series
from pyramidinfer.lab.study import Row

__all__ = ["Ways", "paired", "rows_table"]


def paired(name: str, mine: list[float], full: list[float]) -> Row:
    """A figure's mean with its 95 % interval, and the loss against the full cache on the same
    samples (resampled together)."""
    lost = [theirs - ours for ours, theirs in zip(mine, full, strict=True)]
    return {
        name: float(np.mean(mine)),
        f"{name}_ci": interval(mine),
        "lost": float(np.mean(lost)),
        "lost_ci": interval(lost),
    }


def rows_table(title: str, rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> Table:
    """The table that a study prints: one line per policy and keep, with the named columns."""
    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    for column in ("keep", "KV kept", *columns):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (show(row) for show in columns.values())
        table.add_row(series(row), f"{row['keep']:g}", f"{row['kv_share']:.2f}", *cells)
    return table
