"""The policies and budgets that a study compares with the full cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.table import Table

from pyramidinfer.config import KV_DTYPES, check_choice
from pyramidinfer.lab.asking import own_keep
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.rows import AUTO, series
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.study import Row
from pyramidinfer.policies.registry import parse_policy

__all__ = ["Ways", "paired", "rows_table"]


@dataclass(frozen=True)
class Ways:
    """On a model, each policy (``NAME`` or ``NAME:option=value,…``) at each keep; one that names a
    ``keep`` of its own at that only; and all of that with keys and values in each of ``kv_dtypes``.
    The full cache in the model's own dtype goes first, asked for or not."""

    policies: tuple[str, ...]
    keeps: tuple[float, ...]
    subject: Subject
    samples: int
    seed: int
    kv_dtypes: tuple[str, ...] = field(default=(AUTO,), kw_only=True)

    def check(self) -> None:
        """``ValueError`` for what cannot be measured, naming the option."""
        for name in ("policies", "keeps", "kv_dtypes"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is empty: name at least one")
        for kv_dtype in self.kv_dtypes:
            check_choice("--kv-dtypes", kv_dtype, KV_DTYPES)
        for spec in self.policies:
            parse_policy(spec, None if spec == "full" or own_keep(spec) is not None else 1.0)
        for keep in self.keeps:
            if not 0 < keep <= 1:
                raise ValueError(f"--keeps: {keep} must be above 0 and at most 1")
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples} must be at least 1")

    def cells(self) -> list[dict[str, Any]]:
        """``{"policy": …, "keep": …, "kv_dtype": …}`` of each, the reference first."""
        return [{"policy": "full", "keep": 1.0, "kv_dtype": AUTO}, *self.others()]

    def others(self) -> list[dict[str, Any]]:
        """Those of all but the reference; one kv dtype after the other, as each has an engine."""
        return [
            {"policy": spec, "keep": keep, "kv_dtype": kv_dtype}
            for kv_dtype in self.kv_dtypes
            for spec in self.policies
            if (spec, kv_dtype) != ("full", AUTO)
            for keep in self._keeps(spec)
        ]

    def _keeps(self, spec: str) -> tuple[float, ...]:
        own = 1.0 if spec == "full" else own_keep(spec)
        return self.keeps if own is None else (own,)

    def stored(self, cell: dict[str, Any]) -> Subject:
        """The model with a cell's kv dtype."""
        return replace(self.subject, kv_dtype=cell["kv_dtype"])


def paired(name: str, mine: list[float], full: list[float]) -> Row:
    """A figure's mean with its 95 % interval, and what is lost against the full cache's figures of
    the same samples (resampled together)."""
    lost = [theirs - ours for ours, theirs in zip(mine, full, strict=True)]
    return {
        name: float(np.mean(mine)),
        f"{name}_ci": interval(mine),
        "lost": float(np.mean(lost)),
        "lost_ci": interval(lost),
    }


def rows_table(title: str, rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> Table:
    """What a study prints: a line a policy and keep, with the columns named."""
    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    for column in ("keep", "KV kept", *columns):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (show(row) for show in columns.values())
        table.add_row(series(row), f"{row['keep']:g}", f"{row['kv_share']:.2f}", *cells)
    return table
