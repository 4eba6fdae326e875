"""What share of the full cache's quality a setting keeps on a model: in two minutes, before users
find out.

Retrieval with the question inside the compressed prompt and after it, chats, text and long
answers, each against the full cache on the same samples.  A share is of what the full cache can
do: where it can do nothing, a check does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pyramidinfer.lab.asking import PROTOCOLS, Asker
from pyramidinfer.lab.chat import Asked
from pyramidinfer.lab.long import (
    first_difference,
    long_prompts,
    losses_under_full,
    measure_long,
    repetition,
)
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.ruler.grid import SCREEN, ask, task_samples
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.text import CONTINUATION, loss, measure_text
from pyramidinfer.lab.turns import make_talks, measure_turns
from pyramidinfer.policies import Full, Policy
from pyramidinfer.types import SamplingParams

__all__ = ["FLOOR", "Check", "Plan", "jeffreys", "judge", "verify"]

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue")
FLOOR = 0.8
LEAST, MOST = 3, 24  # samples of a check
LONG = 128  # tokens of a long answer
#: Prompts' worth of prefill that one more sample of every check costs, answers included.
PROMPTS = 24


@dataclass(frozen=True, slots=True)
class Plan:
    """``length``: tokens of a prompt; ``seconds``: about how long all may take (at least ``LEAST``
    samples a check are taken)."""

    length: int = 1000
    seconds: float = 100.0
    seed: int = 0

    def check(self) -> None:
        if self.length < 300:
            raise ValueError(f"--length {self.length} is too short; give at least 300 tokens")
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds} must be above 0")


@dataclass(frozen=True, slots=True)
class Check:
    """One check: ``full`` and ``mine`` in words, and the share kept with its 95 % interval (None:
    the full cache cannot do it here, so it does not count)."""

    name: str
    full: str
    mine: str
    share: float | None
    low: float = 0.0
    high: float = 1.0
    samples: int = 0
    kv_share: float | None = None


def verify(machine: Asker, subject: Subject, policy: Policy, plan: Plan,
           tell: Callable[[str], None] = lambda _: None) -> list[Check]:  # fmt: skip
    """All checks; ``tell`` hears which one begins."""
    plan.check()
    if plan.length > machine.llm.engine.adapter.max_positions - LONG:
        raise ValueError(
            f"--length {plan.length}: the model has {machine.llm.engine.adapter.max_positions} "
            f"positions, and {LONG} are generated"
        )
    count = _count(machine, subject, plan)
    found = []
    tell(f"retrieval, {count} samples of each task")
    found += _retrieval(machine, subject, policy, plan, count)
    tell("turns of a chat")
    found.append(_turns(machine, policy, plan, count))
    tell("text")
    found.append(_text(machine, subject, policy, plan, count))
    tell("long answers")
    found.append(_long(machine, subject, policy, plan, count))
    return found


def judge(checks: Sequence[Check], floor: float) -> tuple[list[Check], list[Check]]:
    """Checks that are surely below the floor, and those of which it cannot be told."""
    counted = [each for each in checks if each.share is not None]
    below = [each for each in counted if each.high < floor]
    return below, [each for each in counted if each.low < floor <= each.high]


def jeffreys(shares: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of shares between 0 and 1, by Jeffreys' prior: unlike a bootstrap it
    has a width where all samples are alike."""
    total, count = math.fsum(shares), len(shares)
    low, high = stats.beta.ppf((0.025, 0.975), total + 0.5, count - total + 0.5)
    return (0.0 if total == 0 else float(low)), (1.0 if total == count else float(high))


def _bounds(values: list[float]) -> tuple[float, float]:
    low, high = interval(values)
    return low, high


def _count(machine: Asker, subject: Subject, plan: Plan) -> int:
    """Samples of each check that fit the time, by that of one prompt."""
    (prompt,) = long_prompts(machine, subject, plan.seed, 1, plan.length)
    begun = time.monotonic()
    measure_long(machine, Full(), [prompt], 1)
    each = time.monotonic() - begun
    return max(LEAST, min(MOST, int(plan.seconds / (PROMPTS * each))))


@dataclass(frozen=True, slots=True)
class _Question:
    prompt: Asked
    max_tokens: int
    score: Callable[[str], float]  # or right, wrong


def _questions(machine: Asker, subject: Subject, plan: Plan, count: int
               ) -> dict[str, list[_Question]]:  # fmt: skip
    """By task: RULER's, or the shipped model's own where that is the language it knows."""
    corpus = subject.corpus()
    if corpus.ids is not None:
        return {
            task: [
                _Question(ask(machine, sample), sample.max_tokens, sample.score)
                for sample in task_samples(machine, subject, task, count, plan.length, plan.seed)
            ]
            for task in TASKS
        }
    where = machine.llm.tokenizer.convert_tokens_to_ids("Where")
    found = []
    for needle in corpus.needles(plan.seed, 2 * count, plan.length):
        at = len(needle.prompt) - 1 - needle.prompt[::-1].index(where)
        asked = Asked(needle.prompt[:at], needle.prompt[at:])
        found.append(_Question(asked, needle.answer_tokens, needle.is_right))
    return {"needles": found}


