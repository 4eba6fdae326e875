"""Sections of ``docs/numbers.md`` on real models: RULER, chats, text, long generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyramidinfer.lab.asking import PROTOCOLS
from pyramidinfer.lab.bench.kept import HEAD, kept_rows
from pyramidinfer.lab.numbers_layers import icr, rac
from pyramidinfer.lab.numbers_studies import (
    command_block,
    estimate,
    label,
    named,
    origin,
    percent,
    subject_words,
    table,
)
from pyramidinfer.lab.rows import is_reference, kv_dtype, series, weights
from pyramidinfer.lab.study import Row

__all__ = ["SECTIONS", "lead"]

Result = dict[str, Any]

MODELS = {"smollm2": "SmolLM2", "gemma3-270m": "Gemma 3 270M"}
HOW = (
    "**How to read it.** "
    "A score is the mean share of the expected answers that appear in the output, with its 95 % "
    "interval; all tasks have equal weight. *Inside*: the question was part of the compressed "
    "prompt; *after*: the context was compressed before the question came; *lost*: loss relative "
    "to the full cache on the same samples (paired). KV and computed: shares of the full cache's "
    "bytes and layer-tokens."
)


def _ruler(title: str, name: str, words: str, entry: Result) -> str:
    """One grid of ``study ruler``."""
    plan, means = entry["meta"]["configuration"], entry["meta"]["means"]
    protocols = plan["protocols"]
    head = ["tokens", "policy", "keep", "KV", "computed"]
    head += [word for each in protocols for word in (each, "lost")]
    lines = _ruler_head(title, name, words, entry)
    lines += table(head, (_mean_row(found, protocols) for found in _by_way(means)))
    lines += ["", *_left_out(entry["rows"], means)]
    return "\n".join(lines) + "\n"


def _ruler_head(title: str, name: str, words: str, entry: Result) -> list[str]:
    """The text above a grid's table."""
    meta = entry["meta"]
    plan = meta["configuration"]
    return [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(plan['subject'])}; {_samples(entry['rows'])} per task. {words}\n",
        command_block(meta),
        HOW + "\n",
    ]


def _by_way(means: list[Row]) -> list[dict[str, Row]]:
    """Rows by protocol, of every length, policy, kv dtype and keep."""
    cells: dict[tuple[int, str, float], dict[str, Row]] = {}
    for row in means:
        cell = cells.setdefault((row["length"], series(row), row["keep"]), {})
        cell[row["protocol"]] = row
    return list(cells.values())


def _mean_row(found: dict[str, Row], protocols: list[str]) -> list[str]:
    first = next(iter(found.values()))
    cells = [
        f"{first['length']:,}",
        named(first),
        f"{first['keep']:g}",
        percent(first["kv_share"]),
        percent(first["prefill_share"]),
    ]
    for protocol in protocols:
        row = found.get(protocol)
        cells += (
            ["–", "–"]
            if row is None
            else [
                estimate(row["score"], row["score_ci"]),
                "" if is_reference(row) else estimate(row["lost"], row["lost_ci"]),
            ]
        )
    return cells


def _left_out(rows: list[Row], means: list[Row]) -> list[str]:
    left = sorted({task for row in means for task in row["left_out"]})
    if not left:
        return []
    scores = {row["task"]: row["score"] for row in rows if is_reference(row)}
    told = ", ".join(f"`{task}` ({scores[task]:.2f})" for task in left)
    return [f"The full cache scores below .3 on {told}; these tasks are left out of the means.\n"]


def _samples(rows: list[Row]) -> str:
    counts = {row["length"]: row["samples"] for row in rows}
    return "; ".join(f"at {length:,} tokens {count} samples" for length, count in counts.items())


def _uses_keeps(policies: list[str]) -> bool:
    return any(spec != "full" and "keep=" not in spec for spec in policies)


