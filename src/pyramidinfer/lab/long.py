"""``study long``: long answers on a cache that is compressed during decode.

End tokens do not end an answer, so all answers have the same length.  A text is scored by its
likelihood under the model with its full cache, and by how much it repeats itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.plans import LongPlan
from pyramidinfer.lab.real_plots import draw_long
from pyramidinfer.lab.rows import is_reference
from pyramidinfer.lab.samples import Passage, Subject, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.lab.text import loss, measure_text
from pyramidinfer.lab.ways import paired
from pyramidinfer.policies import Full, Policy
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = [
    "LongPlan",
    "LongRun",
    "first_difference",
    "long_prompts",
    "losses_under_full",
    "measure_long",
    "repetition",
    "run_long",
]

GRAM = 4  # tokens in a row that count as repeated
ASK = "\n\nExplain what the text above says, point by point and in detail."


@dataclass(frozen=True, slots=True)
class LongRun:
    """Generated tokens, and the bytes held at the end as a share of a full cache's."""

    token_ids: TokenIds
    kv_share: float


def long_prompts(
    machine: Asker, subject: Subject, seed: int, count: int, context: int
) -> list[TokenIds]:
    """Prompts of ``context`` tokens: real text, with a request to explain it if the model has a
    chat template."""
    corpus, chat = subject.corpus(), machine.chat
    if corpus.ids is None:  # the shipped model's language
        return [each.context for each in corpus.passages(seed, count, context, 1)]
    around = chat.ask("", ASK) if chat.has_template else chat.ask("", "")
    rng = random.Random(f"long {seed}")
    size = context - len(around.whole)
    return [around.context + corpus.stretch(rng, size) + around.rest for _ in range(count)]


def measure_long(
    machine: Asker, policy: Policy, prompts: Sequence[TokenIds], tokens: int
) -> list[LongRun]:
    """Generate greedily, all prompts at once."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    outputs = machine.llm.generate(list(prompts), params, policy=policy)
    return [LongRun(out.token_ids, out.kv.bytes / out.kv.full_bytes) for out in outputs]


def losses_under_full(
    machine: Asker, prompts: Sequence[TokenIds], runs: Sequence[LongRun]
) -> list[float]:
    """Negative log-likelihood of each generated text under the full cache, in nats per token."""
    passages = [Passage(p, run.token_ids) for p, run in zip(prompts, runs, strict=True)]
    return [loss(each) for each in measure_text(machine, Full(), passages)]


def first_difference(mine: TokenIds, other: TokenIds) -> int:
    """Number of equal tokens at the start."""
    for index, (a, b) in enumerate(zip(mine, other, strict=True)):
        if a != b:
            return index
    return len(mine)


def repetition(tokens: TokenIds) -> float:
    """Share of the runs of ``GRAM`` tokens that occurred earlier in the text."""
    seen: set[tuple[int, ...]] = set()
    again = 0
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    for gram in grams:
        again += gram in seen
        seen.add(gram)
    return again / len(grams) if grams else 0.0


def run_long(plan: LongPlan, out: Path, workers: int = 1) -> tuple[list[Row], Path]:
    """Measure; write ``out`` and a picture next to it."""
    plan.check()
    for name, least in (("samples", 1), ("tokens", GRAM), ("context", 60)):
        if getattr(plan, name) < least:
            raise ValueError(f"--{name} {getattr(plan, name)} must be at least {least}")
    rows = run_cells("long", settings(plan), plan.cells(), partial(measure, plan), out, workers)
    return rows, draw_long(rows, out.with_suffix(".png"))


def measure(plan: LongPlan, cell: dict[str, Any]) -> list[Row]:
    """One cell's row; ``lost`` is the loss of log-likelihood in nats per token."""
    prompts, full, full_losses = _full(plan)
    if is_reference(cell):
        mine, losses = full, full_losses
    else:
        machine = asker(plan.stored(cell))
        policy = machine.policy(cell["policy"], cell["keep"])
        mine = measure_long(machine, policy, prompts, plan.tokens)
        losses = losses_under_full(asker(plan.subject), prompts, mine)
    same = [first_difference(a.token_ids, b.token_ids) for a, b in zip(mine, full, strict=True)]
    figures = paired("log_likelihood", [-each for each in losses], [-each for each in full_losses])
    return [
        {
            **cell,
            **figures,
            "perplexity": math.exp(np.mean(losses)),
            "first_difference": same,
            "same_tokens": float(np.mean(same)),
            "repetition": float(np.mean([repetition(each.token_ids) for each in mine])),
            "kv_share": float(np.mean([each.kv_share for each in mine])),
            "samples": len(mine),
        }
    ]


@lru_cache(maxsize=2)
def _full(plan: LongPlan) -> tuple[list[TokenIds], list[LongRun], list[float]]:
    machine = asker(plan.subject)
    longest = machine.llm.engine.runner.max_positions
    if plan.context + plan.tokens > longest:
        raise ValueError(
            f"--context {plan.context} and --tokens {plan.tokens} exceed the model's {longest} "
            f"positions; give less of one"
        )
    prompts = long_prompts(machine, plan.subject, plan.seed, plan.samples, plan.context)
    runs = measure_long(machine, Full(), prompts, plan.tokens)
    return prompts, runs, losses_under_full(machine, prompts, runs)
