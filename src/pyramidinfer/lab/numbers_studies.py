"""The quality study's section of ``docs/numbers.md``, and helpers for all sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.lab.rows import AUTO, kv_dtype, series, weights
from pyramidinfer.lab.samples import GENERATED, SHIPPED
from pyramidinfer.lab.study import Row

__all__ = [
    "command_block",
    "estimate",
    "joined",
    "label",
    "load_results",
    "named",
    "origin",
    "paired_difference",
    "paired_ratio",
    "percent",
    "quality",
    "subject_words",
    "table",
]

Result = dict[str, Any]

RESULTS = Path("benchmarks/results")
RESAMPLES = 2000
#: The name of the paper's own rule; other policies are compared with it.
PAPER = "pyramidinfer"


def load_results(root: Path = Path()) -> dict[str, Result]:
    """Committed results by name."""
    paths = {path.stem: path for path in sorted((root / RESULTS).glob("*.json"))}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}


# --- words and cells ------------------------------------------------------------------------------


def origin(entry: Result) -> str:
    """Commit and machine."""
    machine = entry["machine"]
    threads = machine["threads"]
    return (
        f"Commit `{entry['commit']}`; {machine['processor']}, {machine['cores']} cores, "
        f"{threads} thread{'s' if threads != 1 else ''}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}.\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


def estimate(value: float | None, bounds: Sequence[float] | None, form: str = ".2f") -> str:
    """``0.97 [0.91, 0.99]``; a dash if it was not measured."""
    if value is None:
        return "–"
    if bounds is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"


def percent(value: float) -> str:
    return f"{value:.0%}"


def subject_words(subject: dict[str, Any]) -> str:
    """The model and text, without folders."""
    model, text = subject["model"], subject["text"]
    name = "the shipped model" if model == SHIPPED else f"`{Path(model).name}`"
    source = subject.get("source", GENERATED) if text is None else f"text `{Path(text).name}`"
    return f"{name} ({subject['dtype']}), {source}"


def label(spec: str) -> str:
    """A policy's spec as a cell, files by name (results may have options that no longer exist)."""
    name, _, tail = spec.partition(":")
    options = [item.partition("=") for item in tail.split(",")] if tail else []
    short = [f"{key}={Path(value).name if '/' in value else value}" for key, _, value in options]
    return f"`{name}`" + (f" {', '.join(short)}" if short else "")


def named(row: Row) -> str:
    """A row's policy as a cell, with the formats of cache and weights unless ``auto``."""
    words = [label(row["policy"])]
    words += [kv_dtype(row)] if kv_dtype(row) != AUTO else []
    words += [f"weights {weights(row)}"] if weights(row) != AUTO else []
    return ", ".join(words)


def joined(values: Iterable[Any]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def command_block(entry: dict[str, Any]) -> str:
    """The command that a result recorded, as a block.  entry : as for ``origin``."""
    return f"```bash\n{entry['command']}\n```\n"


# --- quality --------------------------------------------------------------------------------------


def _grid_head(title: str, name: str, entry: Result, words: str) -> list[str]:
    meta = entry["meta"]
    grid = meta["configuration"]
    counts = {row["context"]: row for row in entry["rows"]}
    samples = "; ".join(
        f"at {context:,} tokens {row['samples']} questions, "
        f"{row.get('passages', row['samples'])} passages"
        for context, row in counts.items()
    )
    return [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(grid['subject'])}; {samples}. All policies get the same samples.\n",
        command_block(meta),
        f"{words}\n",
    ]


def _kv(row: Row) -> str:
    return percent(row["kv_share"]) + ("" if row["reachable"] else " *")


def _footnote(rows: list[Row]) -> list[str]:
    missed = not all(row["reachable"] for row in rows)
    return ["\n\\* The policy cannot reach this `keep` here."] if missed else []


def _by_cell(rows: list[Row]) -> dict[tuple[str, float, int], Row]:
    return {(series(row), row["keep"], row["context"]): row for row in rows}


def _lines(rows: list[Row]) -> list[tuple[str, float]]:
    """Policies as stored and keeps, in order, once each."""
    return list(dict.fromkeys((series(row), row["keep"]) for row in rows))


