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
from pyramidinfer.lab.rows import is_reference, kv_dtype, series
from pyramidinfer.lab.study import Row

__all__ = ["SECTIONS", "lead"]

Result = dict[str, Any]

MODELS = {"smollm2": "SmolLM2", "gemma3-270m": "Gemma 3 270M"}
HOW = (
    "How to read it: a score is the mean share of the wanted answers that were said, tasks "
    "counting alike, with its 95 % interval; *inside*: the question was in the compressed prompt; "
    "*after*: the context was compressed before the question came; *lost*: against the full cache "
    "on the same samples (paired). KV and computed: shares of the full cache's bytes and "
    "layer-tokens."
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
    """What stands above a grid's table."""
    meta = entry["meta"]
    plan = meta["configuration"]
    return [
        f"## {title}\n",
        origin(meta),
        f"On {subject_words(plan['subject'])}; {_samples(entry['rows'])} a task. {words}\n",
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
    return [f"The full cache itself scores below .3 on {told}; left out of the means.\n"]


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
    """A grid of ``study ruler`` in which caches are stored in several kv dtypes: what is left of
    the full cache's score, by bytes."""
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
    """``study codecs``: what few bits cost by how they are stored."""
    meta = entry["meta"]
    plan = meta["configuration"]
    lines = [
        "## Few bits, stored in other ways\n",
        origin(meta),
        f"{subject_words(plan['subject'])}, {plan['samples']} passages of {plan['context']:,} "
        "tokens of real English. `KL`: mean divergence of the next token's distribution from the "
        "full cache's as it is, in nats, with its 95 % interval over passages; `same`: how often "
        "the likeliest token is the same; `bytes`: of an entry of one head, key and value. What "
        "`kv_dtype` does is called rotated, without more.\n",
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
    """One result of ``study turns``, ``text`` or ``long``; ``more`` is said of this one alone."""
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
    "turns": "Facts told in a chat's first turn, asked in turns 2 to 4 on the cache taken up: "
    "share answered, what is lost against the full cache, and turn by turn.",
    "text": "Perplexity of 64 tokens after a context, over the full cache's on the same passages, "
    "and divergence (nats a token).",
    "long": "Long greedy answers: perplexity under the full cache, what that loses in nats a "
    "token, how many first tokens are the full cache's, share of 4-grams said before.",
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
    """Our methods beside kvpress's."""
    c, result = entry["configuration"], entry["result"]
    versions = result["versions"]
    reasons = {row["policy"]: row["why"] for row in result["rows"] if row["why"]}
    lines = [
        "## The same entries as kvpress?\n",
        origin(entry),
        f"Methods that [kvpress](https://github.com/NVIDIA/kvpress) {versions['kvpress']} (with "
        f"transformers {versions['transformers']}) has, too, on one text: `{c['model']}` in "
        f"float32, {c['length']:,} tokens of {c['source']}, keep={c['keep']:g}, the same options. "
        f"The logits behind the text differ by {result['logits_apart']:.0e} at most.\n",
        "```bash\nmake bench-kept\n```\n",
        "How to read it: what shares a budget (a head, a layer's heads, the whole model) holds as "
        "many entries in both by construction; `same entries` is the share of them that both keep, "
        "mean over all of these and the least. Where numbers differ, it is over those of whoever "
        "keeps more, and behind `of` stands what the numbers allow. `ranks` is Spearman's "
        "correlation of the scores (tokens that always stay left out), where both give every "
        f"head's. Two choices by chance would share {percent(c['keep'])}. Kept: mean entries of "
        "a head.\n",
        *table(HEAD, [[f"`{cells[0]}`", *cells[1:]] for cells in kept_rows(result)]),
        "\nWhat differs by definition:\n",
        *(f"- `{policy}`: {why}." for policy, why in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def lead(results: dict[str, Result]) -> list[str]:
    """The most important figures, for the page's head."""
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
        "All policies get the same samples; each as published but for `keep`.",
    ),
    "heads_ruler": partial(
        _pictured,
        "Budgets by head, heads dealt once, and window scores alone",
        "heads_ruler",
        "Tasks that the full cache can do; `pyramid`, `duo` with `spare=.1` (the default at the "
        "commit of its rows), and `snapkv`.",
    ),
    "kv_dtype_ruler": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits",
        "kv_dtype_ruler",
        "Every policy with keys and values as the model has them and in fewer bits; KV: share of "
        "the full cache's bytes with 16 bits a number, scales included. *Of full*: the score as a "
        "share of what the full cache in the model's own dtype has on the same samples; in "
        "brackets its 95 % interval, by that of what is lost.",
    ),
    "kv_dtype_codecs": _codecs,
    "kv_dtype_tasks": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits: other tasks",
        "kv_dtype_tasks",
        "As above on tasks and samples that nothing was chosen by.",
    ),
    "kv_dtype_gemma": partial(
        _kv_dtypes,
        "Fewer entries, fewer bits: Gemma 3 270M",
        "kv_dtype_gemma",
        "As above on a model whose sliding layers bound what eviction can save.",
    ),
    "heads_needle": partial(
        _ruler,
        "One needle, asked for later, heads dealt once",
        "heads_needle",
        "`duo` with `spare=.1`, the default at that commit, at falling budgets: which head keeps "
        "everything was found once, on plain text.",
    ),
    "heads_spare": partial(
        _ruler,
        "Heads dealt by need alone",
        "heads_spare",
        "The same tasks with `spare=0`, the default now, the question after.",
    ),
    "later_ruler": partial(
        _pictured,
        "The question that comes later",
        "later_ruler",
        "Methods that look at keys, at queries to come, or at the text when it is read again, "
        "beside budgets by head (`pyramid`) and chunks by the window's scores; the question after. "
        "Computed above 100 %: `kvzip` reads a text twice.",
    ),
    "kept_kvpress": kept,
    "methods_ruler": partial(
        _pictured,
        "A text read again, in both protocols",
        "methods_ruler",
        "Needle tasks that the full cache can do. Computed above 100 %: `kvzip` reads a text "
        "twice, before it knows what is asked; so the question inside is read again as well.",
    ),
    "methods_turns": partial(_study, "turns", "A chat, other methods", "methods_turns"),
    "pinned_turns": partial(
        _study,
        "turns",
        "A chat whose prompts are pinned",
        "pinned_turns",
        more="`triattention` as published: what is read stays whole, and only what is generated is "
        "cut, every 128 tokens; so nothing is cut in a chat of short answers.",
    ),
    "gemma_ruler": partial(
        _pictured,
        "Gemma 3 270M",
        "gemma_ruler",
        "A base model of 18 layers, of which 15 see a window of 512 tokens: their entries are "
        "bounded already, so half of what is governed is three quarters of all bytes. The needle "
        "tasks that it can do at all.",
    ),
    "heads_turns": partial(_study, "turns", "A chat, heads dealt once", "heads_turns"),
    "heads_turns_idle": partial(
        _study,
        "turns",
        "A chat, recompressed between turns",
        "heads_turns_idle",
        more="Between two turns the cache is chosen anew, as many entries in every head, by what "
        "the model needs to repeat the text (`serve --compress-idle`); the same chats as above.",
    ),
    "decode_long": partial(_study, "long", "Long answers, cut while they grow", "decode_long"),
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
        "The default and `duo`. Two samples: an answer more or less is half of a score.",
    ),
    "keys_ruler": partial(
        _ruler,
        "Methods that score by keys, values or a second reading, in both protocols",
        "keys_ruler",
        "Needle tasks that the full cache can do, two samples each; `rkv` cuts the prompt by its "
        "rule, as it does a text that is generated. Computed above 100 %: `kvzip` reads a text "
        "twice.",
    ),
    "trial_1000": partial(
        _ruler,
        "One needle, 1,000 tokens",
        "trial_1000",
        "What loses the answer: points instead of spans (`kernel`), and an early start.",
    ),
    "trial_2000": partial(
        _ruler,
        "One needle, 2,000 tokens",
        "trial_2000",
        "Published settings, and wide spans with a late start; `pyramid` is the rule before.",
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
        "What wide spans and a late start are worth where the question comes later.",
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
