"""Pictures of the benches' results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "draw_kernels",
    "draw_latency",
    "draw_lossless",
    "draw_memory",
    "draw_peers",
    "draw_throughput",
]

OURS, THEIRS, MISSING = (0.20, 0.38, 0.62), (0.62, 0.66, 0.72), (0.86, 0.25, 0.16)
Result = dict[str, Any]


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


def _bars(axis: Any, names: list[str], values: list[float], title: str, form: str) -> None:
    axis.bar(range(len(names)), values, color=OURS)
    for at, value in enumerate(values):
        axis.text(at, value, f"{value:{form}}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_throughput(configuration: Result, result: Result, path: Path) -> Path:
    """Four figures of every policy, side by side."""
    rows = result["rows"]
    names = [row["policy"] for row in rows]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2).flat
    panels: list[tuple[str, Callable[[Result], float], str]] = [
        ("output tokens/s", lambda r: r["output_tokens_per_second"]["median"], ".0f"),
        ("prefill, seconds", lambda r: r["prefill_seconds"]["median"], ".2f"),
        ("decode step, ms", lambda r: 1e3 * (r["step_seconds"] or {}).get("median", 0.0), ".1f"),
        ("KV after prefill, share of full", lambda r: r["kv_share_prefill"], ".2f"),
    ]
    for axis, (title, value, form) in zip(axes, panels, strict=True):
        _bars(axis, names, [value(row) for row in rows], title, form)
    c = configuration
    figure.suptitle(f"{c['batch']} requests of {c['prompt_len']} + {c['output_len']} tokens")
    return save(figure, path)


def _context_axis(axis: Any, lengths: list[int]) -> None:
    """Lengths along x on a scale of doublings; y from zero."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)


def draw_lossless(result: Result, path: Path) -> Path:
    """Speedup over the full cache, by the ratio of cache bytes to weight bytes."""
    rows = result["rows"]
    steps = list(dict.fromkeys(row["draft_tokens"] for row in rows))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(steps):
        mine = sorted(
            (row for row in rows if row["draft_tokens"] == name),
            key=lambda row: row["cache_over_weights"],
        )
        at = [row["cache_over_weights"] for row in mine]
        found, color = [row["speedup"]["median"] for row in mine], f"C{number}"
        label = "as many as pay" if name == "auto" else name
        axis.plot(at, found, "o-", color=color, label=label)
        if name != "auto":
            axis.plot(at, [row["expected"] for row in mine], ":", color=color, alpha=0.5)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("bytes of the caches / bytes of the weights (dotted: memory-bound limit)")
    axis.set_title("decode speed relative to the full cache without drafts", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="guesses in a step")
    return save(figure, path)


def draw_latency(configuration: Result, result: Result, path: Path) -> Path:
    """Time to first token and between tokens over prompt length, one row of panels per batch."""
    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches), 2, squeeze=False)
    names = (
        ("first_token_seconds", "time to first token"),
        ("inter_token_seconds", "time between tokens"),
    )
    for line, batch in zip(axes, batches, strict=True):
        for axis, (key, title) in zip(line, names, strict=True):
            for policy in policies:
                mine = [r for r in rows if r["policy"] == policy and r["batch"] == batch]
                lengths = [row["prompt_len"] for row in mine]
                drawn = axis.plot(
                    lengths, [1e3 * row[key]["p50"] for row in mine], marker="o", label=policy
                )
                axis.plot(
                    lengths,
                    [1e3 * row[key]["p99"] for row in mine],
                    linestyle=":",
                    color=drawn[0].get_color(),
                )
            _context_axis(axis, sorted({row["prompt_len"] for row in rows}))
            axis.set_title(f"{title}, ms (dotted: p99), batch {batch}", loc="left", fontsize=10)
            axis.set_xlabel("prompt tokens")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    return save(figure, path)


