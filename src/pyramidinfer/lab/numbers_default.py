"""Section of ``docs/numbers.md``: the default policy against the full cache and against others,
over all committed grids of ``study ruler``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyramidinfer.lab.asking import PROTOCOLS
from pyramidinfer.lab.numbers_studies import label, percent, table
from pyramidinfer.lab.rows import AUTO, is_reference, kv_dtype
from pyramidinfer.lab.ruler.grid import interval_of_tasks, mean_of_tasks, passed
from pyramidinfer.lab.study import Row

__all__ = ["GRIDS", "default_section", "pooled", "rivals"]

Result = dict[str, Any]

#: Results with rows of the default policy as it is now.
GRIDS = (
    "heads_ruler",
    "kv_dtype_ruler",
    "kv_dtype_tasks",
    "later_bits",
    "all_ruler",
    "ruler_long",
    "gemma_ruler",
    "gemma_quarter",
    "kv_dtype_gemma",
)
#: The default policy with no option but its budget.
DEFAULT = re.compile(r"pyramid:keep=[\d.]+")
#: Other policies are compared if their bytes differ by no more than this share of the default's.
NEAR = 0.08


class Pair(list[tuple[np.ndarray, np.ndarray]]):
    """For each task, the scores of two policies on the same samples."""

    @property
    def of_other(self) -> tuple[float, float, float]:
        """The first policy's mean as a share of the second's, with its 95 % interval."""
        other = mean_of_tasks([second for _, second in self])
        value, low, high = self.difference
        return 1 + value / other, 1 + low / other, 1 + high / other

    @property
    def difference(self) -> tuple[float, float, float]:
        """The first policy's mean minus the second's, with its 95 % interval (paired)."""
        apart = [first - second for first, second in self]
        low, high = interval_of_tasks(apart)
        return mean_of_tasks(apart), low, high


def pooled(results: dict[str, Result]) -> dict[tuple[str, int, float, str], dict[str, Any]]:
    """For each model, length, keep and kv dtype of the default policy: ``bytes`` and ``computed``
    (mean shares), and for each protocol a ``Pair`` with the full cache over the tasks of all
    grids."""
    found: dict[tuple[str, int, float, str], dict[str, Any]] = {}
    for name in GRIDS:
        if name not in results:
            continue
        rows = results[name]["rows"]
        model = results[name]["meta"]["configuration"]["subject"]["model"]
        able = passed(rows)
        for row in filter(_is_default, rows):
            if (row["length"], row["task"]) not in able:
                continue
            key = (model, row["length"], row["keep"], kv_dtype(row))
            cell = found.setdefault(key, {"bytes": [], "computed": []})
            cell["bytes"].append(row["kv_share"])
            cell["computed"].append(row["prefill_share"])
            pair = cell.setdefault(row["protocol"], Pair())
            pair.append(_pair(row, _matching(rows, row, lambda other: is_reference(other))))
    return found


def rivals(result: Result) -> list[tuple[Row, Row, dict[str, Pair]]]:
    """The default policy and each other policy of a grid with about the same bytes: one row of
    each, and the pairs by protocol."""
    rows = result["rows"]
    able = passed(rows)
    ways: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if (row["length"], row["task"]) in able and not is_reference(row):
            way = (row["length"], row["policy"], row["keep"], kv_dtype(row))
            ways.setdefault(way, []).append(row)
    own = [mine for mine in ways.values() if _is_default(mine[0])]
    others = [each for each in ways.values() if not _is_default(each[0])]
    found = []
    for mine in own:
        for other in others:
            if not _is_near(mine, other):
                continue
            pairs: dict[str, Pair] = {}
            for row in mine:
                match = [
                    each
                    for each in other
                    if (each["task"], each["protocol"]) == (row["task"], row["protocol"])
                ]
                for each in match:
                    pairs.setdefault(row["protocol"], Pair()).append(_pair(row, each))
            found.append((_overall(mine), _overall(other), pairs))
    return found


def default_section(results: dict[str, Result]) -> list[str]:
    """The section's lines; none without results."""
    cells = pooled(results)
    if not cells:
        return []
    models = [model for model, *_ in cells]
    order = sorted(cells, key=lambda key: (models.index(key[0]), key[1], -key[2], key[3]))
    lines = [
        "## The default against the full cache\n",
        "`pyramid` with its default options, over the RULER grids below that include it. A cell is "
        "the mean score over the tasks of all these grids, divided by that of the full 16- or "
        "32-bit cache on the same samples, with its 95 % interval from the paired differences. "
        "*Samples*: number of questions. KV: share of the bytes of a full cache with 16 bits or "
        "more per number.\n",
    ]
    head = ["model", "tokens", "keep", "kv dtype", "KV", "computed", *PROTOCOLS, "samples"]
    lines += table(head, (_pooled_row(key, cells[key]) for key in order))
    compared = [
        (name, *each) for name in GRIDS if name in results for each in rivals(results[name])
    ]
    if compared:
        lines += [
            "\nOther policies in the same grids with about the same bytes. A difference is the "
            "default's score minus the other's on the same samples, with its 95 % interval; the "
            "other policy is better by more than noise if the whole interval is below 0.\n",
            *table(
                ["grid", "default", "other", "KV", "computed", *PROTOCOLS],
                (_rival_row(*each) for each in compared),
            ),
            f"\n{_verdict(compared)}",
        ]
    return ["\n".join(lines) + "\n"]


