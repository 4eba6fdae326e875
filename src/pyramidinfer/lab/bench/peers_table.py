"""The comparison's rows as a table, for the terminal and for ``docs/numbers.md``."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["HEAD", "RIVALS", "peers_reasons", "peers_rows", "peers_table"]

Result = dict[str, Any]
#: Engines that all others are compared with.
RIVALS = ("transformers", "OpenVINO")
#: KV: bytes after prefill over those of a full cache; same tokens: as transformers' in bf16.
HEAD = (
    "on",
    "engine",
    "output tokens/s",
    "prompt + output",
    "prefill, s",
    "step, ms",
    *(f"times {name}" for name in RIVALS),
    "KV",
    "memory",
    "same tokens",
)


def peers_rows(result: Result) -> list[list[str]]:
    """Cells as texts; ratios only between rows of one run."""
    rows = result["rows"]
    speeds = {
        (row["engine"], row["workload"], row["run"]): row["output_tokens_per_second"]
        for row in rows
        if row["status"] == "ok"
    }
    found = []
    for row in sorted(rows, key=lambda row: row["workload"]):
        name = row["engine"] if row["run"] == result["run"] else f"{row['engine']} ({row['run']})"
        if row["status"] != "ok":
            gap = ["–"] * (len(HEAD) - 3)
            found.append([row["workload"], name, row["status"], *gap])
            continue
        speed = row["output_tokens_per_second"]
        against = [speeds.get((rival, row["workload"], row["run"])) for rival in RIVALS]
        kept = row["notes"].get("kv_share_prefill")
        same = row.get("agreement")
        found.append(
            [
                row["workload"],
                name,
                f"{speed:.1f}",
                f"{row['all_tokens_per_second']:.0f}",
                f"{row['prefill_seconds']['median']:.2f}",
                f"{1e3 * row['step_seconds']:.1f}",
                *("–" if other is None else f"{speed / other:.2f}" for other in against),
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
    for name in HEAD:
        table.add_column(
            name, no_wrap=name == "engine", justify="left" if name in ("on", "engine") else "right"
        )
    for line in peers_rows(result):
        table.add_row(*line)
    return table