def draw_memory(configuration: Result, result: Result, path: Path) -> Path:
    """Running requests, and bytes per request."""
    rows = result["rows"]
    names = [row["policy"] for row in rows]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    c = configuration
    title = f"running requests in {c['kv_memory']} ({c['prompt_len']} + {c['output_len']} tokens)"
    _bars(left, names, [row["in_flight"] for row in rows], title, ".0f")
    sizes = [row.get("kv_bytes_per_request", 0.0) / 2**20 for row in rows]
    _bars(right, names, sizes, "MiB a request at the end", ".1f")
    return save(figure, path)


def draw_kernels(configuration: Result, result: Result, path: Path) -> Path:
    """Speed of each kernel relative to its reference, over the context."""
    rows = result["rows"]
    kernels = list(dict.fromkeys((row["kernel"], row["against"]) for row in rows))
    figure = Figure(figsize=(3.2 * len(kernels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(kernels), squeeze=False)[0]
    for axis, (kernel, against) in zip(axes, kernels, strict=True):
        mine = [row for row in rows if row["kernel"] == kernel]
        for heads, batch in dict.fromkeys((row["kv_heads"], row["batch"]) for row in mine):
            line = [r for r in mine if (r["kv_heads"], r["batch"]) == (heads, batch)]
            of_batch = f", batch {batch}" if kernel.startswith("decode") else ""
            axis.plot(
                [row["context"] for row in line],
                [row["share"] for row in line],
                marker="o",
                label=f"{heads} KV heads{of_batch}",
            )
        axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
        _context_axis(axis, sorted({row["context"] for row in mine}))
        axis.set_title(f"{kernel}: share of a {against}", loc="left", fontsize=9)
        axis.set_xlabel("context")
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def draw_peers(configuration: Result, result: Result, path: Path) -> Path:
    """Output tokens/s, a column for each workload; engines of the same bits stand together, and
    those that did not run are named."""
    rows, workloads = result["rows"], configuration["workloads"]
    engines = {row["engine"]: f"{row['weights']}/{row['cache']}" for row in rows}
    order = [
        name
        for bits in dict.fromkeys(engines.values())
        for name in engines
        if engines[name] == bits
    ]
    places, heads = _places([engines[name] for name in order])
    size = (5.2 * len(workloads) + 1.6, 0.27 * places[-1] + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(workloads), squeeze=False, sharey=True)[0]
    for axis, (name, w) in zip(axes, workloads.items(), strict=True):
        mine = {row["engine"]: row for row in rows if row["workload"] == name}
        for at, engine in zip(places, order, strict=True):
            _draw_peer(axis, at, mine.get(engine))
        axis.margins(x=0.15)
        axis.set_ylim(places[-1] + 0.6, -0.9)
        axis.set_title(
            f"{name}: {w['requests']} x {w['prompt_len']} + {w['new']} tokens, output tokens/s",
            loc="left",
            fontsize=10,
        )
        axis.spines[["top", "right"]].set_visible(False)
    titles = [engine.removesuffix(f" {engines[engine]}") for engine in order]
    axes[0].set_yticks(places, titles, fontsize=8)
    for at, bits in heads:
        weights, cache = bits.split("/")
        words = f"weights {weights} bits, KV cache {cache} bits"
        axes[0].text(0, at, f" {words}", va="center", fontsize=8, fontweight="bold")
    return save(figure, path)


def _places(bits: list[str]) -> tuple[list[int], list[tuple[int, str]]]:
    """Positions of the bars, and of the heading of each group."""
    places: list[int] = []
    heads: list[tuple[int, str]] = []
    at = 0
    for each in bits:
        if not heads or heads[-1][1] != each:
            heads.append((at, each))
            at += 1
        places.append(at)
        at += 1
    return places, heads


def _draw_peer(axis: Any, at: int, row: Result | None) -> None:
    if row is None or row["status"] != "ok":
        why = "not measured" if row is None else row["status"]
        axis.text(0, at, f" {why}", va="center", fontsize=7, color=MISSING if row else THEIRS)
        return
    speed = row["output_tokens_per_second"]
    axis.barh(at, speed, color=OURS if row["is_ours"] else THEIRS)
    axis.text(speed, at, f" {speed:.1f}", va="center", fontsize=8)
