"""Exact recall: questions about facts in generated documents, answered word for word."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyramidinfer.lab import documents
from pyramidinfer.types import RequestOutput, SamplingParams

__all__ = ["ANSWER", "Question", "is_right", "make_question", "make_questions"]

#: Sampling of answers: greedy, with the length of an answer.
ANSWER = SamplingParams(max_tokens=documents.ANSWER_TOKENS)

#: Tokens around the document in a prompt: marks, the question and the start of the answer.
AROUND = 12


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt about one fact, its right answer, and the place of the fact in the prompt.

    ``needle``: the span of prompt tokens holding the fact (the first is ``<bos>``).
    """

    prompt: str
    answer: str
    needle: tuple[int, int]


def make_question(
    rng: random.Random, length: int, facts: int | None = None, depth: float | None = None
) -> Question:
    """A prompt of ``length`` tokens in the chat format, asking for one of its facts.

    ``facts`` defaults to one in 64 tokens; ``depth``: ask for the fact nearest to this share of
    the document (0: its start); by default for any fact.
    """
    room = length - AROUND
    count = facts if facts is not None else max(2, min(100, length // 64))
    document = documents.document(rng, room, count)
    if depth is None:
        chosen = rng.randrange(count)
    else:
        aim = depth * room
        chosen = min(range(count), key=lambda index: abs(document.starts[index] - aim))
    fact = document.facts[chosen]
    asked = " ".join(documents.question_words(fact))
    prompt = f"<user> {document.text} {asked} <end> <assistant>"
    start = 2 + document.starts[chosen]  # <bos> <user>
    return Question(
        prompt, " ".join(documents.answer_words(fact)), (start, start + len(fact.words()))
    )


def make_questions(seed: int, count: int, length: int, facts: int | None = None) -> list[Question]:
    """``count`` questions, each about its own document; deterministic for a seed."""
    rng = random.Random(f"questions {seed}")
    return [make_question(rng, length, facts) for _ in range(count)]


def is_right(output: RequestOutput, question: Question) -> bool:
    """Whether the whole answer is right, word for word."""
    return output.text.strip() == question.answer
