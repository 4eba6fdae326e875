"""Pictures of ``study ruler``: score over bytes, and a heat map of tasks and policies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyramidinfer.lab.pictures import counted, legend, save
from pyramidinfer.lab.quality_plots import labels, style
from pyramidinfer.lab.rows import is_reference, series
from pyramidinfer.lab.study import Row

__all__ = ["draw_scores", "draw_tasks"]

TITLES = {"inside": "question inside the compressed prompt", "after": "question after compression"}


def draw_scores(means: Sequence[Row], path: Path) -> Path:
    """Mean score over KV bytes: one line per policy and kv dtype, one row per length, one column
    per protocol."""
    lengths = sorted({row["length"] for row in means})
    protocols = [each for each in TITLES if any(row["protocol"] == each for row in means)]
    names = list(dict.fromkeys(_method(row) for row in means if not is_reference(row)))
    looks, called = style(names), labels(names)
    size = (6.4 * len(protocols), 4.4 * len(lengths) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lengths), len(protocols), squeeze=False)
    widest = max((row["kv_share"] for row in means if not is_reference(row)), default=1.0)
    for (line, column), axis in np.ndenumerate(axes):
        cell = (lengths[line], protocols[column])
        here = [row for row in means if (row["length"], row["protocol"]) == cell]
        for name in names:
            mine = sorted((r for r in here if _method(r) == name), key=lambda r: r["kv_share"])
            _line(axis, mine, looks[name], called[name])
        for row in here:
            if is_reference(row):
                axis.axhline(
                    row["score"], color="0.35", linestyle="--", linewidth=1, label="full cache"
                )
        count = len(here[0]["tasks"]) if here else 0
        n = counted(here)
        axis.set_title(
            f"{TITLES[protocols[column]]}\n{lengths[line]:,} tokens, {count} tasks"
            f"{f', {n} a task' if n else ''}",
            loc="left",
            fontsize=10.5,
        )
        axis.set_xlabel("KV bytes, share of the full cache", fontsize=9)
        axis.set_ylabel("RULER score", fontsize=9)
        axis.set_xlim(0, max(0.1, widest * 1.06))
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    legend(figure, axes[0, 0])
    return save(figure, path)


def _method(row: Row) -> str:
    """A series' name without the policy's ``keep``."""
    return re.sub(r"(:)keep=[^, ]*,|[:,]keep=[^, ]*", r"\1", series(row))


def _line(axis: Any, rows: list[Row], look: dict[str, Any], name: str) -> None:
    if not rows:
        return
    x = [row["kv_share"] for row in rows]
    axis.plot(x, [row["score"] for row in rows], label=name, **look)
    low, high = ([row["score_ci"][side] for row in rows] for side in (0, 1))
    axis.fill_between(x, low, high, color=look["color"], alpha=0.08, linewidth=0)


def draw_tasks(rows: Sequence[Row], screen: float, path: Path) -> Path:
    """Score of every task (across) under every policy and keep (down); one panel per protocol and
    length.  Tasks on which the full cache fails show its score only."""
    panels = list(dict.fromkeys((row["length"], row["protocol"]) for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = list(dict.fromkeys((series(row), row["keep"]) for row in rows))
    called = labels([name for name, _ in lines])
    names = {line: _line_name(called[line[0]], line[1]) for line in lines}
    height = 0.26 * len(lines) + 1.9
    width = max(0.72 * len(tasks), 4) + 0.085 * max(map(len, names.values())) + 1.6
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (length, protocol) in zip(axes, panels, strict=True):
        found = {
            (series(r), r["keep"], r["task"]): r["score"]
            for r in rows
            if (r["length"], r["protocol"]) == (length, protocol)
        }
        here = [line for line in lines if any((*line, task) in found for task in tasks)]
        table = np.array([[found.get((*line, task), np.nan) for task in tasks] for line in here])
        image = axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            if not np.isnan(value):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(
            range(len(tasks)),
            [task.replace("niah_", "") for task in tasks],
            rotation=35,
            ha="right",
            fontsize=8,
        )
        axis.set_yticks(range(len(here)), [names[line] for line in here], fontsize=8)
        n = counted(r for r in rows if (r["length"], r["protocol"]) == (length, protocol))
        title = f"{TITLES[protocol]}, {length:,} tokens, {n} a task"
        axis.set_title(title, loc="left", fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.7)
    figure.supxlabel(
        f"RULER score; blank if the full cache has less than {screen:g}",
        fontsize=8.5,
    )
    return save(figure, path)


def _line_name(name: str, keep: float) -> str:
    parts = [part for part in name.split(", ") if not part.startswith("keep=")]
    return name if name.split(" ")[0] == "full" else ", ".join([*parts, f"{keep:g}"])
