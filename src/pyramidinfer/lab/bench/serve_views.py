"""Tables and pictures of the benches that load a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pyramidinfer.lab.bench.plots import save
from pyramidinfer.lab.bench.table import ranged

__all__ = ["draw_serve", "draw_turns", "milliseconds", "rate", "serve_table", "turns_table"]

Result = dict[str, Any]


def milliseconds(values: dict[str, float] | None, *names: str) -> list[str]:
    """Cells of the table; dashes for missing measurements."""
    return ["–" if values is None else f"{1e3 * values[name]:,.0f}" for name in names]


def seconds(values: dict[str, float] | None, *names: str) -> list[str]:
    return ["–" if values is None else f"{values[name]:.2f}" for name in names]


def running(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def rate(row: Result) -> str:
    """``0.5``, ``4``, ``inf``."""
    return f"{float(row['rate']):g}"


def serve_table(configuration: Result, result: Result) -> Table:
    c = configuration
    kept = "" if c["url"] else f"; {c['kv_memory']} each"
    most = "; ".join(
        f"{row['policy']} {row['peak_running']:.0f}"
        + ("" if row["against_first"] is None else f" ({row['against_first']:.2f} times)")
        for row in result["concurrency"]
    )
    said = [f"most requests running at once: {most}"] if most else []
    said += [
        f"failed: {count} times {reason}"
        for row in result["rows"]
        for reason, count in row["failures"].items()
    ]
    table = Table(
        title=f"{c['requests']} requests a pass of {c['prompt_len']} + {c['output_len']} tokens"
        f"{kept}\nTTFT in s, ITL in ms; good: within {c['slo_ttft']:g} s, then "
        f"{1e3 * c['slo_itl']:g} ms a token",
        caption="\n".join(said) or None,
        show_edge=False,
        pad_edge=False,
    )
    for name in (
        "policy",
        "rate",
        "done\n429\nfail",
        "TTFT\np50",
        "p99",
        "ITL\np50",
        "p99",
        "tok/s",
        "good\n/s",
        "at\nonce",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["policy"],
            rate(row),
            f"{row['completed']}/{row['refused']}/{row['failed']}",
            *seconds(row["first_token_seconds"], "p50", "p99"),
            *milliseconds(row["inter_token_seconds"], "p50", "p99"),
            f"{row['output_tokens_per_second']:.0f}",
            f"{row['goodput']:.2f}",
            running(row["peak_running"]),
        )
    return table


def turns_table(configuration: Result, result: Result) -> Table:
    c = configuration
    table = Table(
        title=f"time to first token, ms: medians of {c['conversations']} conversations\n"
        f"{c['turn_len']} new tokens a turn, {c['output_len']} generated"
    )
    for name in ("policy", "turn", "prompt", "reused", "cached", "anew", "reuse", "times faster"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in result["rows"]:
        first = row["first_token_seconds"]
        table.add_row(
            row["policy"],
            str(row["turn"]),
            str(row["prompt_tokens"]),
            f"{row['reused']} of {row['conversations']}",
            f"{row['cached_tokens']['reuse']['median']:.0f}",
            *(f"{1e3 * first[mode]['median']:.0f}" for mode in ("anew", "reuse")),
            ranged(row["times_faster"], ".2f"),
        )
    return table


def _finish(axis: Any, title: str, label: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def draw_serve(configuration: Result, result: Result, path: Path) -> Path:
    """Time to first token, goodput and running requests over the rate, one line per policy."""
    c, rows = configuration, result["rows"]
    rates = [f"{float(each):g}" for each in c["rates"]]
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    first, good, most = figure.subplots(1, 3)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        at = [rates.index(rate(row)) for row in mine]
        latencies = [row["first_token_seconds"] or {} for row in mine]
        middle, late = ([each.get(name) for each in latencies] for name in ("p50", "p99"))
        drawn = first.plot(at, _gaps(middle), marker="o", label=policy)
        colour = drawn[0].get_color()
        first.plot(at, _gaps(late), linestyle=":", marker=".", color=colour)
        good.plot(at, [row["goodput"] for row in mine], marker="o", color=colour)
        most.plot(at, _gaps([row["peak_running"] for row in mine]), marker="o", color=colour)
    first.axhline(c["slo_ttft"], color="0.6", linewidth=0.8, linestyle="--")
    for axis in (first, good, most):
        axis.set_xticks(range(len(rates)), rates)
    label = "requests/s offered"
    _finish(first, "seconds to first token (dotted: p99; dashed: limit)", label)
    _finish(
        good,
        f"good requests/s (within {c['slo_ttft']:g} s and {1e3 * c['slo_itl']:g} ms a token)",
        label,
    )
    _finish(most, "most requests running at once", label)
    first.legend(frameon=False)
    figure.suptitle(
        f"{c['requests']} requests of {c['prompt_len']} + {c['output_len']} tokens"
        + ("" if c["url"] else f", {c['kv_memory']} of KV memory")
    )
    return save(figure, path)


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def draw_turns(configuration: Result, result: Result, path: Path) -> Path:
    """Time to first token over the turns, with and without reuse, and the speedup."""
    c, rows = configuration, result["rows"]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        turns = [row["turn"] for row in mine]
        colour = None
        for mode, style, words in (("reuse", "-", "with reuse"), ("anew", "--", "anew")):
            times = [row["first_token_seconds"][mode] for row in mine]
            drawn = left.plot(
                turns,
                [1e3 * each["median"] for each in times],
                style,
                marker="o",
                color=colour,
                label=f"{policy}, {words}",
            )
            colour = drawn[0].get_color()
        faster = [row["times_faster"] for row in mine]
        right.plot(turns, [each["median"] for each in faster], marker="o", color=colour)
        low, high = ([each[name] for each in faster] for name in ("min", "max"))
        right.fill_between(turns, low, high, color=colour, alpha=0.12, linewidth=0)
    right.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
    for axis in (left, right):
        axis.set_xticks(range(1, c["turns"] + 1))
    _finish(left, "time to first token, ms", "turn")
    _finish(right, "times faster with reuse (band: range)", "turn")
    left.set_ylim(0, 1.35 * left.get_ylim()[1])  # room for the legend
    left.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, handlelength=3)
    figure.suptitle(
        f"{c['prompt_len']} tokens, then {c['turn_len']} new ones a turn; "
        f"{c['output_len']} generated"
    )
    return save(figure, path)