def _contexts(rows: list[Row]) -> list[int]:
    return sorted({row["context"] for row in rows})


def quality(entry: Result) -> str:
    rows = entry["rows"]
    cells, contexts = _by_cell(rows), _contexts(rows)
    lines = _grid_head(
        "Quality against bytes",
        "quality",
        entry,
        "**How to read it.** "
        "`KV` is the share of the full cache's bytes after the context, `prefill` the share of "
        "layer-tokens computed. Compare recall between rows of equal `KV`, not of equal `keep`. In "
        "brackets: the 95 % interval (Wilson).",
    )
    head = ["policy", "keep"]
    for context in contexts:
        head += [f"recall at {context:,}", "KV", "prefill"]
    names = {series(row): named(row) for row in rows}
    found = []
    for name, keep in _lines(rows):
        line = [names[name], f"{keep:g}"]
        for context in contexts:
            row = cells.get((name, keep, context))
            if row is None:
                line += ["–"] * 3
                continue
            line += [
                estimate(row["recall"], row["recall_ci"]),
                _kv(row),
                percent(row["prefill_share"]),
            ]
        found.append(line)
    lines += [*table(head, found), *_footnote(rows)]
    lines += [
        "\n![quality against bytes](images/quality.png)",
        "\nRecall by the needle's depth and the context's length:",
        "\n![needles](images/quality_needles.png)\n",
    ]
    return "\n".join([*lines, *_better_than_pyramid(rows)])


#: Measures of a cell, their format, and whether more (1) or less (-1) is better.
MEASURES = (("recall", ".2f", 1), ("agreement", ".2f", 1), ("kl", ".2g", -1))


def _better_than_pyramid(rows: list[Row]) -> list[str]:
    """Cells in which another policy is better than pyramid and the intervals do not overlap."""
    cells = _by_cell(rows)
    found = []
    for (_, keep, context), row in cells.items():
        mine = cells.get((series({**row, "policy": "pyramid"}), keep, context))
        if mine is None or row["policy"] in ("full", "pyramid"):
            continue
        for measure, form, sign in MEASURES:
            ours, theirs = mine[f"{measure}_ci"], row[f"{measure}_ci"]
            if ours is None or theirs is None:
                continue
            if min(sign * x for x in theirs) > max(sign * x for x in ours):
                name = "divergence" if measure == "kl" else measure
                found.append(
                    [
                        f"{context:,}",
                        f"{keep:g}",
                        named(row),
                        name,
                        estimate(row[measure], theirs, form),
                        _kv(row),
                        estimate(mine[measure], ours, form),
                        _kv(mine),
                    ]
                )
    if not any(row["policy"] == "pyramid" for row in rows):
        return []
    words = "another policy is better than `pyramid` and the 95 % intervals do not overlap"
    if not found:
        return [f"In no cell of this grid {words}.\n"]
    head = ["context", "keep", "policy", "measure", "its figure", "its KV", "pyramid", "its KV"]
    return [f"Cells in which {words}:\n", *table(head, sorted(found)), ""]


def paired_ratio(mine: Sequence[int], other: Sequence[int]) -> tuple[float, float, float] | None:
    """Sum over sum with its 95 % interval over resampled pairs; None if ``other`` sums to 0."""
    if not sum(other):
        return None
    return _resampled(mine, other, lambda a, b: a.sum(-1) / b.sum(-1))


def paired_difference(mine: Sequence[int], other: Sequence[int]) -> tuple[float, float, float]:
    """Difference of the means with its 95 % interval over resampled pairs."""
    return _resampled(mine, other, lambda a, b: a.mean(-1) - b.mean(-1))


def _resampled(
    mine: Sequence[int],
    other: Sequence[int],
    figure: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[float, float, float]:
    if len(mine) != len(other):
        raise ValueError(f"{len(mine)} and {len(other)} answers are not pairs")
    first, second = np.array(mine, dtype=np.float64), np.array(other, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(first), size=(RESAMPLES, len(first)))
    with np.errstate(invalid="ignore", divide="ignore"):  # draws without a figure do not count
        drawn = figure(first[picks], second[picks])
    low, high = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5))
    return float(figure(first, second)), float(low), float(high)
