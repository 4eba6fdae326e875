"""``study turns``: facts given in a chat's first turn, asked for in later turns.

Every turn continues on the cache of the turn before, so evicted entries stay evicted.  The
questions are unknown when the facts are compressed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.engine.request import Request
from pyramidinfer.lab.asking import Asker, asker, full_caches
from pyramidinfer.lab.invented import Fact, fit, hide_facts, invent
from pyramidinfer.lab.plans import TurnsPlan
from pyramidinfer.lab.real_plots import draw_turns
from pyramidinfer.lab.rows import is_reference
from pyramidinfer.lab.samples import settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.lab.ways import paired
from pyramidinfer.policies import Policy
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = [
    "MORE",
    "Talk",
    "TurnScores",
    "TurnsPlan",
    "in_groups",
    "make_talks",
    "measure_turns",
    "run_turns",
]

#: Number of facts, and of turns that ask for one of them and give the answer's first words.
FACTS, TURNS = 6, 3
ANSWER, SHORT = 16, 16  # tokens of an answer, and of the reply to the notes
MORE = 200  # maximum tokens that the turns add to the first


@dataclass(frozen=True, slots=True)
class Talk:
    """The user's first message, and the facts that the following turns ask for."""

    notes: str
    asked: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class TurnScores:
    """Per turn: whether the answer was right (1 or 0), and the share of a full cache's bytes; and
    the number of recompressions in between."""

    scores: tuple[float, ...]
    kv_shares: tuple[float, ...]
    answers: tuple[str, ...]
    recompressed: int = 0

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))


def make_talks(machine: Asker, seed: int, count: int, length: int) -> list[Talk]:
    """``count`` chats; the first turn has ``length`` tokens or slightly less."""
    if length < 200:
        raise ValueError(f"--length {length} is too short for {FACTS} facts; give at least 200")
    chat = machine.chat
    found = []
    for index in range(count):
        facts = invent(random.Random(f"facts {seed} {index}"), FACTS)
        notes = fit(
            partial(_notes, facts, f"talk {seed} {index}"),
            lambda text: len(chat.begin(text)),
            length,
        )
        asked = random.Random(f"asked {seed} {index}").sample(facts, TURNS)
        found.append(Talk(notes, tuple(asked)))
    return found


def _notes(facts: list[Fact], seed: str, wanted: int) -> str:
    text = hide_facts(random.Random(seed), facts, wanted)
    return f"Here are my notes. Remember them, I will ask about them later.\n\n{text}"


def _ask(machine: Asker, said: TokenIds, fact: Fact) -> TokenIds:
    """The next turn: the question, and the first words of its answer."""
    chat = machine.chat
    if chat.has_template:
        return chat.go_on(said, fact.question) + chat.encode(fact.opening)
    return chat.encode(f"\n\nQuestion: {fact.question}\nAnswer: {fact.opening}")


def measure_turns(
    machine: Asker, policy: Policy, talks: Sequence[Talk], compress_idle: bool = False
) -> list[TurnScores]:
    """Run all chats at once, each turn on the cache of the turn before (recompressed on
    request)."""
    engine, chat = machine.llm.engine, machine.chat
    first = SamplingParams(max_tokens=SHORT if chat.has_template else 1)
    later = SamplingParams(max_tokens=ANSWER, stop=(".", "\n"))
    turns: list[Request] = [
        engine.make(chat.begin(talk.notes), first, policy=policy, hold=True) for talk in talks
    ]
    scores: list[list[float]] = [[] for _ in talks]
    shares: list[list[float]] = [[] for _ in talks]
    answers: list[list[str]] = [[] for _ in talks]
    recompressed = [0 for _ in talks]
    try:
        engine.run(turns)
        for number in range(TURNS):
            for index, talk in enumerate(talks):
                if compress_idle:
                    recompressed[index] += engine.recompress(turns[index])
                more = _ask(machine, turns[index].output, talk.asked[number])
                turns[index] = engine.extend(turns[index], more, later, hold=True)
            engine.run(turns)
            for index, talk in enumerate(talks):
                out = engine.output(turns[index])
                scores[index].append(float(talk.asked[number].is_in(out.text)))
                shares[index].append(out.kv.bytes / out.kv.full_bytes)
                answers[index].append(out.text)
    finally:
        for turn in turns:
            engine.abort(turn)
            engine.release(turn)
    return [
        TurnScores(tuple(s), tuple(k), tuple(a), n)
        for s, k, a, n in zip(scores, shares, answers, recompressed, strict=True)
    ]


def in_groups(
    machine: Asker, policy: Policy, talks: Sequence[Talk], compress_idle: bool = False
) -> list[TurnScores]:
    """``measure_turns`` with as many chats at once as fit into the cache's memory."""
    longest = max(len(machine.chat.begin(talk.notes)) for talk in talks) + MORE
    size = max(1, full_caches(machine.llm.engine, longest) // 2)  # held ones stay during turns
    return [
        scores
        for at in range(0, len(talks), size)
        for scores in measure_turns(machine, policy, talks[at : at + size], compress_idle)
    ]


def run_turns(plan: TurnsPlan, out: Path, workers: int = 1) -> tuple[list[Row], Path]:
    """Measure; write ``out`` and a picture next to it."""
    plan.check()
    rows = run_cells("turns", settings(plan), plan.cells(), partial(measure, plan), out, workers)
    return rows, draw_turns(rows, out.with_suffix(".png"))


def measure(plan: TurnsPlan, cell: dict[str, Any]) -> list[Row]:
    """One cell's row."""
    full = _full(plan)
    if is_reference(cell):
        mine = full
    else:
        machine = asker(plan.stored(cell))
        policy = machine.policy(cell["policy"], cell["keep"])
        mine = in_groups(machine, policy, _talks(plan), plan.compress_idle)
    return [
        {
            **cell,
            **paired("score", [each.score for each in mine], [each.score for each in full]),
            "by_turn": np.mean([each.scores for each in mine], axis=0).tolist(),
            "kv_by_turn": np.mean([each.kv_shares for each in mine], axis=0).tolist(),
            "kv_share": float(np.mean([each.kv_shares[-1] for each in mine])),
            "recompressed": sum(each.recompressed for each in mine),
            "scores": [each.score for each in mine],
            "samples": len(mine),
        }
    ]


@lru_cache(maxsize=2)
def _talks(plan: TurnsPlan) -> tuple[Talk, ...]:
    talks = make_talks(asker(plan.subject), plan.seed, plan.samples, plan.length)
    if plan.subject.corpus().ids is None:
        raise ValueError(
            "chats are in English, and the model knows the generated language only: give another, "
            "such as --model smollm2 (pyramidinfer fetch smollm2)"
        )
    return tuple(talks)


@lru_cache(maxsize=2)
def _full(plan: TurnsPlan) -> list[TurnScores]:
    machine = asker(plan.subject)
    return in_groups(machine, machine.policy("full", None), _talks(plan))
