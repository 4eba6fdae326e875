"""Prompts for a model: through its chat template, if its tokenizer has one.

A prompt has two parts, split at the end of the context, so that the same tokens can be fed at once
or one part after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pyramidinfer.engine.text import head_of, plain_ids
from pyramidinfer.types import TokenIds

__all__ = ["Asked", "Chat"]

#: Markers in a rendered conversation at which the text is split.
MARKS = ("\u27e6cut 1\u27e7", "\u27e6cut 2\u27e7")


class Asked(NamedTuple):
    """Token ids up to the end of the context, and the ids after it."""

    context: TokenIds
    rest: TokenIds

    @property
    def whole(self) -> TokenIds:
        return self.context + self.rest


class Chat:
    """A tokenizer and the format of prompts for its model.

    Without a template, the context follows the tokens that the tokenizer puts before every text,
    and the question follows unchanged.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError("prompts in words need the model's tokenizer, but none was found")
        self.tokenizer = tokenizer

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ask(self, context: str, question: str, answer: str = "") -> Asked:
        """A user's message of ``context`` and ``question`` (including any blanks between them),
        with the first words of the ``answer`` given (without blanks at the end, which would be
        tokenized apart from the next word)."""
        answer = answer.rstrip()
        if not self.has_template:
            return Asked(self.head + self.encode(context), self.encode(question + answer))
        text = self._render([{"role": "user", "content": context + MARKS[0] + question}])
        before, after = text.split(MARKS[0])
        return Asked(self.encode(before), self.encode(after + answer.lstrip()))

    def begin(self, message: str) -> TokenIds:
        """A conversation's first turn, up to the start of the model's answer."""
        if not self.has_template:
            return self.head + self.encode(message)
        return self.encode(self._render([{"role": "user", "content": message}]))

    def go_on(self, answer: TokenIds, message: str) -> TokenIds:
        """The tokens after the model's ``answer`` (as generated, with its end token) when the user
        sends ``message``, up to the start of the next answer."""
        if not self.has_template:
            return self.encode(message)
        talk = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": MARKS[0]},
            {"role": "user", "content": MARKS[1]},
        ]
        ids = self.encode(self._render(talk).split(MARKS[0])[1].replace(MARKS[1], message))
        ended = bool(answer) and bool(ids) and answer[-1] == ids[0]
        return ids[1:] if ended else ids

    def encode(self, text: str) -> TokenIds:
        """Token ids of an unchanged text."""
        return plain_ids(self.tokenizer, text)

    @cached_property
    def head(self) -> TokenIds:
        """The tokens that the tokenizer puts before every text."""
        return head_of(self.tokenizer)

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text
