"""Retrieval in ``verify``: of the questions about a long prompt that the full cache answers, the
share that the policy still answers, with the question inside the compressed prompt and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyramidinfer.lab.asking import PROTOCOLS, Asker
from pyramidinfer.lab.chat import Asked
from pyramidinfer.lab.checks import Bench, Check, Pairs
from pyramidinfer.lab.ruler.grid import SCREEN, ask, task_samples
from pyramidinfer.policies import Full, Policy
from pyramidinfer.types import SamplingParams

__all__ = ["Retrieval"]

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "qa_facts_1")


@dataclass(frozen=True, slots=True)
class _Question:
    prompt: Asked
    max_tokens: int
    score: Callable[[str], float]  # or right, wrong


class Retrieval:
    """Questions about a long prompt: RULER's, or those of the shipped model's language."""

    telling = "retrieval"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.full: dict[str, list[float]] = {}  # every drawn sample, by task
        self.pairs: dict[tuple[str, str], Pairs] = {}  # by protocol and task

    def more(self, seed: int, count: int) -> None:
        for task, questions in self._questions(seed, count).items():
            full, _, _ = self._answer(self.bench.machine, "inside", questions, Full())
            self.full.setdefault(task, []).extend(full)
            if not self._can(task):
                continue  # until the full cache is known to solve it
            for protocol in PROTOCOLS:
                scores, kept, computed = self._answer(
                    self.bench.own, protocol, questions, self.bench.policy
                )
                pairs = self.pairs.setdefault((protocol, task), Pairs())
                pairs.full += full
                pairs.mine += scores
                pairs.kv.append(kept)
                pairs.computed.append(computed)

    def checks(self) -> list[Check]:
        able = [task for task in self.full if self._can(task)]
        left = [task for task in self.full if task not in able]
        without = f" (without {', '.join(left)})" if left and able else ""
        best = max(float(np.mean(scores)) for scores in self.full.values())
        found = []
        for protocol in PROTOCOLS:
            name = f"retrieval, question {protocol}"
            pairs = Pairs.joined([self.pairs[protocol, task] for task in able])
            found.append(
                pairs.of_scores(name, without) if able else Check(name, f"{best:.2f}", "–", None)
            )
        return found

    def _can(self, task: str) -> bool:
        return float(np.mean(self.full[task])) >= SCREEN

    def _questions(self, seed: int, count: int) -> dict[str, list[_Question]]:
        """One sample of each task, because there are more tasks than ``count``."""
        machine, subject, length = self.bench.machine, self.bench.subject, self.bench.length
        corpus = subject.corpus()
        if corpus.ids is not None:
            return {
                task: [
                    _Question(ask(machine, sample), sample.max_tokens, sample.score)
                    for sample in task_samples(machine, subject, task, 1, length, seed)
                ]
                for task in TASKS
            }
        where = machine.llm.tokenizer.convert_tokens_to_ids("Where")
        found = []
        for needle in corpus.needles(seed, count + 1, length):
            at = len(needle.prompt) - 1 - needle.prompt[::-1].index(where)
            asked = Asked(needle.prompt[:at], needle.prompt[at:])
            found.append(_Question(asked, needle.answer_tokens, needle.is_right))
        return {"needles": found}

    def _answer(
        self, machine: Asker, protocol: str, questions: Sequence[_Question], policy: Policy
    ) -> tuple[list[float], float, float]:
        """Scores, and the shares of bytes held and of layer-tokens computed."""
        params = [SamplingParams(max_tokens=each.max_tokens) for each in questions]
        prompts = [each.prompt for each in questions]
        answers = machine.ask(protocol, prompts, params, policy)
        return (
            [float(q.score(a.text)) for q, a in zip(questions, answers, strict=True)],
            sum(a.kv.bytes for a in answers) / sum(a.kv.full_bytes for a in answers),
            float(np.mean([a.computed_share for a in answers])),
        )