def _pictured(title: str, name: str, words: str, entry: Result) -> str:
    text = _ruler(title, name, words, entry)
    return text + (
        f"\n![score over bytes](images/{name}.png)\n\n"
        f"![score of every task](images/{name}_tasks.png)\n"
    )


def _kv_dtypes(title: str, name: str, words: str, entry: Result) -> str:
    """A grid of ``study ruler`` with several kv dtypes: the share of the full cache's score that
    remains, by bytes."""
    plan, means = entry["meta"]["configuration"], entry["meta"]["means"]
    ways = _by_way(means)
    order = list(dict.fromkeys((f["length"], f["policy"], f["keep"]) for f in map(_any, ways)))
    ways.sort(
        key=lambda way: order.index(tuple(_any(way)[k] for k in ("length", "policy", "keep")))
    )
    head = ["tokens", "policy", "keep", "kv dtype", "KV"]
    head += [word for each in plan["protocols"] for word in (each, "of full")]
    lines = _ruler_head(title, name, words, entry)
    lines += table(head, (_kv_dtype_row(way, plan["protocols"]) for way in ways))
    lines += ["", *_left_out(entry["rows"], means)]
    return "\n".join(lines) + f"\n![score over bytes](images/{name}.png)\n"


def _codecs(entry: Result) -> str:
    """``study codecs``: the loss from quantization, by how the codes are stored."""
    meta = entry["meta"]
    plan = meta["configuration"]
    lines = [
        "## Quantized caches, stored in other ways\n",
        origin(meta),
        f"{subject_words(plan['subject'])}, {plan['samples']} passages of {plan['context']:,} "
        "tokens of real English. `KL`: mean divergence of the next token's distribution from that "
        "of the unquantized full cache, in nats, with its 95 % interval over passages; `same`: how "
        "often the most likely token is the same; `bytes`: of an entry of one head, key and value. "
        "`kv_dtype` uses the variant named rotated without additions.\n",
        command_block(meta),
    ]
    lines += table(
        ["stored", "bytes", "KL", "same"],
        [
            [
                row["variant"],
                f"{row['bytes']:g}",
                estimate(row["kl"], row["kl_ci"], ".4f"),
                f"{row['agreement']:.1%}",
            ]
            for row in entry["rows"]
        ],
    )
    return "\n".join(lines) + "\n"


def _weights(title: str, name: str, words: str, entry: Result) -> str:
    """A grid of ``study ruler`` with several weights, each under the full cache."""
    lines = _ruler_head(title, name, words, entry)
    lines += table(
        ["weights", "score", "lost"],
        [
            [
                f"`{weights(row)}`",
                estimate(row["score"], row["score_ci"]),
                "–" if is_reference(row) else estimate(row["lost"], row["lost_ci"]),
            ]
            for row in entry["meta"]["means"]
        ],
    )
    return "\n".join([*lines, "", *_left_out(entry["rows"], entry["meta"]["means"])]) + "\n"


def _any(way: dict[str, Row]) -> Row:
    return next(iter(way.values()))


def _kv_dtype_row(way: dict[str, Row], protocols: list[str]) -> list[str]:
    first = _any(way)
    cells = [f"{first['length']:,}", label(first["policy"]), f"{first['keep']:g}"]
    cells += [kv_dtype(first), f"{first['kv_share']:.1%}"]
    for protocol in protocols:
        row = way.get(protocol)
        if row is None:
            cells += ["–", "–"]
            continue
        full = row["score"] + row["lost"]
        most, least = ((full - lost) / full for lost in row["lost_ci"])
        left = percent(row["score"] / full)
        bounds = "" if is_reference(row) else f" [{percent(least)}, {percent(most)}]"
        cells += [estimate(row["score"], row["score_ci"]), left + bounds]
    return cells


