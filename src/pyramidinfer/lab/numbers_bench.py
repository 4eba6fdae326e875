"""Sections of ``docs/numbers.md`` on speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyramidinfer.lab.bench.peers_page import PEER_SHAPES, peers
from pyramidinfer.lab.bench.setting import DEFAULT_SHAPE
from pyramidinfer.lab.numbers_studies import command_block, origin, percent, table

__all__ = ["SECTIONS"]

Result = dict[str, Any]


def _subject(configuration: Result) -> str:
    c = configuration
    name = (
        f"`{c['model']}`"
        if c["shape"] is None
        else f"random weights in the shape of `{c['shape']}`"
    )
    dtype = "bfloat16" if c["dtype"] == "auto" and c["shape"] else c["dtype"]
    stored, weights = c.get("kv_dtype", "auto"), c.get("weights", "auto")
    words = [dtype, *([f"cache in {stored}"] if stored != "auto" else [])]
    words += [f"weights in {weights}"] if weights != "auto" else []
    return f"{name} ({', '.join(words)})"


def _spread(values: dict[str, float] | None, form: str, scale: float = 1.0) -> str:
    if values is None:
        return "–"
    low, high = scale * values["min"], scale * values["max"]
    return f"{scale * values['median']:{form}} [{low:{form}}, {high:{form}}]"


def _selection(shares: dict[str, float]) -> str:
    return f"{shares['prefill_share']:.1%} / {shares['decode_share']:.1%}"


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def throughput(entry: Result, name: str = "throughput", title: str = "Throughput") -> str:
    c, result = entry["configuration"], entry["result"]
    roof = result["roof"]
    lines = [
        f"## {title}\n",
        origin(entry),
        f"On {_subject(c)}; {c['batch']} requests of {c['prompt_len']} prompt tokens, "
        f"{c['output_len']} generated each, all at once; policies take turns, with {c['repeats']} "
        f"measured passes each and {c['warmup']} for warm-up.\n",
        command_block(entry),
        "**How to read it.** "
        "Figures are medians with the range in brackets. `times` is the ratio of neighbouring "
        "passes. Prefill ends when the last request has its first token. The roofline was measured "
        f"in the same run: reading {roof['read'] / 1e9:.1f} GB/s, matrix products "
        f"{roof['matrix'] / 1e9:,.0f} GFLOP/s. `of matrices` is prefill's share of the matrix rate "
        "(counting the tokens really computed), `of reading` decoding's share of the read rate "
        "(counting weights and cache once per step). `selection` is the cost of choosing tokens "
        "(scores, ranking, gathering, compaction), as shares of prefill and of decoding.\n",
    ]
    head = [
        "policy",
        "output tokens/s",
        "prompt + output",
        f"times `{c['policies'][0]}`",
        "prefill, s",
        "step, ms",
        "of matrices",
        "of reading",
        "selection",
        "computed",
        "KV after prefill",
        "KV at the end",
        "peak memory",
    ]
    lines += table(
        head,
        [
            [
                f"`{row['policy']}`",
                _spread(row["output_tokens_per_second"], ".1f"),
                f"{row['all_tokens_per_second']['median']:.0f}",
                _spread(row["against_first"]["throughput"], ".2f"),
                _spread(row["prefill_seconds"], ".2f"),
                _spread(row["step_seconds"], ".1f", 1e3),
                _share(row["roofline"]["share_of_matrix_rate"]),
                _share(row["roofline"]["share_of_read_bandwidth"]),
                _selection(row["selection"]),
                percent(row["computed_share"]),
                f"{row['kv_share_prefill']:.1%}",
                f"{row['kv_share_end']:.1%}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            ]
            for row in result["rows"]
        ],
    )
    return "\n".join([*lines, f"\n![{title.lower()}](images/bench_{name}.png)\n"])


def latency(entry: Result) -> str:
    c, rows = entry["configuration"], entry["result"]["rows"]
    lines = [
        "## Latency\n",
        origin(entry),
        f"On {_subject(c)}; {c['output_len']} tokens generated; policies take turns, with "
        f"{c['repeats']} measured passes each and {c['warmup']} for warm-up.\n",
        command_block(entry),
        "**How to read it.** "
        "Figures are milliseconds to the first token and between tokens: the median (p50) and the "
        "99th percentile (p99).\n",
    ]
    head = ["batch", "prompt", "policy", "first token p50", "p99", "between p50", "p99"]
    lines += table(
        head,
        [
            [
                str(row["batch"]),
                f"{row['prompt_len']:,}",
                f"`{row['policy']}`",
                *(
                    f"{1e3 * row[key][at]:.1f}"
                    for key in ("first_token_seconds", "inter_token_seconds")
                    for at in ("p50", "p99")
                ),
            ]
            for row in rows
        ],
    )
    return "\n".join([*lines, "\n![latency](images/bench_latency.png)\n"])


def memory(entry: Result) -> str:
    c, rows = entry["configuration"], entry["result"]["rows"]
    lines = [
        "## Requests in one memory\n",
        origin(entry),
        f"On {_subject(c)}; requests of {c['prompt_len']} prompt tokens and {c['output_len']} "
        f"generated ones share a `kv_memory` of {c['kv_memory']}; at most {c['most']} run.\n",
        command_block(entry),
        "**How to read it.** "
        "`with whole prompts` is the number of requests that fit if all prompts are prefilled at "
        "once; more are in flight once some of them have been compressed.\n",
    ]
    head = [
        "policy",
        "with whole prompts",
        "in flight",
        f"times `{c['policies'][0]}`",
        "MiB per request",
        "full cache, MiB",
        "output tokens/s",
    ]
    found = []
    for row in rows:
        if not row["fits"]:
            found.append([f"`{row['policy']}`", "0", "0", *["–"] * 4])
            continue
        times = row["in_flight_against_first"]
        found.append(
            [
                f"`{row['policy']}`",
                str(row["fits"]),
                f"{row['in_flight']}{' or more' if row['is_capped'] else ''}",
                "–" if times is None else f"{times:.2f}",
                f"{row['kv_bytes_per_request'] / 2**20:.1f}",
                f"{row['full_bytes_per_request'] / 2**20:.1f}",
                f"{row['output_tokens_per_second']:.1f}",
            ]
        )
    lines += table(head, found)
    return "\n".join([*lines, "\n![requests in one memory](images/bench_memory.png)\n"])


def kernels(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    roof = result["roof"]
    lines = [
        "## Kernels\n",
        origin(entry),
        f"Attention backend `{result['backend']}`, {c['dtype']}, heads of 64.\n",
        command_block(entry),
        "**How to read it.** "
        "`share` is the time of the comparison divided by the time of the kernel, both measured in "
        "turns. The comparison is a plain read of the same bytes, a copy of as many bytes, or "
        "torch's fused attention. Roofline in the same run: reading "
        f"{roof['read'] / 1e9:.1f} GB/s, copying {roof['copy'] / 1e9:.1f} GB/s, matrix products "
        f"{roof['matrix'] / 1e9:,.0f} GFLOP/s. Heads: query heads/KV heads.\n",
    ]
    head = [
        "kernel",
        "heads",
        "batch",
        "context",
        "ms",
        "compared with",
        "its ms",
        "share",
        "of matrices",
    ]
    lines += table(
        head,
        [
            [
                row["kernel"],
                f"{row['heads']}/{row['kv_heads']}",
                str(row["batch"]),
                f"{row['context']:,}",
                _spread(row["seconds"], ".3f", 1e3),
                row["against"],
                f"{1e3 * row['against_seconds']['median']:.3f}",
                percent(row["share"]),
                _share(row["share_of_matrix_rate"]),
            ]
            for row in result["rows"]
        ],
    )
    return "\n".join([*lines, "\n![kernels](images/bench_kernels.png)\n"])


def kv_dtype_kernels(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    names = c["kv_dtypes"]
    lines = [
        "## Quantized caches: decode attention\n",
        origin(entry),
        command_block(entry),
        f"Attention backend `{result['backend']}`, queries in {c['dtype']}. "
        "**How to read it.** `of a plain read` is "
        "the time of reading the 16-bit entries once, divided by the time of the 16-bit kernel. "
        "The columns after it are the speed-up of the same step with quantized entries, median and "
        f"range of {c['repeats']} repeats in turns. Heads: query heads/KV heads.\n",
        *table(
            ["of", "heads", "size", "batch", "context", "16 bits, ms", "of a plain read", *names],
            [
                [
                    row["model"],
                    f"{row['heads']}/{row['kv_heads']}",
                    str(row["size"]),
                    str(row["batch"]),
                    f"{row['context']:,}",
                    _spread(row["seconds"]["auto"], ".3f", 1e3),
                    percent(row["share_of_read"]["median"]),
                    *(_spread(row["speedup"][name], ".2f") for name in names),
                ]
                for row in result["rows"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def lossless(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    name = "lossless" if c["accept"] is None else "lossless_simulated"
    if c["shape"] == DEFAULT_SHAPE:
        name = "lossless_full_heads"
    title = {"lossless": "real text", "lossless_simulated": "simulated"}.get(name, "full heads")
    on = f"`{c['model']}`" if c["model"] else f"random weights in the shape of `{c['shape']}`"
    how = f"on {result['text']}"
    if c["accept"] is not None:
        how = (
            f"*simulated*: {result['text']}, with each draft token right at a rate of {c['accept']}"
        )
    lines = [
        f"## Lossless drafts, {title}\n",
        origin(entry),
        command_block(entry),
        f"On {on} ({c['dtype']}), {how}. "
        "**How to read it.** `times full` is the speed-up over `full` for the same "
        f"tokens, median and range of {c['repeats']} repeats in turns. `drafted` is the number of "
        "draft tokens per step, `right` the rate at which a draft token is right, `read` the share "
        "of the cache that drafting reads, `K/W` the bytes of all caches divided by the bytes of "
        "the weights, and `expected` the speed-up by formula at that rate if a step only takes "
        "the time to read memory.\n",
        *table(LOSSLESS, lossless_rows(result)),
    ]
    if checked := result.get("checked"):
        lines.append(
            f"\nOf the greedy answers to {checked['prompts']} prompts of 40 to 400 tokens in a "
            f"ragged batch, {checked['different']} differ from those of `full` "
            f"({checked['drafted']:,} tokens drafted, {checked['accepted']:,} accepted).\n"
        )
    return "\n".join(lines) + f"\n![lossless](images/{name}.png)\n"


LOSSLESS = [
    "context",
    "batch",
    "drafts",
    "read",
    "drafted",
    "right",
    "K/W",
    "times full",
    "expected",
]


def lossless_rows(result: Result) -> list[list[str]]:
    """Rows of ``bench lossless`` with the columns of ``LOSSLESS``."""
    return [
        [
            f"{row['context']:,}",
            str(row["batch"]),
            f"`{row['drafts']}`",
            percent(row["read_share"]),
            row["draft_tokens"],
            percent(row["rate"]) if row["drafted"] else "–",
            f"{row['cache_over_weights']:.1f}",
            _spread(row["speedup"], ".2f"),
            f"{row['expected']:.2f}",
        ]
        for row in result["rows"]
    ]


WEIGHTS = ["weights", "MB", "load, s", "perplexity", "over 16 bits", "KL, nats"]


def weights(entry: Result) -> str:
    """Bytes, quality and times by the format of the weights."""
    c, result = entry["configuration"], entry["result"]
    subject, rows = c["subject"], result["rows"]
    batches = [each["batch"] for each in rows[0]["speed"]]
    heads = [
        f"{what} at {batch}" for batch in batches for what in ("step, ms,", "times", "prefill")
    ]
    lines = [
        f"## Quantized weights, {subject['model']}\n",
        origin(entry),
        command_block(entry),
        f"The model runs in {subject['dtype']}; `auto` has 16 bits per weight "
        "([weights.md](weights.md)). Perplexity and divergence from `auto` are measured on "
        f"{c['samples']} passages of real English, with {c['continuation']} scored tokens after "
        f"{c['context']} tokens of context; in brackets the 95 % interval. `load` quantizes and "
        "packs the model in memory (`gguf`: reads the file). Times are medians of "
        f"{c['repeats']} passes in turns, for requests of {c['prompt_len']} + {c['output_len']} "
        "tokens; `times` and `prefill` are the speed-ups over `auto` of a decode step and of "
        "prefill.\n",
        *table([*WEIGHTS, *heads], [_weights_row(row) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def _weights_row(row: Result) -> list[str]:
    low, high = row["ratio_ci"]
    cells = [
        f"`{row['weights']}`",
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['load_seconds']:.1f}",
        f"{row['perplexity']:.2f}",
        f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
        f"{row['kl']:.4f}",
    ]
    for each in row["speed"]:
        cells += [
            f"{1e3 * each['step_seconds']['median']:.1f}",
            f"{each['step_speedup']['median']:.2f}",
            f"{each['prefill_speedup']['median']:.2f}",
        ]
    return cells


def step(entry: Result) -> str:
    """A decode step by part."""
    c, result = entry["configuration"], entry["result"]
    subject, rows = c["subject"], result["rows"]
    parts = list(rows[0]["parts"])
    lines = [
        f"## A decode step by part, {subject['model']}\n",
        origin(entry),
        command_block(entry),
        f"Milliseconds of a step in {subject['dtype']}, for requests of {c['prompt_len']} + "
        f"{c['output_len']} tokens. `norms` to `down`: all layers together; `cache`: rotation and "
        "writing of entries; `inputs`: the rest of the forward pass, which is Python; `engine`: "
        "the best token and the bookkeeping of requests. `bandwidth`: bytes of linears and head "
        "per second, as a share of the rate at which memory is read right after a pass.\n",
        *table(
            ["weights", "requests", "step", "bandwidth", *parts],
            [
                [
                    f"`{row['weights']}`",
                    f"{row['batch']}",
                    f"{1e3 * row['step_seconds']['median']:.1f}",
                    f"{row['share_of_read_bandwidth']['median']:.0%}",
                    *(f"{1e3 * seconds:.2f}" for seconds in row["parts"].values()),
                ]
                for row in rows
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


SECTIONS: dict[str, Callable[[Result], str]] = {
    "bench_throughput": throughput,
    "bench_long": partial(throughput, name="long", title="Long prompts"),
    "bench_single": partial(throughput, name="single", title="One request alone"),
    "bench_real": partial(throughput, name="real", title="SmolLM2, eight requests at once"),
    "bench_latency": latency,
    "bench_memory": memory,
    "bench_kernels": kernels,
    "kv_dtype_kernels": kv_dtype_kernels,
    "weights_smollm2": weights,
    "weights_gemma3": weights,
    "step_smollm2": step,
    "step_gemma3": step,
    "lossless": lossless,
    "lossless_simulated": lossless,
    "lossless_full_heads": lossless,
    "peers": peers,
    **{f"peers_{shape}": partial(peers, picture=f"peers_{shape}") for shape in PEER_SHAPES},
}
