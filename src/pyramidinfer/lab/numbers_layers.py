"""Sections of ``docs/numbers.md`` on what layers need and whether recent tokens agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyramidinfer.lab.numbers_studies import (
    command_block,
    origin,
    percent,
    subject_words,
    table,
)
from pyramidinfer.lab.pictures import PAPER_ICR, PAPER_RAC

__all__ = ["icr", "rac"]


def icr(entry: dict[str, Any], name: str = "icr", title: str = "What each layer needs") -> str:
    """One result of ``study icr``."""
    meta, rows = entry["meta"], entry["rows"]
    plan = meta["configuration"]
    shares = sorted({row["share"] for row in rows})
    cells = {(row["layer"], row["share"]): row["ratio"] for row in rows}
    lines = [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(plan['subject'])}; {plan['samples']} passages of {plan['context']:,} "
        f"tokens, {rows[0]['tokens']} scored tokens.\n",
        command_block(meta),
        "**How to read it.** "
        "Figures are the perplexity of the continuation with ONE layer's cache cut to a share, "
        f"divided by that of the full cache ({rows[0]['full_perplexity']:.4g}); 1 means that the "
        "layer does not need the removed entries. Intervals are in the picture. The paper's result "
        f"on LLaMA-2-13B: {PAPER_ICR}.\n",
    ]
    lines += table(
        ["layer", *map(percent, shares)],
        (
            [str(layer), *(_ratio(cells[layer, share]) for share in shares)]
            for layer in sorted({row["layer"] for row in rows})
        ),
    )
    return "\n".join(lines) + f"\n\n![what each layer needs](images/{name}.png)\n"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def rac(entry: dict[str, Any], name: str = "rac", title: str = "Do recent tokens agree?") -> str:
    """One result of ``study rac``."""
    meta, rows = entry["meta"], entry["rows"]
    plan = meta["configuration"]
    columns = list(dict.fromkeys((row["top"], row["mode"]) for row in rows))
    chance = {row["top"]: row["chance"] for row in rows}

    def cell(layer: int | None, top: float, mode: str) -> str:
        mine = [row for row in rows if (row["top"], row["mode"]) == (top, mode)]
        mine = [row for row in mine if layer in (None, row["layer"])]
        furthest = max(row["distance_low"] for row in mine)
        far = [row["overlap"] for row in mine if row["distance_low"] == furthest]
        return f"{np.mean([row['overlap'] for row in mine]):.2f}; {np.mean(far):.2f}"

    lines = [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(plan['subject'])}; {plan['samples']} texts of {plan['context']:,} "
        f"tokens.\n",
        command_block(meta),
        "**How to read it.** "
        "Figures are the share of the last token's context picks that are also picks of a recent "
        "token: the mean over all distances, then the value at the furthest. Random picks share "
        f"{' and '.join(f'{chance[top]:.2f} (top {top:.0%})' for top in chance)}; more than that "
        "is agreement. The paper's means at top 80 % on LLaMA-2-13B: "
        f"{PAPER_RAC['single']:.0%} single, {PAPER_RAC['ensemble']:.0%} ensemble.\n",
    ]
    layers: list[int | None] = [*sorted({row["layer"] for row in rows}), None]
    lines += table(
        ["layer", *(f"top {top:.0%}, {mode}" for top, mode in columns)],
        (
            ["all" if layer is None else str(layer), *(cell(layer, *each) for each in columns)]
            for layer in layers
        ),
    )
    return "\n".join(lines) + f"\n\n![agreement by distance](images/{name}.png)\n"