def _retrieval(machine: Asker, subject: Subject, policy: Policy, plan: Plan, count: int
               ) -> list[Check]:  # fmt: skip
    by_task = _questions(machine, subject, plan, count)
    full = {task: _answer(machine, "inside", each, Full())[0] for task, each in by_task.items()}
    able = [task for task, scores in full.items() if np.mean(scores) >= SCREEN]
    left = [task for task in by_task if task not in able]
    checks = []
    for protocol in PROTOCOLS:
        name = f"retrieval, question {protocol}"
        if not able:
            worst = max(float(np.mean(scores)) for scores in full.values())
            checks.append(Check(name, f"{worst:.2f}", "–", None))
            continue
        mine: list[float] = []
        theirs: list[float] = []
        bytes_kept = []
        for task in able:
            scores, kept = _answer(machine, protocol, by_task[task], policy)
            mine, theirs = mine + scores, theirs + full[task]
            bytes_kept.append(kept)
        shares = [min(1.0, m / t) for m, t in zip(mine, theirs, strict=True) if t > 0]
        name += f" (without {', '.join(left)})" if left else ""
        checks.append(Check(
            name, f"{np.mean(theirs):.2f}", f"{np.mean(mine):.2f}", float(np.mean(shares)),
            *jeffreys(shares), len(shares), float(np.mean(bytes_kept)),
        ))  # fmt: skip
    return checks


def _answer(machine: Asker, protocol: str, questions: Sequence[_Question], policy: Policy
            ) -> tuple[list[float], float]:  # fmt: skip
    params = [SamplingParams(max_tokens=each.max_tokens) for each in questions]
    answers = machine.ask(protocol, [each.prompt for each in questions], params, policy)
    scores = [float(q.score(a.text)) for q, a in zip(questions, answers, strict=True)]
    return scores, sum(a.kv.bytes for a in answers) / sum(a.kv.full_bytes for a in answers)


def _turns(machine: Asker, policy: Policy, plan: Plan, count: int) -> Check:
    talks = make_talks(machine, plan.seed, count, plan.length)
    full = [s for each in measure_turns(machine, Full(), talks) for s in each.scores]
    if np.mean(full) < SCREEN:
        return Check("turns of a chat", f"{np.mean(full):.2f}", "–", None)
    runs = measure_turns(machine, policy, talks)
    mine = [s for each in runs for s in each.scores]
    shares = [m for m, t in zip(mine, full, strict=True) if t > 0]
    return Check(
        "turns of a chat", f"{np.mean(full):.2f}", f"{np.mean(mine):.2f}", float(np.mean(shares)),
        *jeffreys(shares), len(shares), float(np.mean([each.kv_shares[-1] for each in runs])),
    )  # fmt: skip


def _text(machine: Asker, subject: Subject, policy: Policy, plan: Plan, count: int) -> Check:
    passages = subject.corpus().passages(plan.seed, count, plan.length, CONTINUATION)
    full, mine = (measure_text(machine, each, passages) for each in (Full(), policy))
    ours, theirs = [loss(each) for each in mine], [loss(each) for each in full]
    shares = [min(1.0, math.exp(t - o)) for o, t in zip(ours, theirs, strict=True)]
    kept = sum(s.kv.bytes for s in mine) / sum(s.kv.full_bytes for s in mine)
    return Check(
        "text", f"perplexity {math.exp(np.mean(theirs)):.2f}", f"{math.exp(np.mean(ours)):.2f}",
        float(np.mean(shares)), *_bounds(shares), len(shares), kept,
    )  # fmt: skip


def _long(machine: Asker, subject: Subject, policy: Policy, plan: Plan, count: int) -> Check:
    prompts = long_prompts(machine, subject, plan.seed, count, plan.length)
    full, mine = (measure_long(machine, each, prompts, LONG) for each in (Full(), policy))
    theirs, ours = (losses_under_full(machine, prompts, runs) for runs in (full, mine))
    shares = [min(1.0, math.exp(t - o)) for o, t in zip(ours, theirs, strict=True)]
    same = [first_difference(a.token_ids, b.token_ids) for a, b in zip(mine, full, strict=True)]
    again = [np.mean([repetition(run.token_ids) for run in runs]) for runs in (full, mine)]
    return Check(
        f"{LONG} tokens generated",
        f"perplexity {math.exp(np.mean(theirs)):.2f}, {again[0]:.0%} repeated",
        f"{math.exp(np.mean(ours)):.2f}, {again[1]:.0%}; first {np.mean(same):.0f} tokens the same",
        float(np.mean(shares)), *_bounds(shares), len(shares),
        float(np.mean([run.kv_share for run in mine])),
    )  # fmt: skip
