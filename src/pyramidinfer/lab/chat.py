"""How a text is put to a model: through its chat template, where its tokenizer has one.

A prompt is made in two pieces, up to where a context ends and from there on, so that the same
tokens can go in at once or one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pyramidinfer.engine.text import head_of, plain_ids
from pyramidinfer.types import TokenIds

__all__ = ["Asked", "Chat"]

#: Stand in a rendered conversation where a text is to be cut.
MARKS = ("\u27e6cut 1\u27e7", "\u27e6cut 2\u27e7")


class Asked(NamedTuple):
    """Token ids up to the end of the context, and those of what follows it."""

    context: TokenIds
    rest: TokenIds

    @property
    def whole(self) -> TokenIds:
        return self.context + self.rest


class Chat:
    """A tokenizer and the form in which its model is asked.

    Without a template the context stands behind the tokens that the tokenizer puts in front of
    every text, and the question follows it as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError("asking a model in words needs its tokenizer; none was found")
        self.tokenizer = tokenizer

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ask(self, context: str, question: str, answer: str = "") -> Asked:
        """A user's message of ``context`` and ``question`` (blanks between them are theirs), with
        the first words of the ``answer`` given (without blanks at the end: they would part the
        next word from its own)."""
        answer = answer.rstrip()
        if not self.has_template:
            return Asked(self.head + self.encode(context), self.encode(question + answer))
        text = self._render([{"role": "user", "content": context + MARKS[0] + question}])
        before, after = text.split(MARKS[0])
        return Asked(self.encode(before), self.encode(after + answer.lstrip()))

    def begin(self, message: str) -> TokenIds:
        """A conversation's first turn, up to where the model answers."""
        if not self.has_template:
            return self.head + self.encode(message)
        return self.encode(self._render([{"role": "user", "content": message}]))

    def go_on(self, answer: TokenIds, message: str) -> TokenIds:
        """What follows the model's ``answer`` (as generated, its end token included) when the user
        says ``message``, up to where the model answers again."""
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
        """Token ids of a text as it stands."""
        return plain_ids(self.tokenizer, text)

    @cached_property
    def head(self) -> TokenIds:
        """The tokens that the tokenizer puts in front of every text."""
        return head_of(self.tokenizer)

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text