# --- rows -----------------------------------------------------------------------------------------


def _is_default(row: Row) -> bool:
    return DEFAULT.fullmatch(row["policy"]) is not None


def _pair(mine: Row, other: Row) -> tuple[np.ndarray, np.ndarray]:
    return np.array(mine["scores"]), np.array(other["scores"])


def _matching(rows: Iterable[Row], mine: Row, wanted: Any) -> Row:
    """The row of the same length, task and protocol that ``wanted`` accepts."""
    place = ("length", "task", "protocol")
    return next(
        row for row in rows if wanted(row) and all(row[each] == mine[each] for each in place)
    )


def _is_near(mine: list[Row], other: list[Row]) -> bool:
    """Whether two policies can be compared: the same length and kv dtype, about the same bytes."""
    first, second = mine[0], other[0]
    same = (first["length"], kv_dtype(first)) == (second["length"], kv_dtype(second))
    own = _share(mine, "kv_share")
    return same and abs(_share(other, "kv_share") - own) <= NEAR * own


def _overall(rows: list[Row]) -> Row:
    """A row with the mean shares of all tasks and protocols."""
    return {
        **rows[0],
        "kv_share": _share(rows, "kv_share"),
        "prefill_share": _share(rows, "prefill_share"),
    }


def _share(rows: list[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _pooled_row(key: tuple[str, int, float, str], cell: dict[str, Any]) -> list[str]:
    model, length, keep, stored = key
    pairs = [cell[protocol] for protocol in PROTOCOLS if protocol in cell]
    counts = {sum(len(first) for first, _ in pair) for pair in pairs}
    return [
        f"`{model}`",
        f"{length:,}",
        f"{keep:g}",
        stored,
        percent(float(np.mean(cell["bytes"]))),
        percent(float(np.mean(cell["computed"]))),
        *(_relative(cell.get(protocol)) for protocol in PROTOCOLS),
        " / ".join(map(str, sorted(counts))),
    ]


def _relative(pair: Pair | None) -> str:
    if pair is None:
        return "–"
    value, low, high = pair.of_other
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


def _rival_row(grid: str, mine: Row, other: Row, pairs: dict[str, Pair]) -> list[str]:
    stored = "" if kv_dtype(mine) == AUTO else f", {kv_dtype(mine)}"
    return [
        f"`{grid}`",
        f"keep={mine['keep']:g}{stored}",
        label(other["policy"]),
        f"{percent(mine['kv_share'])}, {percent(other['kv_share'])}",
        f"{percent(mine['prefill_share'])}, {percent(other['prefill_share'])}",
        *(_apart(pairs.get(protocol)) for protocol in PROTOCOLS),
    ]


def _apart(pair: Pair | None) -> str:
    return "–" if pair is None else "{:+.2f} [{:.2f}, {:.2f}]".format(*pair.difference)


def _verdict(compared: list[tuple[str, Row, Row, dict[str, Pair]]]) -> str:
    """Names the other policies that are better by more than noise and compute no more."""
    better = [
        f"{label(other['policy'])} ({protocol}, `{grid}`)"
        for grid, mine, other, pairs in compared
        if other["prefill_share"] <= mine["prefill_share"] + 0.005
        for protocol, pair in pairs.items()
        if pair.difference[2] < 0
    ]
    if not better:
        return (
            "No policy that computes no more layer-tokens is better at these bytes by more than "
            "noise."
        )
    return "Better by more than noise without computing more: " + "; ".join(better) + "."
