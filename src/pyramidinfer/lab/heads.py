"""``pyramidinfer study heads``: what each head needs, compared with the loss from pruning each
layer.

The two measurements are independent.  The head profile (``engine/profiling.py``) records attention
while the model repeats a text; ICR (``lab/icr.py``) prunes one layer and scores the continuation.
Pruning a layer whose heads need much should cost much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pyramidinfer.engine import LLM
from pyramidinfer.engine.passages import COUNT, Passages, room_for, text_passages
from pyramidinfer.engine.profiling import profile_model, rank_correlation
from pyramidinfer.lab.head_pictures import draw_heads
from pyramidinfer.lab.icr import WindowScores, measure_passage, publish
from pyramidinfer.lab.plans import HeadsPlan
from pyramidinfer.lab.record import commit
from pyramidinfer.lab.samples import GENERATED, Corpus, Passage, Subject, read_text, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies.profile import Profile
from pyramidinfer.types import TokenIds

__all__ = ["HeadsPlan", "heads_table", "measure_profile", "passages_of", "run_heads"]


def run_heads(plan: HeadsPlan, out: Path, workers: int = 1) -> tuple[list[Row], Path]:
    """Measure, write ``out`` and draw; returns one row per layer, and the picture's path."""
    cells: list[dict[str, Any]] = [{"part": "profile"}]
    cells += [{"part": "icr", "passage": index} for index in range(plan.samples)]
    first, *rest = run_cells("heads", settings(plan), cells, partial(_work, plan), out, workers)
    profile = Profile.from_dict(first["profile"])
    rows = [_row(profile, layer, plan.pruned_to, rest) for layer in range(profile.layers)]
    mine = [row for row in rows if row["governed"] and row["kl"] is not None]
    publish(
        out,
        rows,
        agreement=profile.agreement,
        text=profile.text,
        kept=profile.kept,
        follows_icr=rank_correlation([r["mean"] for r in mine], [r["kl"] for r in mine]),
    )
    return rows, draw_heads(profile, rows, out.with_suffix(".png"))


def heads_table(rows: list[Row]) -> Table:
    """One line per layer."""
    table = Table(title="what a layer's heads need, and the loss from pruning it")
    for name in ("layer", "heads", "mean", "KL when pruned"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = " ".join(f"{share:4.0%}" for share in row["shares"])
        kl = "–" if row["kl"] is None else f"{row['kl']:.2g}"
        needs = (shares, f"{row['mean']:.0%}") if row["governed"] else ("window", "–")
        table.add_row(str(row["layer"]), *needs, kl)
    return table


def measure_profile(llm: LLM, subject: Subject, progress: bool | None = None) -> Profile:
    """The profile of a study's model, loaded as ``llm``, on the study's text."""
    found = profile_model(llm.engine.shared, passages_of(llm, subject), progress)
    return replace(found, commit=commit())


def passages_of(llm: LLM, subject: Subject) -> Passages | None:
    """The text that a profile is measured on: a file's text, the shipped model's own language, or
    None for real English."""
    runner, tokenizer = llm.engine.runner, llm.tokenizer
    if subject.text is not None:
        text = read_text(subject.text)
        return text_passages(runner, tokenizer, text, Path(subject.text).name)
    if tokenizer is None or not (corpus := Corpus(tokenizer, None)).has_marks:
        return None
    length = room_for(runner, 0)

    def half(seed: int) -> tuple[TokenIds, ...]:
        return tuple(each.context for each in corpus.passages(seed, COUNT // 2, length, 1))

    return Passages(GENERATED, (half(1), half(2)), head=1)


def _work(plan: HeadsPlan, cell: dict[str, Any]) -> list[Row]:
    llm = _llm(plan.subject)
    if cell["part"] == "profile":
        found = measure_profile(llm, plan.subject, progress=False)
        return [{"profile": replace(found, queries=None).as_dict()}]
    passage = _passages(plan)[cell["passage"]]
    governed = llm.engine.runner.layers_for(plan.context + plan.continuation).governed
    layers = tuple(layer for layer, each in enumerate(governed) if each)
    return measure_passage(llm, passage, layers, (plan.pruned_to,))


@lru_cache(maxsize=1)
def _llm(subject: Subject) -> LLM:
    return subject.llm(WindowScores())


@lru_cache(maxsize=1)
def _passages(plan: HeadsPlan) -> list[Passage]:
    return plan.subject.corpus().passages(plan.seed, plan.samples, plan.context, plan.continuation)


def _row(profile: Profile, layer: int, pruned_to: float, found: list[Row]) -> Row:
    """A layer's heads, and its losses over all passages (None if it was not pruned)."""
    rows = [row for row in found if row["layer"] == layer]
    tokens = sum(row["tokens"] for row in rows)

    def mean(value: Callable[[Row], float]) -> float | None:
        return sum(map(value, rows)) / tokens if rows else None

    shares = profile.share[layer]
    return {
        "layer": layer,
        "governed": profile.governed[layer],
        "shares": list(shares),
        "mean": sum(shares) / len(shares),
        "pruned_to": pruned_to,
        "kl": mean(lambda r: r["kl"]),
        "lost": mean(lambda r: r["nll"] - r["full_nll"]),
        "samples": len(rows),
        "tokens": tokens,
    }