def _study(study: str, title: str, name: str, entry: Result, more: str = "") -> str:
    """One result of ``study turns``, ``text`` or ``long``; ``more``: text for this result only."""
    meta, rows = entry["meta"], entry["rows"]
    plan, columns = meta["configuration"], COLUMNS[study]
    lines = [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(plan['subject'])}. {WORDS[study]}{more and ' '}{more}\n",
        command_block(meta),
    ]
    lines += table(
        ["policy", "keep", "KV", *columns, "samples"],
        (
            [
                named(row),
                f"{row['keep']:g}",
                percent(row["kv_share"]),
                *(show(row) for show in columns.values()),
                str(row["samples"]),
            ]
            for row in rows
        ),
    )
    return "\n".join(lines) + f"\n\n![{title}](images/{name}.png)\n"


def _with_ci(name: str) -> Callable[[Row], str]:
    return lambda row: estimate(row[name], row[f"{name}_ci"])


WORDS = {
    "turns": "A chat's first turn contains facts, and turns 2 to 4 ask for them on the reused "
    "cache. Figures are the share answered, the loss relative to the full cache, and the share by "
    "turn.",
    "text": "Perplexity of 64 tokens after a context, that perplexity divided by the full cache's "
    "on the same passages, and divergence (nats per token).",
    "long": "Long greedy answers: perplexity under the full cache, its loss in nats per token, "
    "the number of leading tokens equal to the full cache's answer, and the share of 4-grams that "
    "occurred before.",
}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "turns": {
        "answered": _with_ci("score"),
        "lost": _with_ci("lost"),
        "turn 2, 3, 4": lambda row: ", ".join(f"{each:.2f}" for each in row["by_turn"]),
    },
    "text": {
        "tokens": lambda row: f"{row['context']:,}",
        "perplexity": _with_ci("perplexity"),
        "over full": _with_ci("ratio"),
        "KL": _with_ci("kl"),
    },
    "long": {
        "perplexity": lambda row: f"{row['perplexity']:.2f}",
        "lost": _with_ci("lost"),
        "same first": lambda row: f"{row['same_tokens']:.0f}",
        "repeated": lambda row: f"{row['repetition']:.2f}",
    },
}


