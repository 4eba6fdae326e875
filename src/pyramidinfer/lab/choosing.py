"""The curves of ``docs/choosing.md``: share of the full cache's score, over bytes.

Each picture joins all committed results of one case on SmolLM2.  The score of a policy is divided
by that of the full cache on the same samples, so points of results with different samples can be
compared.  If several results have the same policy, keep and kv dtype, all their tasks have
equal weight.  Policies with other options than ``keep`` are left out, and so are full caches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyramidinfer.lab.pictures import legend, save
from pyramidinfer.lab.quality_plots import labels, style
from pyramidinfer.lab.rows import is_reference, series
from pyramidinfer.lab.ruler.grid import passed
from pyramidinfer.lab.study import Row

__all__ = ["PICTURES", "Picture", "Point", "draw_choosing", "points"]

Result = dict[str, Any]

#: Results of ``study ruler`` on SmolLM2 at 2,000 tokens.
RULER = (
    "heads_ruler",
    "heads_spare",
    "methods_ruler",
    "keys_ruler",
    "kv_dtype_ruler",
    "kv_dtype_tasks",
    "later_bits",
    "all_ruler",
)


#: Options that do not distinguish policies: the budget, and defaults that results name.
DEFAULTS = r"(keep=[\d.]+|spare=0)?"


@dataclass(frozen=True, slots=True)
class Picture:
    """One case.

    title : of the picture;  results : names of the results;  protocol : of ``study ruler``;
    options : suffix of the names of a result's policies, by the result's name.
    """

    title: str
    results: tuple[str, ...]
    protocol: str | None = None
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A policy's share of the full cache's score, and of its bytes; ``answers``: how many."""

    name: str
    bytes: float
    score: float
    answers: int


PICTURES = {
    "choosing_later": Picture("The question comes after compression", RULER, "after"),
    "choosing_inside": Picture("The question is part of the compressed prompt", RULER, "inside"),
    "choosing_chats": Picture(
        "Chats: facts of turn 1, asked in turns 2 to 4",
        ("heads_turns", "methods_turns", "pinned_turns", "heads_turns_idle"),
        options=(("heads_turns_idle", ":compress_idle"),),
    ),
}


def draw_choosing(results: dict[str, Result], folder: Path) -> list[Path]:
    """Draw each picture for which there are results; returns their paths."""
    found = {name: points(results, picture) for name, picture in PICTURES.items()}
    looks = style(list(dict.fromkeys(each.name for some in found.values() for each in some)))
    return [
        _draw(found[name], looks, picture, folder / f"{name}.png")
        for name, picture in PICTURES.items()
        if found[name]
    ]


def points(results: dict[str, Result], picture: Picture) -> list[Point]:
    """One point per policy, keep and kv dtype; those of one policy and kv dtype have one name."""
    options = dict(picture.options)
    cells: dict[tuple[str, float], list[tuple[Row, Row]]] = {}
    for name in picture.results:
        if name not in results:
            continue
        rows = [row for row in results[name]["rows"] if _is_asked(row, picture.protocol)]
        able = passed(rows) if picture.protocol else None
        for row in rows:
            method = _method(row)
            if method is None or (able and (row["length"], row["task"]) not in able):
                continue
            method += options.get(name, "")
            full = next(each for each in rows if is_reference(each) and _same(each, row))
            cells.setdefault((method, row["keep"]), []).append((row, full))
    return [_point(name, pairs) for (name, _), pairs in cells.items()]


def _point(name: str, pairs: Sequence[tuple[Row, Row]]) -> Point:
    mine, full = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    return Point(
        name,
        float(np.mean([row["kv_share"] for row, _ in pairs])),
        float(np.sum(mine) / np.sum(full)),
        sum(row["samples"] for row, _ in pairs),
    )


def _is_asked(row: Row, protocol: str | None) -> bool:
    return protocol is None or row["protocol"] == protocol


def _same(first: Row, second: Row) -> bool:
    """Whether two rows are of the same task and length."""
    return all(first.get(name) == second.get(name) for name in ("length", "task"))


def _method(row: Row) -> str | None:
    """A policy's name and, after a blank, its kv dtype unless that is ``auto``; None for a full
    cache, and for a policy with other options than ``keep`` (or a present default)."""
    spec, _, stored = series(row).partition(" ")
    name, _, options = spec.partition(":")
    own = [each for each in options.split(",") if not re.fullmatch(DEFAULTS, each)]
    return None if name == "full" or own else f"{name} {stored}".rstrip()


def _draw(
    found: list[Point], looks: dict[str, dict[str, Any]], picture: Picture, path: Path
) -> Path:
    """``looks``: the style of each name, the same in all pictures."""
    names = list(dict.fromkeys(each.name for each in found))
    called = labels(names)
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axis = figure.subplots()
    for name in names:
        mine = sorted((each for each in found if each.name == name), key=lambda each: each.bytes)
        axis.plot(
            [each.bytes for each in mine],
            [each.score for each in mine],
            label=called[name],
            **looks[name],
        )
    axis.axhline(1, color="0.35", linestyle="--", linewidth=1, label="full cache")
    counts = [each.answers for each in found]
    axis.set_title(
        f"{picture.title}\nSmolLM2; each point has {min(counts)} to {max(counts)} samples",
        loc="left",
        fontsize=10.5,
    )
    axis.set_xlabel("KV bytes, share of the full cache (of 16 bits if quantized)", fontsize=9)
    axis.set_ylabel("score, share of the full cache's", fontsize=9)
    axis.set_xlim(0, min(1.02, 1.06 * max(each.bytes for each in found)))
    axis.set_ylim(-0.03, max(1.1, 1.04 * max(each.score for each in found)))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    legend(figure, axis)
    return save(figure, path)
