"""The comparison's rows as tables, for the terminal, ``docs/numbers.md`` and the README."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pyramidinfer.lab.bench.engines import KEEP

__all__ = [
    "EQUAL_HEAD",
    "HEAD",
    "OURS",
    "Group",
    "best_peer",
    "equal_rows",
    "equal_table",
    "groups",
    "peers_reasons",
    "peers_rows",
    "peers_table",
]

Result = dict[str, Any]
#: Workload, and bits of weights and cache.
Group = tuple[str, str]
#: Our policies, with their names in rows.
OURS = {
    "full": "ours, full",
    "pyramid": f"ours, pyramid {KEEP:g}",
    "pyramidinfer": f"ours, pyramidinfer {KEEP:g}",
}
#: KV: bytes after prefill over those of a full cache; same tokens: as transformers' in bf16.
HEAD = (
    "on",
    "engine",
    "output tokens/s",
    "prompt + output",
    "prefill, s",
    "step, ms",
    "times best other",
    "weights",
    "KV",
    "memory",
    "same tokens",
)
EQUAL_HEAD = (
    "on",
    "weights/cache bits",
    *(f"`{name}`" for name in OURS),
    "fastest other engine",
    "its rate",
    *(f"`{name}`, times" for name in OURS),
)


def groups(result: Result) -> list[Group]:
    """Workloads and bits in the result's order."""
    return list(dict.fromkeys(_group(row) for row in result["rows"]))


def _group(row: Result) -> Group:
    return row["workload"], f"{row['weights']}/{row['cache']}"


def _measured(result: Result, group: Group) -> list[Result]:
    return [row for row in result["rows"] if row["status"] == "ok" and _group(row) == group]


def best_peer(result: Result, group: Group) -> Result | None:
    """The fastest row of another engine on a workload with the same bits."""
    others = [row for row in _measured(result, group) if not row["is_ours"]]
    return max(others, key=lambda row: row["output_tokens_per_second"], default=None)


def equal_rows(result: Result) -> list[list[str]]:
    """One line for each workload and bits: our rates, the fastest other engine, our ratios."""
    found = []
    for group in groups(result):
        best, rows = best_peer(result, group), _measured(result, group)
        speeds = {row["engine"]: row["output_tokens_per_second"] for row in rows}
        mine = [speeds.get(f"{name} {group[1]}") for name in OURS.values()]
        if best is None or not any(mine):
            continue
        rate = best["output_tokens_per_second"]
        found.append(
            [
                group[0],
                group[1],
                *("–" if each is None else f"{each:.1f}" for each in mine),
                best["engine"].removesuffix(f" {group[1]}"),
                f"{rate:.1f}",
                *("–" if each is None else f"{each / rate:.2f}" for each in mine),
            ]
        )
    return found


def peers_rows(result: Result) -> list[list[str]]:
    """Cells as texts, one line for each engine and workload."""
    found = []
    for row in sorted(result["rows"], key=lambda row: row["workload"]):
        if row["status"] != "ok":
            gap = ["–"] * (len(HEAD) - 3)
            found.append([row["workload"], row["engine"], row["status"], *gap])
            continue
        speed, best = row["output_tokens_per_second"], best_peer(result, _group(row))
        kept, size = (row["notes"].get(what) for what in ("kv_share_prefill", "weight_bytes"))
        same = row.get("agreement")
        found.append(
            [
                row["workload"],
                row["engine"],
                f"{speed:.1f}",
                f"{row['all_tokens_per_second']:.0f}",
                f"{row['prefill_seconds']['median']:.2f}",
                f"{1e3 * row['step_seconds']:.1f}",
                "–" if best is None else f"{speed / best['output_tokens_per_second']:.2f}",
                "–" if size is None else f"{size / 1e6:.0f} MB",
                "–" if kept is None else f"{kept:.1%}",
                f"{row['peak_rss_bytes'] / 2**30:.1f} GiB",
                "–" if same is None else f"{same:.0%}",
            ]
        )
    return found


def peers_reasons(result: Result) -> list[str]:
    """The reasons for missing figures, one line each."""
    return [
        f"{row['engine']} on {row['workload']}: {row['status']}: {row['reason']}"
        for row in sorted(result["rows"], key=lambda row: row["workload"])
        if row["status"] != "ok"
    ]


def peers_table(configuration: Result, result: Result) -> Table:
    """For the terminal."""
    c = configuration
    reasons = "\n".join(peers_reasons(result)) or None
    table = Table(
        caption=reasons,
        caption_justify="left",
        title=f"{c['shape']}, {c['threads']} threads, greedy, the same prompts",
    )
    _fill(table, HEAD, peers_rows(result))
    return table


def equal_table(result: Result) -> Table:
    """For the terminal."""
    table = Table(title="output tokens/s at equal bits")
    _fill(table, [each.replace("`", "") for each in EQUAL_HEAD], equal_rows(result))
    return table


def _fill(table: Table, head: Any, rows: list[list[str]]) -> None:
    for name in head:
        left = name in ("on", "engine", "fastest other engine")
        table.add_column(name, no_wrap=name == "engine", justify="left" if left else "right")
    for line in rows:
        table.add_row(*line)