def kept(entry: Result) -> str:
    """Our methods compared with kvpress."""
    c, result = entry["configuration"], entry["result"]
    versions = result["versions"]
    reasons = {row["policy"]: row["why"] for row in result["rows"] if row["why"]}
    lines = [
        "## The same entries as kvpress?\n",
        origin(entry),
        f"Methods that [kvpress](https://github.com/NVIDIA/kvpress) {versions['kvpress']} (with "
        f"transformers {versions['transformers']}) also has, on one text: `{c['model']}` in "
        f"float32, {c['length']:,} tokens of {c['source']}, keep={c['keep']:g}, the same options. "
        f"The logits after the text differ by at most {result['logits_apart']:.0e}.\n",
        "```bash\nmake bench-kept\n```\n",
        "**How to read it.** "
        "Each unit with its own budget (a head, the heads of a layer, or the whole model) keeps "
        "the same number of entries in both by construction. `same entries` is the share of them "
        "that both keep: the mean over all units, and the smallest. If the numbers of entries "
        "differ, the share is of the larger number, and the figure after `of` is the largest "
        "possible share. `ranks` is Spearman's correlation of the scores (without tokens that "
        "always stay), if both give scores for every head. Two random choices would share "
        f"{percent(c['keep'])}. Kept: mean number of entries per head.\n",
        *table(HEAD, [[f"`{cells[0]}`", *cells[1:]] for cells in kept_rows(result)]),
        "\nWhat differs by definition:\n",
        *(f"- `{policy}`: {why}." for policy, why in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def lead(results: dict[str, Result]) -> list[str]:
    """The most important figures, for the top of the page."""
    if "heads_ruler" not in results:
        return []
    means = results["heads_ruler"]["meta"]["means"]
    full = next(row for row in means if row["policy"] == "full")
    cells: dict[tuple[str, float], dict[str, Row]] = {}
    for row in means:
        cells.setdefault((row["policy"], row["keep"]), {})[row["protocol"]] = row
    rows = []
    for (name, _), found in sorted(
        cells.items(), key=lambda each: (-next(iter(each[1].values()))["kv_share"], each[0])
    ):
        first = next(iter(found.values()))
        scores = [found[each]["score"] if each in found else None for each in PROTOCOLS]
        rows.append(
            [
                label(name),
                percent(first["kv_share"]),
                percent(first["prefill_share"]),
                *("–" if score is None else f"{score:.2f}" for score in scores),
            ]
        )
    return [
        f"**On a real model**: SmolLM2-135M, RULER at {full['length']:,} tokens, the "
        f"{len(full['tasks'])} tasks that the full cache can do.\n",
        *table(["policy", "KV", "computed", *PROTOCOLS], rows),
        "",
    ]


SECTIONS: dict[str, Callable[[Result], str]] = {
    "ruler": partial(
        _pictured,
        "RULER on a real model",
        "ruler",
        "All policies get the same samples; each has its published options except `keep`.",
    ),
    "heads_ruler": partial(
        _pictured,
        "Budgets by head, heads assigned once, and window scores alone",
        "heads_ruler",
        "Tasks that the full cache can do, for `pyramid`, `duo` with `spare=.1` (the default at "
        "the commit of its rows), and `snapkv`.",
    ),
    "kv_dtype_ruler": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits",
        "kv_dtype_ruler",
        "Every policy with keys and values in the model's dtype and quantized. KV: share of the "
        "bytes of a full cache with 16 bits per number, scales included. *Of full*: the score as a "
        "share of the score of the full cache in the model's own dtype on the same samples; in "
        "brackets its 95 % interval, from the interval of the loss.",
    ),
    "kv_dtype_codecs": _codecs,
    "kv_dtype_tasks": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits: other tasks",
        "kv_dtype_tasks",
        "As above, on tasks and samples that were not used to choose any setting.",
    ),
    "kv_dtype_gemma": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits: Gemma 3 270M",
        "kv_dtype_gemma",
        "As above, on a model whose sliding-window layers limit how much eviction can save.",
    ),
    **{
        f"weights_tasks_{name}": partial(
            _weights,
            f"Tasks with quantized weights, {title}",
            f"weights_tasks_{name}",
            "The full cache in bfloat16. *Lost*: score of `auto` minus that of the row, on the "
            "same samples; 95 % intervals in brackets.",
        )
        for name, title in (("smollm2", "SmolLM2-135M"), ("gemma3", "Gemma 3 270M"))
    },
    "later_bits": partial(
        _kv_dtypes,
        "The question after compression, at 8 bits",
        "later_bits",
        "`kvzip`, `pyramid` and `duo` with 10, 20 and 30 % of the bytes of a full cache with 16 "
        "bits per number. No setting was chosen on these samples.",
    ),
    "heads_needle": partial(
        _ruler,
        "One needle, asked for later, heads assigned once",
        "heads_needle",
        "`duo` with `spare=.1`, the default at that commit, at decreasing budgets. The heads that "
        "keep all entries were determined once, on plain text.",
    ),
    "heads_spare": partial(
        _ruler,
        "Heads assigned by need alone",
        "heads_spare",
        "The same tasks with `spare=0`, the current default, and the question after.",
    ),
    "later_ruler": partial(
        _pictured,
        "The question after compression",
        "later_ruler",
        "Methods that score by keys, by expected future queries, or by reading the text again, "
        "compared with budgets by head (`pyramid`) and chunks by the window's scores; the question "
        "comes after. Computed above 100 %: `kvzip` reads a text twice.",
    ),
    "kept_kvpress": kept,
    "methods_ruler": partial(
        _pictured,
        "A text read again, in both protocols",
        "methods_ruler",
        "Needle tasks that the full cache can do. Computed above 100 %: `kvzip` reads a text "
        "twice before it is cut, so a question inside the prompt is also read again.",
    ),
    "methods_turns": partial(_study, "turns", "A chat, other methods", "methods_turns"),
    "pinned_turns": partial(
        _study,
        "turns",
        "A chat whose prompts are pinned",
        "pinned_turns",
        more="`triattention` as published keeps prompts whole and evicts only generated tokens, "
        "after every 128 of them, so it evicts nothing in a chat of short answers.",
    ),
    "gemma_ruler": partial(
        _pictured,
        "Gemma 3 270M",
        "gemma_ruler",
        "A base model of 18 layers, of which 15 have a sliding window of 512 tokens. Their entries "
        "are already bounded, so half of the entries that a policy governs is three quarters of "
        "all bytes. Only the needle tasks that the model can do.",
    ),
    "gemma_quarter": partial(
        _ruler,
        "Gemma 3 270M at a quarter",
        "gemma_quarter",
        "The same tasks with other samples. Here a quarter of the entries that a policy governs "
        "is two thirds of all bytes.",
    ),
    "heads_turns": partial(_study, "turns", "A chat, heads assigned once", "heads_turns"),
    "heads_turns_idle": partial(
        _study,
        "turns",
        "A chat, recompressed between turns",
        "heads_turns_idle",
        more="Between two turns the entries to keep are selected again, the same number in every "
        "head, by what the model needs to repeat the text (`serve --compress-idle`). The chats are "
        "those above.",
    ),
    "decode_long": partial(
        _study, "long", "Long answers, evicted during generation", "decode_long"
    ),
    "calibrated_ruler": partial(
        _ruler,
        "The start that calibration found on SmolLM2",
        "calibrated_ruler",
        "`pyramidinfer calibrate smollm2` finds that a fifth of the text may go deeper after layer "
        "23. Same tasks and samples as in *Budgets by head*: fewer layer-tokens are computed, and "
        "at keep=0.5, the default, fewer questions that come later are answered; the other "
        "differences are within the intervals. So the profile of SmolLM2 in this package has no "
        "calibration.",
    ),
    "ruler_long": partial(
        _ruler,
        "One needle at 4,000 tokens",
        "ruler_long",
        "The default policy and `duo`. With two samples, a single answer is half of a score.",
    ),
    "keys_ruler": partial(
        _ruler,
        "Methods that score by keys, values or a second reading, in both protocols",
        "keys_ruler",
        "Needle tasks that the full cache can do, two samples each. `rkv` evicts from the prompt "
        "by the same rule as from generated text. Computed above 100 %: `kvzip` reads a text "
        "twice.",
    ),
    "all_ruler": partial(
        _pictured,
        "All methods at one budget",
        "all_ruler",
        "Every method at keep=0.3, with its published options. `triattention` keeps the whole "
        "prompt and evicts generated tokens only.",
    ),
    "trial_1000": partial(
        _ruler,
        "One needle, 1,000 tokens",
        "trial_1000",
        "Single entries instead of spans (`kernel`) and an early start layer lose the answer.",
    ),
    "trial_2000": partial(
        _ruler,
        "One needle, 2,000 tokens",
        "trial_2000",
        "Published settings, and wide spans with a late start layer; `pyramid` is the former rule.",
    ),
    "trial_four": partial(
        _ruler,
        "Four needles, one asked for",
        "trial_four",
        "The same settings, RULER's multikey.",
    ),
    "trial_after": partial(
        _ruler,
        "One needle, asked for after compression",
        "trial_after",
        "The effect of wide spans and a late start layer if the question comes later.",
    ),
    **{
        f"{study}_{model}": partial(_study, study, f"{title}: {name}", f"{study}_{model}")
        for model, name in MODELS.items()
        for study, title in (("turns", "A chat"), ("text", "Text"), ("long", "Long answers"))
    },
    **{
        f"icr_{model}": partial(icr, name=f"icr_{model}", title=f"What each layer of {name} needs")
        for model, name in MODELS.items()
    },
    **{
        f"rac_{model}": partial(rac, name=f"rac_{model}", title=f"Do recent tokens agree? {name}")
        for model, name in MODELS.items()
    },
}
