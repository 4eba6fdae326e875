"""Passages that a model reads and repeats, to measure what its heads need.

There are two halves of different text: if the same heads need most on both, a profile describes the
model and not the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyramidinfer.engine.english import ENGLISH, LIBRARY, library_paragraphs, paragraphs
from pyramidinfer.engine.text import head_of, plain_ids
from pyramidinfer.models import ModelRunner
from pyramidinfer.policies.kvzip import AGAIN
from pyramidinfer.types import TokenIds

__all__ = [
    "AGAIN",
    "COUNT",
    "LENGTH",
    "Passages",
    "english_passages",
    "passages_for",
    "random_passages",
    "room_for",
    "text_passages",
]

#: Number of passages in both halves together, and tokens of each.
COUNT, LENGTH = 4, 750
#: Minimum tokens of a passage: if a model has no positions for more; in a short text.
FEWEST, SHORT = 64, 200
#: Minimum number of random tokens.
FEWEST_RANDOM = 16
#: A text is refused if this share of its tokens is unknown to the tokenizer.
UNKNOWN = 0.5


@dataclass(frozen=True, slots=True)
class Passages:
    """The passages as token ids.

    name : of the text;  halves : passages of one text, and of another;  head : tokens before every
    passage that are not repeated;  again : tokens between passage and repetition.
    """

    name: str
    halves: tuple[tuple[TokenIds, ...], tuple[TokenIds, ...]]
    head: int = 0
    again: TokenIds | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.halves):
            raise ValueError("a profile needs at least one passage in each half")

    @property
    def all(self) -> list[TokenIds]:
        return [*self.halves[0], *self.halves[1]]

    def repeated(self, passage: TokenIds) -> TokenIds:
        """The tokens that are fed after a passage."""
        return [*self.again, *passage[self.head :]]


def passages_for(runner: ModelRunner, tokenizer: Any) -> Passages:
    """Real English, or random tokens without a tokenizer."""
    if tokenizer is None:
        return random_passages(runner)
    return english_passages(runner, tokenizer)


def random_passages(runner: ModelRunner) -> Passages:
    """Random tokens: they also reveal heads that attend to earlier occurrences (induction heads,
    Olsson et al., arXiv 2209.11895), though less exactly than text."""
    generator, length = torch.Generator().manual_seed(0), room_for(runner, 0, FEWEST_RANDOM)
    drawn = torch.randint(runner.vocab_size, (COUNT, length), generator=generator).tolist()
    halves = tuple(drawn[: COUNT // 2]), tuple(drawn[COUNT // 2 :])
    return Passages("random tokens (the model came without a tokenizer)", halves)


def english_passages(runner: ModelRunner, tokenizer: Any) -> Passages:
    """From two texts in every Python installation: its language reference, and docstrings."""
    check_tokenizer(tokenizer)
    texts = paragraphs(), library_paragraphs()
    if not texts[1]:
        raise ValueError(
            "this Python came without its library's sources, whose docstrings a profile is "
            "measured on; give a text: pyramidinfer profile MODEL --text FILE"
        )
    length, each = room_for(runner, len(plain_ids(tokenizer, AGAIN))), COUNT // 2
    first, second = (
        tuple(
            _beginning(tokenizer, text[index * len(text) // each :], length)
            for index in range(each)
        )
        for text in texts
    )
    return _made(tokenizer, f"{ENGLISH}; {LIBRARY}", (first, second))


def text_passages(runner: ModelRunner, tokenizer: Any, text: str, name: str) -> Passages:
    """From one text: its first and its second half, with evenly spread passages."""
    check_tokenizer(tokenizer)
    ids, head = plain_ids(tokenizer, text), head_of(tokenizer)
    room = room_for(runner, len(plain_ids(tokenizer, AGAIN)))
    length = min(room, len(ids) // COUNT + len(head))
    if length < (least := min(SHORT, room)):
        needed = COUNT * (least - len(head))
        raise ValueError(f"{name} has {len(ids)} tokens; a profile needs at least {needed} of them")
    part = len(ids) // COUNT
    found = [head + ids[at * part :][: length - len(head)] for at in range(COUNT)]
    halves = tuple(found[: COUNT // 2]), tuple(found[COUNT // 2 :])
    return _made(tokenizer, name, halves)


def room_for(runner: ModelRunner, again: int, fewest: int = FEWEST) -> int:
    """Maximum tokens of a passage that this model can read and repeat with ``again`` tokens in
    between, at most ``LENGTH``."""
    positions = min(runner.max_positions, runner.rotary.long_from or runner.max_positions)
    room = min(LENGTH, (positions - again - 1) // 2)
    if room < fewest:
        raise ValueError(
            f"the model has {positions} positions; {2 * fewest + again + 1} are needed to "
            f"read a passage and repeat it, so it can have no head profile"
        )
    return room


def check_tokenizer(tokenizer: Any) -> None:
    """``ValueError`` if there is none."""
    if tokenizer is None:
        raise ValueError(
            "this model came without a tokenizer, so a text cannot be read; give tokenizer=…"
        )


def _made(
    tokenizer: Any, name: str, halves: tuple[tuple[TokenIds, ...], tuple[TokenIds, ...]]
) -> Passages:
    unknown = getattr(tokenizer, "unk_token_id", None)
    every = [token for half in halves for passage in half for token in passage]
    if unknown is not None and every.count(unknown) > UNKNOWN * len(every):
        raise ValueError(
            f"most of {name} is unknown to the model's tokenizer; give a text of its own "
            f"language: pyramidinfer profile MODEL --text FILE"
        )
    return Passages(name, halves, len(head_of(tokenizer)), plain_ids(tokenizer, AGAIN))


def _beginning(tokenizer: Any, texts: Sequence[str], length: int) -> TokenIds:
    """The first ``length`` tokens of some paragraphs, including the head."""
    head, size = head_of(tokenizer), 4 * length
    whole = "\n\n".join(texts)
    while True:
        ids = head + plain_ids(tokenizer, whole[:size])
        if len(ids) > length:  # the last one may be half a word
            return ids[:length]
        if size >= len(whole):
            raise ValueError(
                f"Python's own texts are too short for {length} tokens; give one: pyramidinfer "
                f"profile MODEL --text FILE"
            )
        size *= 2
