"""Pictures of the studies icr and rac."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from pyramidinfer.lab.study import Row

__all__ = ["PAPER_ICR", "PAPER_RAC", "counted", "draw_icr", "draw_rac", "legend", "save"]

#: The paper's (arXiv 2405.12532) result on LLaMA-2-13B: one layer of 40 cut to a share.
PAPER_ICR = "at 50 % layer 2 suffers strongly, layer 27 hardly; layer 37 is flat even at 20 %"
#: From the same paper: mean overlap of recent tokens' top 80 % of the context with the last
#: token's.
PAPER_RAC = {"single": 0.86, "ensemble": 0.93}


def draw_icr(rows: list[Row], path: Path) -> Path:
    """Perplexity over the share kept, one line per layer; and the divergence of every cell."""
    layers = sorted({row["layer"] for row in rows})
    shares = sorted({row["share"] for row in rows})
    cells = {(row["layer"], row["share"]): row for row in rows}
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    colours, norm = colormaps["viridis"], Normalize(min(layers), max(layers) * 1.08 + 1)
    for layer in layers:
        _redundancy_curve(left, [cells[layer, share] for share in shares], colours(norm(layer)))
    left.axhline(rows[0]["full_perplexity"], color="0.25", linestyle="--", linewidth=1)
    _name_worst(left, cells, layers, shares)
    _share_axis(left, shares)
    if max(row["perplexity"] for row in rows) > 1.6 * min(row["perplexity"] for row in rows):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("perplexity of the continuation (band: 95 %)")
    left.set_title(
        f"One layer pruned, the others whole ({counted(rows)}); dashed: full cache, "
        f"{rows[0]['full_perplexity']:.4g}",
        loc="left",
        fontsize=11,
    )
    left.spines[["top", "right"]].set_visible(False)
    _depth_bar(figure, left, layers, colours, norm)
    _divergence_map(figure, right, cells, layers, shares)
    figure.supxlabel(f"the paper, LLaMA-2-13B (40 layers): {PAPER_ICR}", fontsize=8.5, color="0.3")
    return save(figure, path)


def _redundancy_curve(axis: Any, rows: list[Row], colour: Any) -> None:
    shares = [row["share"] for row in rows]
    axis.plot(
        shares,
        [row["perplexity"] for row in rows],
        marker="o",
        markersize=3,
        linewidth=1.4,
        color=colour,
    )
    if rows[0]["log_ratio_low"] is None:
        return
    full = rows[0]["full_perplexity"]
    low, high = (
        [full * np.exp(row[name]) for row in rows] for name in ("log_ratio_low", "log_ratio_high")
    )
    axis.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)


def _name_worst(
    axis: Any, cells: dict[tuple[int, float], Row], layers: list[int], shares: list[float]
) -> None:
    """Label the curves that lose most at the smallest share with their layer number."""
    placed: list[float] = []
    for layer in sorted(layers, key=lambda layer: -cells[layer, shares[0]]["log_ratio"])[:4]:
        change = cells[layer, shares[0]]["log_ratio"]
        most = max(cells[each, shares[0]]["log_ratio"] for each in layers)
        if change < 0.1 * most or any(abs(change - other) < 0.07 * most for other in placed):
            continue
        placed.append(change)
        at = (shares[0], cells[layer, shares[0]]["perplexity"])
        axis.annotate(f"layer {layer} ", at, ha="right", va="center", fontsize=9)
    if placed:
        axis.set_xlim(left=shares[0] * 0.62)


def _share_axis(axis: Any, shares: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(right=1.1)
    named = shares[-1:]
    for share in reversed(shares[:-1]):
        if share * 1.3 < named[-1]:
            named.append(share)
    axis.set_xticks(named, [f"{share * 100:g}" for share in named])
    axis.minorticks_off()
    axis.set_xlabel("share of the layer's context entries kept, %")


def _depth_bar(figure: Figure, axis: Any, layers: list[int], colours: Any, norm: Any) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, pad=0.02, fraction=0.05)
    bar.ax.set_ylim(min(layers), max(max(layers), min(layers) + 1))
    bar.set_ticks(layers[:: -(-len(layers) // 12)])
    bar.set_label("layer")


def _divergence_map(
    figure: Figure,
    axis: Any,
    cells: dict[tuple[int, float], Row],
    layers: list[int],
    shares: list[float],
) -> None:
    values = np.array([[cells[layer, share]["kl"] for share in shares] for layer in layers])
    low = 1e-4
    image = axis.imshow(
        np.maximum(values, low),
        aspect="auto",
        origin="upper",
        cmap="magma_r",
        norm=LogNorm(low, max(float(values.max()), 10 * low)),
    )
    axis.set_xticks(range(len(shares)), [f"{share * 100:g}" for share in shares])
    every = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axis.set_xlabel("share kept, %")
    axis.set_ylabel("pruned layer")
    axis.set_title("Divergence from the full cache, nats per token", loc="left", fontsize=11)
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.05, extend="min")
    bar.set_label("KL divergence")
    if len(layers) > 20 or len(shares) > 10:
        return
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        shown = "" if value < low else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
        dark = image.norm(max(value, low)) > 0.55
        axis.text(
            column,
            row,
            shown.replace("e-0", "e-"),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "0.25",
        )


def draw_rac(rows: list[Row], path: Path) -> Path:
    """Layer × distance, single tokens left and ensembles right; a line of maps for each top."""
    tops = sorted({row["top"] for row in rows}, reverse=True)
    layers = sorted({row["layer"] for row in rows})
    figure = Figure(figsize=(12, 0.9 + 4.1 * len(tops)), layout="constrained")
    axes = figure.subplots(len(tops), 2, squeeze=False, sharey=True)
    for line, top in enumerate(tops):
        mine = [row for row in rows if row["top"] == top]
        low, chance = min(row["overlap"] for row in mine), mine[0]["chance"]
        norm = Normalize(min(low, chance), 1.0)
        for axis, mode in zip(axes[line], ("single", "ensemble"), strict=True):
            image = _consistency_map(axis, [r for r in mine if r["mode"] == mode], layers, norm)
        axes[line, 0].set_ylabel(f"top {top:.0%} of the context\n\nlayer")
        bar = figure.colorbar(image, ax=list(axes[line]), pad=0.02, fraction=0.04)
        bar.set_label("overlap with the last token's set")
        bar.ax.axhline(chance, color="0.2", linewidth=2)
        bar.ax.text(-0.25, chance, "chance", ha="right", va="center", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("relative distance from the end, %")
    return save(figure, path)


def _consistency_map(axis: Any, rows: list[Row], layers: list[int], norm: Any) -> Any:
    edges = sorted({row["distance_low"] for row in rows})
    values = np.zeros((len(layers), len(edges)))
    for row in rows:
        values[layers.index(row["layer"]), edges.index(row["distance_low"])] = row["overlap"]
    end = max(row["distance_high"] for row in rows) * 100
    image = axis.imshow(
        values,
        aspect="auto",
        origin="upper",
        cmap="viridis",
        norm=norm,
        extent=(0, end, len(layers) - 0.5, -0.5),
    )
    every = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    what = {"single": "Single token", "ensemble": "Ensemble of a 20 % window"}[rows[0]["mode"]]
    told = f"{what}: mean {values.mean():.1%} (chance {rows[0]['chance']:.1%}"
    if rows[0]["top"] == 0.8:
        told += f", paper {PAPER_RAC[rows[0]['mode']]:.0%}"
    axis.set_title(f"{told}; {counted(rows)})", loc="left", fontsize=9.5)
    return image


def counted(rows: Iterable[Row], name: str = "samples") -> str:
    """The number of samples of a figure: ``n = 8``, or ``n = 5 to 20`` if rows differ.

    Empty for rows of older files that do not record it.
    """
    found = sorted({row[name] for row in rows if name in row})
    return f"n = {' to '.join(map(str, found[:1] + found[1:][-1:]))}" if found else ""


def legend(figure: Figure, axis: Any) -> None:
    """The legend of an axis below the figure, in as many columns as fit its width."""
    handles, texts = axis.get_legend_handles_labels()
    if not texts:
        return
    column = 0.72 + 0.088 * max(map(len, texts))  # inches, at this font size
    columns = max(1, min(len(texts), int((figure.get_figwidth() - 0.4) / column)))
    figure.legend(
        handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def save(figure: Figure, path: Path) -> Path:
    """Write a picture; create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path
