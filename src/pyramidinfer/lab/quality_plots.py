"""Pictures of the quality study: curves against bytes, and needles by depth and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pyramidinfer.lab.pictures import counted, legend, save
from pyramidinfer.lab.rows import AUTO, is_reference, series
from pyramidinfer.lab.study import Row

__all__ = ["draw_needles", "draw_quality", "labels", "style"]

MARKERS = "osD^vPX<>*h"
#: Line styles of kv dtypes and of quantized weights.
LOOKS: dict[str, dict[str, Any]] = {
    AUTO: {"linestyle": "-"},
    "int8": {"linestyle": "--", "markerfacecolor": "white"},
    "fp8": {"linestyle": "-.", "markerfacecolor": "white"},
    "int4": {"linestyle": ":", "fillstyle": "left"},
    "weights=int8": {"linestyle": "--", "fillstyle": "top"},
    "weights=int4": {"linestyle": ":", "fillstyle": "bottom"},
    "weights=gguf": {"linestyle": "-.", "fillstyle": "right"},
}
#: measure → (title, logarithmic)
PANELS = {
    "recall": ("exact recall", False),
    "kl": ("divergence from the full cache (nats per token)", True),
    "agreement": ("greedy tokens as with the full cache", False),
}


def style(names: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each policy, with the strongest for the project's own; line style of
    each kv dtype and kind of weights (``names`` are those of ``rows.series``)."""
    colours = matplotlib.colormaps["tab10"]
    specs = list(dict.fromkeys(name.partition(" ")[0] for name in names))
    specs = [*(spec for spec in specs if spec != "full"), "full"]
    styles = {}
    for name in names:
        spec, *stored = name.split(" ")
        index, own = specs.index(spec), spec == "pyramid"
        styles[name] = {
            "color": "0.35" if spec == "full" else colours(index % 10),
            "marker": MARKERS[index % len(MARKERS)],
            **{key: look for each in stored or [AUTO] for key, look in LOOKS[each].items()},
            "linewidth": 2.4 if own else 1.2,
            "markersize": 5.5 if own else 4,
            "zorder": 3 if own else 2,
        }
    return styles


def labels(names: list[str]) -> dict[str, str]:
    """The name of each series: its policy, its kv dtype unless ``auto``, and the options in which
    series with options differ."""
    specs = {name: name.partition(" ") for name in names}
    options = {n: spec.partition(":")[2].split(",") for n, (spec, *_) in specs.items() if ":" in n}
    shared = set.intersection(*map(set, options.values())) if len(options) > 1 else set()
    found = {}
    for name in names:
        own = [each for each in options.get(name, []) if each not in shared]
        spec, blank, stored = specs[name]
        found[name] = ", ".join([spec.partition(":")[0] + blank + stored, *own])
    return found


def draw_quality(rows: list[Row], path: Path) -> Path:
    """One row of panels per context length; share of the full cache's bytes along x."""
    contexts = sorted({row["context"] for row in rows})
    others = [row for row in rows if not is_reference(row)]
    names = list(dict.fromkeys(map(series, others)))
    styles, called = style(names), labels(names)
    widest = max([row["kv_share"] for row in others], default=1.0)
    figure = Figure(figsize=(14, 4.4 * len(contexts) + 0.7), layout="constrained")
    axes = figure.subplots(len(contexts), len(PANELS), squeeze=False)
    for line, context in enumerate(contexts):
        for axis, (measure, (title, log)) in zip(axes[line], PANELS.items(), strict=True):
            for name in names:
                mine = [r for r in others if series(r) == name and r["context"] == context]
                _draw_line(axis, mine, measure, styles[name], called[name], log)
            _draw_level(axis, rows, context, measure)
            mine = [r for r in rows if r["context"] == context]
            n = counted(mine, "samples" if measure == "recall" else "passages")
            axis.set_title(f"{title}\n{context:,} tokens, {n}", loc="left", fontsize=10.5)
            when = "at the end of generation" if measure == "agreement" else "after the prompt"
            axis.set_xlabel(f"KV bytes {when}, share of the full cache", fontsize=9)
            axis.set_xlim(0, widest * 1.04)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(-0.03, 1.03)
    legend(figure, axes[0, 0])
    return save(figure, path)


def _draw_line(
    axis: Any, rows: list[Row], measure: str, look: dict[str, Any], name: str, log: bool
) -> None:
    points = sorted((r for r in rows if r[measure] is not None), key=lambda r: r["kv_share"])
    if not points:
        return
    least = 1e-6 if log else -1.0
    # bytes during generation: a policy may grow above its budget, or evict below it
    x = [r["kv_share_end" if measure == "agreement" else "kv_share"] for r in points]
    y = [max(r[measure], least) for r in points]
    axis.plot(x, y, label=name, **look)
    bounds = [r[f"{measure}_ci"] for r in points]
    low, high = ([max(b[i], least) for b in bounds] for i in (0, 1))
    axis.fill_between(x, low, high, color=look["color"], alpha=0.08, linewidth=0)


def _draw_level(axis: Any, rows: list[Row], context: int, measure: str) -> None:
    full = [r for r in rows if is_reference(r) and r["context"] == context]
    if full and measure == "recall":
        axis.axhline(
            full[0][measure], color="0.35", linestyle="--", linewidth=1, label="full cache"
        )


def draw_needles(rows: list[Row], path: Path) -> Path:
    """Recall by the needle's depth (down) and the context's length (across), one panel per cell."""
    names = list(dict.fromkeys(map(series, rows)))
    called = labels(names)
    keeps = sorted({row["keep"] for row in rows if row["keep"] < 1}, reverse=True)
    shown = [keep for keep in keeps if keep in (0.45, 0.2)] or keeps[:2] or [1.0]
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(1.55 * len(names) + 1.2, 2.5 * len(shown) + 0.5), layout="constrained")
    axes = figure.subplots(len(shown), len(names), squeeze=False, sharey=True)
    image = None
    for line, keep in enumerate(shown):
        for axis, name in zip(axes[line], names, strict=True):
            is_full = name.partition(" ")[0] == "full"
            wanted = 1.0 if is_full else keep
            mine = {
                r["context"]: r["recall_by_depth"]
                for r in rows
                if series(r) == name and r["keep"] == wanted
            }
            if not mine:
                axis.set_axis_off()
                continue
            depths = sorted(next(iter(mine.values())))
            table = np.array([[mine.get(c, {}).get(d, np.nan) for c in contexts] for d in depths])
            image = axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (y, x), value in np.ndenumerate(table):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5)
            axis.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts], fontsize=8)
            axis.set_yticks(range(len(depths)), [f"{float(d):.0%}" for d in depths], fontsize=8)
            title = name if is_full else f"{called[name]}\nkeep {wanted:g}"
            axis.set_title(title, fontsize=8.5)
        axes[line, 0].set_ylabel("needle's depth", fontsize=9)
    per_cell = "; ".join(
        f"{c:,} tokens: {counted(r for r in rows if r['context'] == c)}" for c in contexts
    )
    figure.supxlabel(f"context length ({per_cell} over all depths)", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, label="exact recall", shrink=0.8)
    return save(figure, path)
