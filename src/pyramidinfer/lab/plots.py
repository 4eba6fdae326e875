"""Pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pyramidinfer.types import Trace

__all__ = ["draw_curve", "draw_pyramid", "draw_training"]

KEPT, NEEDLE, GONE = (0.20, 0.38, 0.62), (0.86, 0.25, 0.16), (0.93, 0.94, 0.96)


def draw_pyramid(
    traces: list[tuple[str, Trace]], words: list[str], needle: tuple[int, int], path: Path
) -> Path:
    """Prompt along x, layers along y: which token is kept in which layer, and by how many heads.

    ``words``: the prompt's tokens as text;  ``needle``: the span of tokens to mark.  Below
    each pyramid is an excerpt around the needle; each word has the number of layers that keep it.
    """
    figure = Figure(figsize=(13, 4.1 * len(traces)), layout="constrained")
    axes = figure.subplots(2 * len(traces), 1, height_ratios=[3, 1.1] * len(traces), squeeze=False)
    for index, (title, trace) in enumerate(traces):
        depth, length = len(trace.prefill_positions), len(trace.prompt_token_ids)
        kept = np.zeros((depth, length))
        for layer, heads in enumerate(trace.prefill_positions):
            for positions in heads:
                kept[layer, positions.cpu().numpy()] += 1 / len(heads)
        computed = sum(trace.computed_by_layer) / (depth * length)
        _draw_grid(axes[2 * index, 0], kept, computed, needle, title)
        _draw_excerpt(axes[2 * index + 1, 0], kept > 0, words, needle)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


def _draw_grid(
    axis: Any, kept: np.ndarray, computed: float, needle: tuple[int, int], title: str
) -> None:
    """``kept`` ``[layers, tokens]``: share of the KV heads that keep the token."""
    depth, length = kept.shape
    inside = np.zeros(length, dtype=bool)
    inside[needle[0] : needle[1]] = True
    colour = np.where(inside[:, None], np.array(NEEDLE), np.array(KEPT))
    image = np.array(GONE) + kept[..., None] * (colour - np.array(GONE))
    axis.imshow(
        image, aspect="auto", interpolation="nearest", origin="upper", extent=(0, length, depth, 0)
    )
    frame = (needle[0] - 0.5, 0), needle[1] - needle[0] + 1, depth
    axis.add_patch(Rectangle(*frame, fill=False, edgecolor=NEEDLE, linewidth=1.2))
    whole = int((kept[:, inside] > 0).all(1).sum())
    axis.set_title(
        f"{title}: {computed:.0%} of layer-tokens computed, {kept.mean():.0%} kept; "
        f"{whole} of {depth} layers keep the whole needle",
        loc="left",
        fontsize=11,
    )
    axis.set_ylabel("layer")
    shown = range(0, depth, -(-depth // 16))
    axis.set_yticks(np.array(shown) + 0.5, [str(layer) for layer in shown], fontsize=8)
    axis.set_xlabel(
        "position in the prompt (blue: kept in the layer, paler by fewer heads; red: the needle)",
        fontsize=9,
    )


def _draw_excerpt(
    axis: Any, survived: np.ndarray, words: list[str], needle: tuple[int, int]
) -> None:
    """Words around the needle; the number above each is the number of layers that keep it."""
    first = max(0, needle[0] - 6)
    last = min(len(words), first + 22)
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    sizes = [len(words[index]) + 1.6 for index in range(first, last)]
    at, unit = 0.0, 1.0 / sum(sizes)
    for index, size in zip(range(first, last), sizes, strict=True):
        layers = int(survived[:, index].sum())
        marked = needle[0] <= index < needle[1]
        share = layers / survived.shape[0]
        colour = NEEDLE if marked else (0.1, 0.1, 0.1)
        middle = at + size * unit / 2
        axis.text(
            middle,
            0.52,
            words[index],
            ha="center",
            va="center",
            fontsize=10.5,
            family="monospace",
            color=colour,
            alpha=0.35 + 0.65 * share,
            fontweight="bold" if marked else "normal",
        )
        axis.text(middle, 0.86, str(layers), ha="center", va="center", fontsize=8, color="0.4")
        at += size * unit
    axis.text(
        0, 0.08, "above each word: the number of layers that keep it", fontsize=8, color="0.4"
    )


def draw_curve(
    points: list[tuple[float, float]],
    path: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    level: float | None = None,
    level_name: str = "",
) -> Path:
    """One measured curve, with a level to compare it with."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), marker="o", color=KEPT)
    if level is not None:
        axis.axhline(level, color=NEEDLE, linestyle="--", linewidth=1, label=level_name)
        axis.legend(frameon=False)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


def draw_training(rows: list[dict[str, Any]], path: Path) -> Path:
    """Recall and sequence length over training tokens."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    millions = [row["tokens"] / 1e6 for row in rows]
    axis.plot(millions, [row["recall"] for row in rows], color=KEPT)
    axis.set_xlabel("training tokens (millions)")
    axis.set_ylabel("recall of place and number (running mean)")
    axis.set_ylim(0, 1.15)
    twin = axis.twinx()
    growing = [row for row in rows if row["stage"] not in ("mixed", "finish")]
    twin.plot(
        [row["tokens"] / 1e6 for row in growing],
        [row["length"] for row in growing],
        color=NEEDLE,
        linewidth=1,
    )
    twin.set_yscale("log", base=2)
    twin.set_ylabel("sequence length (then mixed)", color=NEEDLE)
    starts = [rows[0]] + [
        row for earlier, row in pairwise(rows) if row["stage"] != earlier["stage"]
    ]
    for index, row in enumerate(starts):
        axis.axvline(row["tokens"] / 1e6, color="0.7", linewidth=0.8)
        height = 1.04 + 0.05 * (index % 2)
        axis.text(row["tokens"] / 1e6, height, f" {row['stage']}", fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path
