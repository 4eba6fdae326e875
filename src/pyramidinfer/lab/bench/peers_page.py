"""The comparison with other engines in ``docs/numbers.md`` and in the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pyramidinfer.lab.bench.engines import KEEP
from pyramidinfer.lab.bench.peers_table import (
    EQUAL_HEAD,
    HEAD,
    OURS,
    Group,
    best_peer,
    equal_rows,
    groups,
    peers_reasons,
    peers_rows,
)
from pyramidinfer.lab.numbers_studies import origin, table
from pyramidinfer.lab.shapes import SHAPES
from pyramidinfer.models.catalog import find_entry

__all__ = ["BEGIN", "END", "PAGE", "PEER_SHAPES", "peers", "render_speed"]

Result = dict[str, Any]
PAGE = Path("README.md")
BEGIN, END = "<!-- from benchmarks/results/peers.json -->", "<!-- end -->"
#: Further shapes that are measured with random weights, each in its own result.
PEER_SHAPES = ("qwen2.5-0.5b", "llama3.2-1b")


def _model(shape: str) -> str:
    """The model in words."""
    if shape in SHAPES:
        return f"random weights in the shape of `{shape}`"
    return find_entry(shape).title.partition(" (")[0]


def peers(entry: Result, picture: str = "peers") -> str:
    """The section of ``docs/numbers.md``."""
    c, result = entry["configuration"], entry["result"]
    loads = "; ".join(
        f"{name}: {w['requests']} × ({w['prompt_len']:,} + {w['new']}) tokens"
        for name, w in c["workloads"].items()
    )
    rows = result["rows"]
    ok = [row for row in rows if row["status"] == "ok"]
    versions = {
        " with ".join(f"{name} {n}" for name, n in row["versions"].items() if name != "torch")
        for row in ok
        if not row["is_ours"]
    }
    prompts = "random tokens" if c["shape"] in SHAPES else "real English text"
    lines = [
        f"## Other engines{'' if picture == 'peers' else ', ' + c['shape']}\n",
        origin(entry),
        f"On {_model(c['shape'])}, {c['threads']} threads, greedy, end of sequence ignored, the "
        f"same prompts ({prompts}); one engine after the other in the run of {result['run']}, each "
        f"in its own process. Requests × (prompt + generated): {loads}. Up to {c['repeats']} "
        f"repeats, fewer once {c['enough_seconds']:g} seconds are measured. "
        f"{'; '.join(sorted(versions, key=str.lower))}.\n",
        "```bash\n"
        f"make bench-peers{'' if picture == 'peers' else '-larger LARGER=' + c['shape']}\n```\n",
        "**How to read it.** `8/16` are the bits of the weights and of the KV cache; an engine is "
        "compared with those of the same bits only. Ratios are of output tokens/s. Ours: `full` "
        f"with the whole cache, `pyramid` and `pyramidinfer` with keep={KEEP:g}; other engines "
        "with *eviction* keep about as many entries.\n",
        *table(EQUAL_HEAD, equal_rows(result)),
        "\nEvery engine: prefill ends when the last request has its first token; a step is the "
        "remaining time divided by the number of tokens after the first. `weights` is their bytes "
        "as stored. `KV`, for our engine only, is the cache's bytes after prefill divided by those "
        "of a full cache in the same bits. `memory` is the peak of the process. `same tokens` is "
        "the share equal to transformers' tokens in bfloat16.\n",
        *table(HEAD, peers_rows(result)),
        *(f"\n{reason}" for reason in peers_reasons(result)),
        *(f"\n{note}" for note in _notes(rows)),
        f"\n![other engines](images/{picture}.png)\n",
    ]
    return "\n".join(lines)


def _notes(rows: list[Result]) -> list[str]:
    """A note about each engine that has one."""
    found = {row["engine"]: row["note"] for row in rows if row["note"]}
    for row in rows:
        notes = row.get("notes", {})
        if "types" in notes:
            kinds = ", ".join(f"{count} {kind}" for kind, count in notes["types"].items())
            bits = f"{notes['bits_per_weight']:.1f} bits per weight"
            found[row["engine"]] = f"{bits} ({kinds} matrices)"
    return [f"{name}: {note}." for name, note in found.items()]


# --- the README -----------------------------------------------------------------------------------


def render_speed(page: str, entry: Result, weights: Result | None, tasks: Result | None) -> str:
    """The README with the table of this result between the two marks.

    weights, tasks : results of ``bench weights`` and of ``study ruler --weights``, for the quality
    of quantized weights; left out if they are of another model.
    """
    c, result = entry["configuration"], entry["result"]
    head = ["workload", "weights/cache bits", *(f"`{each}`" for each in OURS)]
    rows = [_speed_row(c, result, group) for group in groups(result)]
    lines = [
        BEGIN,
        f"The figure compares engines on {_model(c['shape'])}, on {entry['machine']['cores']} CPU "
        f"cores with {c['threads']} threads, at equal bits of weights and KV cache (`8/16`: 8-bit "
        f"weights, 16-bit cache), with the same prompts, one engine after the other in one run "
        f"(`make bench-peers`). The table shows output tokens per second, and in brackets the "
        f"ratio to the fastest other engine that was measured ({_others(result)}). `pyramid` and "
        f"`pyramidinfer` (the paper's rule) have keep={KEEP:g}.\n",
        *table([*head, "fastest other engine"], [row for row in rows if row]),
        "",
    ]
    if weights is not None and weights["configuration"]["subject"]["model"] == c["shape"]:
        lines.append(f"{_perplexity(weights)}{'' if tasks is None else _scores(tasks)}\n")
    lines += [
        "Memory, prefill and step times of every engine: [docs/numbers.md](docs/numbers.md); "
        "method: [docs/bench.md](docs/bench.md).",
        END,
    ]
    before, _, rest = page.partition(BEGIN)
    return before + "\n".join(lines) + rest.partition(END)[2]


def _speed_row(configuration: Result, result: Result, group: Group) -> list[str]:
    """A row of the table; empty if our engine, or every other engine, was not measured."""
    name, bits = group
    best = best_peer(result, group)
    speeds = {
        row["engine"]: row["output_tokens_per_second"]
        for row in result["rows"]
        if row["workload"] == name and row["status"] == "ok"
    }
    mine = [speeds.get(f"{each} {bits}") for each in OURS.values()]
    if best is None or not any(mine):
        return []
    rate = best["output_tokens_per_second"]
    w = configuration["workloads"][name]
    return [
        f"{name}: {w['requests']} × ({w['prompt_len']:,} + {w['new']})",
        bits,
        *("–" if each is None else f"{each:.1f} ({each / rate:.2f}×)" for each in mine),
        f"{best['engine'].removesuffix(f' {bits}')}: {rate:.1f}",
    ]


def _others(result: Result) -> str:
    """The other engines that were measured on each workload."""
    found: dict[str, set[str]] = {}
    for row in result["rows"]:
        if row["status"] == "ok" and not row["is_ours"]:
            found.setdefault(row["workload"], set()).add(re.split("[ ,]", row["engine"])[0])
    return "; ".join(
        f"on {name}: {', '.join(sorted(engines, key=str.lower))}"
        for name, engines in sorted(found.items())
    )


def _perplexity(weights: Result) -> str:
    """The perplexity of our quantized weights."""
    c, rows = weights["configuration"], weights["result"]["rows"]
    return (
        f"The perplexity of `{c['subject']['model']}` on real English text, by the weights: "
        f"{_by_weights(rows, 'perplexity')} ([docs/weights.md](docs/weights.md))."
    )


def _scores(tasks: Result) -> str:
    """The mean task scores of our quantized weights."""
    means = tasks["meta"]["means"]
    count, samples = len(means[0]["tasks"]), means[0]["samples"]
    return (
        f" Mean score on {count} RULER tasks with {samples} samples each: "
        f"{_by_weights(means, 'score')}."
    )


def _by_weights(rows: list[Result], key: str) -> str:
    return ", ".join(
        f"{row[key]:.2f} with {'16 bits' if row['weights'] == 'auto' else row['weights']}"
        for row in rows
        if row["weights"] in ("auto", "int8", "int4")
    )
