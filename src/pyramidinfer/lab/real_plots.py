"""Pictures of the studies ``turns``, ``text`` and ``long``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from pyramidinfer.lab.pictures import counted, legend, save
from pyramidinfer.lab.quality_plots import labels, style
from pyramidinfer.lab.rows import is_reference, series
from pyramidinfer.lab.study import Row

__all__ = ["draw_long", "draw_text", "draw_turns"]


def draw_turns(rows: Sequence[Row], path: Path) -> Path:
    """Share of facts answered, over the bytes of the last turn."""
    figure = Figure(figsize=(6.6, 4.9), layout="constrained")
    axis = figure.subplots()
    _over_bytes(axis, rows, "score", "score_ci")
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(
        f"Facts of turn 1, asked in turns 2 to 4; chats: {counted(rows)}", loc="left", fontsize=10.5
    )
    axis.set_ylabel("share answered (bars: 95 %)")
    legend(figure, axis)
    return save(figure, path)


def draw_text(rows: Sequence[Row], path: Path) -> Path:
    """Perplexity divided by the full cache's, one panel per context length."""
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(1.2 + 3.6 * len(contexts), 4.4), layout="constrained")
    axes = figure.subplots(1, len(contexts), squeeze=False, sharey=True)[0]
    for axis, context in zip(axes, contexts, strict=True):
        mine = [row for row in rows if row["context"] == context]
        _over_bytes(axis, mine, "ratio", "ratio_ci")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(MaxNLocator(7))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"{context:,} tokens, {counted(mine)}", loc="left", fontsize=10.5)
    axes[0].set_ylabel("perplexity of what follows,\nover the full cache's (bars: 95 %)")
    legend(figure, axes[0])
    return save(figure, path)


def draw_long(rows: Sequence[Row], path: Path) -> Path:
    """Likelihood of long answers under the full model, and how much they repeat."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _over_bytes(left, rows, "perplexity", None)
    left.set_title(
        f"Perplexity of the answers under the full cache, {counted(rows)}",
        loc="left",
        fontsize=10.5,
    )
    _over_bytes(right, rows, "repetition", None)
    right.set_title("Share of 4-grams said before", loc="left", fontsize=10.5)
    right.set_ylim(-0.03, 1.03)
    legend(figure, left)
    return save(figure, path)


def _over_bytes(axis: Any, rows: Sequence[Row], name: str, bounds: str | None) -> None:
    others = [row for row in rows if not is_reference(row)]
    names = list(dict.fromkeys(map(series, others)))
    looks, called = style(names), labels(names)
    for each in names:
        mine = sorted((r for r in others if series(r) == each), key=lambda row: row["kv_share"])
        x = [row["kv_share"] for row in mine]
        axis.plot(x, [row[name] for row in mine], label=called[each], **looks[each])
        if bounds is not None:  # bars, because they are visible with a single keep
            low, high = ([row[bounds][side] for row in mine] for side in (0, 1))
            axis.vlines(x, low, high, color=looks[each]["color"], alpha=0.5, linewidth=1)
    for row in rows:
        if is_reference(row):
            axis.axhline(row[name], color="0.35", linestyle="--", linewidth=1, label="full cache")
    axis.set_xlim(0, 1.08 * max([r["kv_share"] for r in others], default=1.0))
    axis.set_xlabel("KV bytes, share of the full cache", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
