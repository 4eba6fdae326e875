"""The terminal's output after a bench."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = [
    "adapters_table",
    "footprint_table",
    "kernels_table",
    "kv_dtypes_table",
    "latency_table",
    "lossless_table",
    "memory_table",
    "step_table",
    "throughput_table",
    "weights_table",
]

Result = dict[str, Any]


def mebibytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f} MiB"


def ranged(values: dict[str, float] | None, form: str, scale: float = 1.0) -> str:
    """``12.3 (12.1-12.9)``; a dash without a measurement."""
    if values is None:
        return "–"
    low, high = values["min"] * scale, values["max"] * scale
    return f"{values['median'] * scale:{form}} ({low:{form}}-{high:{form}})"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _by_policy(title: str, rows: list[Result], lines: dict[str, Any]) -> Table:
    """One column per policy, one line per figure."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["policy"], justify="right")
    for name, show in lines.items():
        table.add_row(name, *(show(row) for row in rows))
    return table


def _stored(configuration: Result) -> str:
    """A note if the cache or the weights are not in the model's dtype."""
    kv_dtype, weights = configuration["kv_dtype"], configuration["weights"]
    cache = "" if kv_dtype == "auto" else f", cache in {kv_dtype}"
    return cache if weights == "auto" else f"{cache}, weights in {weights}"


def throughput_table(configuration: Result, result: Result) -> Table:
    c, roof = configuration, result["roof"]
    title = (
        f"{c['batch']} requests of {c['prompt_len']} + {c['output_len']} tokens{_stored(c)}; "
        f"median (range) of {c['repeats']}; roof: read {roof['read'] / 1e9:.1f} GB/s, "
        f"matrices {roof['matrix'] / 1e9:,.0f} GFLOP/s"
    )
    return _by_policy(
        title,
        result["rows"],
        {
            "output tokens/s": lambda r: ranged(r["output_tokens_per_second"], ".1f"),
            "prompt + output tokens/s": lambda r: ranged(r["all_tokens_per_second"], ".0f"),
            "times the first": lambda r: ranged(r["against_first"]["throughput"], ".2f"),
            "prefill, s": lambda r: ranged(r["prefill_seconds"], ".2f"),
            "decode step, ms": lambda r: ranged(r["step_seconds"], ".1f", 1e3),
            "prefill, of matrix rate": lambda r: percent(r["roofline"]["share_of_matrix_rate"]),
            "decode, of read bandwidth": lambda r: percent(
                r["roofline"]["share_of_read_bandwidth"]
            ),
            "selection, of prefill": lambda r: f"{r['selection']['prefill_share']:.1%}",
            "selection, of decoding": lambda r: f"{r['selection']['decode_share']:.1%}",
            "tokens computed": lambda r: percent(r["computed_share"]),
            "KV after prefill": lambda r: percent(r["kv_share_prefill"]),
            "KV at the end": lambda r: percent(r["kv_share_end"]),
            "peak memory": lambda r: mebibytes(r["peak_bytes"]),
        },
    )


def latency_table(configuration: Result, result: Result) -> Table:
    c = configuration
    table = Table(title=f"latency, ms; {c['output_len']} tokens generated{_stored(c)}")
    for name in ("policy", "batch", "prompt", "first token p50", "p99", "between p50", "p99"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in result["rows"]:
        first, between = row["first_token_seconds"], row["inter_token_seconds"]
        table.add_row(
            row["policy"],
            str(row["batch"]),
            str(row["prompt_len"]),
            *(f"{1e3 * each[at]:.1f}" for each in (first, between) for at in ("p50", "p99")),
        )
    return table


def memory_table(configuration: Result, result: Result) -> Table:
    c = configuration
    title = (
        f"requests of {c['prompt_len']} + {c['output_len']} tokens in {c['kv_memory']}{_stored(c)}"
    )

    def flight(row: Result) -> str:
        more = " or more" if row.get("is_capped") else ""
        return f"{row['in_flight']}{more}"

    return _by_policy(
        title,
        result["rows"],
        {
            "fit with whole prompts": lambda r: str(r["fits"]),
            "in flight at once": flight,
            "KV a request, at the end": lambda r: mebibytes(r.get("kv_bytes_per_request")),
            "a full one": lambda r: mebibytes(r.get("full_bytes_per_request")),
            "share": lambda r: percent(r.get("kv_share_end")),
            "most held by all": lambda r: mebibytes(r.get("peak_kv_bytes")),
            "output tokens/s": lambda r: (
                f"{r['output_tokens_per_second']:.1f}" if r["fits"] else "–"
            ),
        },
    )


def kernels_table(configuration: Result, result: Result) -> Table:
    roof = result["roof"]
    table = Table(
        title=(
            f"attention backend {result['backend']}, {configuration['dtype']}; roof: read "
            f"{roof['read'] / 1e9:.1f} GB/s, copy {roof['copy'] / 1e9:.1f} GB/s, matrices "
            f"{roof['matrix'] / 1e9:,.0f} GFLOP/s"
        )
    )
    for name in (
        "kernel",
        "batch",
        "context",
        "heads",
        "time, ms",
        "against",
        "its time, ms",
        "share",
    ):
        table.add_column(name, justify="left" if name in ("kernel", "against") else "right")
    for row in result["rows"]:
        table.add_row(
            row["kernel"],
            str(row["batch"]),
            str(row["context"]),
            f"{row['heads']}/{row['kv_heads']}",
            ranged(row["seconds"], ".3f", 1e3),
            row["against"],
            f"{1e3 * row['against_seconds']['median']:.3f}",
            percent(row["share"]),
        )
    return table


def lossless_table(result: Result) -> Table:
    """Speed relative to the full cache without drafts, with the range over the repeats."""
    table = Table(title=f"lossless, backend {result['backend']}; speed relative to full")
    if (checked := result.get("checked")) is not None:
        table.caption = f"{checked['different']} of {checked['prompts']} answers differ"
    names = ("context", "batch", "drafts", "read", "guesses", "right", "K/W")
    for name in (*names, "times full", "expected"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['context']:,}",
            str(row["batch"]),
            row["drafts"],
            percent(row["read_share"]),
            row["draft_tokens"],
            percent(row["rate"]),
            f"{row['cache_over_weights']:.1f}",
            ranged(row["speedup"], ".2f"),
            f"{row['expected']:.2f}",
        )
    return table


