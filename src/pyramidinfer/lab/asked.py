"""The demo's questions: prompts about long documents, and their right answers.

For the shipped model, they are in the language it was trained on.  For any other model, facts of
several kinds are hidden in real English, and the questions go through the chat template.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyramidinfer.lab.chat import Chat
from pyramidinfer.lab.invented import Fact, fit, hide_facts, invent
from pyramidinfer.lab.recall import ANSWER, make_questions
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["Question", "real_questions", "shipped_questions"]

FACTS = 5  # per document: one of every kind; the question asks for one of them
SENTENCE = SamplingParams(max_tokens=16, stop=(".", "\n"))


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its question, the expected answer, and the span of prompt tokens that holds it."""

    prompt: TokenIds
    asked: str
    wanted: str
    needle: tuple[int, int]
    params: SamplingParams
    is_right: Callable[[str], bool]


def shipped_questions(tokenizer: Any, seed: int, count: int, length: int) -> list[Question]:
    """Documents of ``length`` tokens in the shipped model's language, one question about each."""
    found = []
    for each in make_questions(seed, count, length):
        asked = each.prompt.split(" ? ")[0].split(" . ")[-1] + " ?"
        wanted = each.answer
        found.append(
            Question(
                tokenizer(each.prompt)["input_ids"],
                asked,
                wanted,
                each.needle,
                ANSWER,
                _Same(wanted),
            )
        )
    return found


def real_questions(tokenizer: Any, seed: int, count: int, length: int) -> list[Question]:
    """Prompts of ``length`` tokens or slightly less: real English with five invented facts of
    different kinds, and a question about one of them; the kinds take turns."""
    chat = Chat(tokenizer)
    found = []
    for index in range(count):
        facts = invent(random.Random(f"facts {seed} {index}"), FACTS)
        found.append(_about(chat, facts, facts[index % FACTS], f"{seed} {index}", length))
    return found


def _about(chat: Chat, facts: list[Fact], fact: Fact, seed: str, length: int) -> Question:
    def build(wanted: int) -> str:
        text = hide_facts(random.Random(f"document {seed}"), facts, wanted)
        return f"Read this text. I will ask you about it.\n\n{text}"

    def whole(context: str) -> TokenIds:
        return chat.ask(context, f"\n\n{fact.question}", f" {fact.opening}").whole

    context = fit(build, lambda text: len(whole(text)), length)
    before = context[: context.index(fact.statement)]
    start = len(chat.ask(before, "").context)
    stop = len(chat.ask(before + fact.statement, "").context)
    return Question(whole(context), fact.question, fact.value, (start, stop), SENTENCE, fact.is_in)


@dataclass(frozen=True, slots=True)
class _Same:
    """Whether the answer matches word for word."""

    answer: str

    def __call__(self, said: str) -> bool:
        return said.strip() == self.answer