def kv_dtypes_table(result: Result) -> Table:
    """Speed relative to 16 bits, with the range over the repeats."""
    names = list(result["rows"][0]["speedup"])
    table = Table(title=f"decode attention, backend {result['backend']}; speed relative to 16 bits")
    for name in ("heads", "size", "batch", "context", "16 bits, ms", "of a plain read", *names):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['heads']}/{row['kv_heads']}",
            str(row["size"]),
            str(row["batch"]),
            f"{row['context']:,}",
            ranged(row["seconds"]["auto"], ".3f", 1e3),
            percent(row["share_of_read"]["median"]),
            *(ranged(row["speedup"][name], ".2f") for name in names),
        )
    return table


def footprint_table(result: Result) -> Table:
    """MiB of a process by weights and kv_memory; below the table, installed sizes."""
    table = Table(title="memory of a serving process, MiB")
    parts = ("weight_bytes", "kv_memory", "beside", "resident_full", "peak")
    for name in ("stored as", "weights", "kv_memory", "beside", "resident", "peak", "pages used"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        sizes = [f"{row[part] / 2**20:.0f}" for part in parts]
        table.add_row(row["weights"], *sizes, f"{row['pages_used']:.0%}")
    largest = [f"{name} {size / 1e6:.0f}" for name, size in list(result["installed"].items())[:6]]
    table.caption = f"installed: {result['installed_bytes'] / 1e6:.0f} MB ({', '.join(largest)})"
    return table


def adapters_table(result: Result) -> Table:
    """The median of step and prefill for every number of adapters, and their ratio to no
    adapter."""
    table = Table(title=f"requests with adapters, backend {result['backend']}")
    for name in ("adapters", "step, ms", "to none", "prefill, ms", "to none"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        cells = [str(row["adapters"])]
        for what in ("step", "prefill"):
            cells.append(f"{1e3 * row[f'{what}_seconds']['median']:.2f}")
            cells.append(f"{row[f'{what}_ratio']['median']:.2f}")
        table.add_row(*cells)
    return table


def step_table(result: Result) -> Table:
    """Milliseconds of each part of a decode step."""
    table = Table(title="a decode step, ms, and the share of the read bandwidth")
    parts = list(result["rows"][0]["parts"])
    for name in ("weights", "batch", "step", "bandwidth", *parts):
        table.add_column(name, justify="right", overflow="fold")
    for row in result["rows"]:
        table.add_row(
            row["weights"],
            str(row["batch"]),
            f"{1e3 * row['step_seconds']['median']:.2f}",
            f"{row['share_of_read_bandwidth']['median']:.0%}",
            *(f"{1e3 * seconds:.2f}" for seconds in row["parts"].values()),
        )
    return table


def weights_table(result: Result) -> Table:
    """Bytes and perplexity, then the median of step and prefill for every batch."""
    table = Table(title=f"quantized weights, backend {result['backend']}")
    batches = [each["batch"] for each in result["rows"][0]["speed"]]
    heads = [f"{what} at {batch}, ms" for batch in batches for what in ("step", "prefill")]
    for name in ("weights", "MB", "load, s", "perplexity", "KL", *heads):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        times = [
            f"{1e3 * each[f'{what}_seconds']['median']:.2f}"
            for each in row["speed"]
            for what in ("step", "prefill")
        ]
        table.add_row(
            row["weights"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['load_seconds']:.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
            *times,
        )
    return table
