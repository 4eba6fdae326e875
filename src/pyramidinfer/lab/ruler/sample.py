"""A RULER task's sample, the score of an answer, and the fit of a text to a length.

After RULER (Hsieh et al. 2024, arXiv 2404.06654; NVIDIA/RULER): the length of a sample counts its
text, the answer's first words and the tokens that may be generated.  An answer scores the mean
share of the references that it contains ("string_match_all"); in question answering, 1 if it
contains any ("string_match_part").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Recipe", "Sample", "TooShort", "fill", "find_size"]

#: A text is long enough if at most this share of the room is left.
SLACK = 0.01
#: Maximum calls of the tokenizer for one sample, not counting two.
STEPS = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """One question.

    context : instruction, worked example and haystack; the part that may be compressed before the
    question.
    question : the rest, starting with the newline that separates them.
    answer : the first words of the answer, given to the model.
    """

    task: str
    context: str
    question: str
    answer: str
    references: tuple[str, ...]
    max_tokens: int

    @property
    def text(self) -> str:
        return self.context + self.question + self.answer

    def score(self, said: str) -> float:
        """Share of the references found in the answer, ignoring case; for ``qa``, 1 if any is
        found."""
        said = said.lower()
        found = [reference.lower() in said for reference in self.references]
        if self.task.startswith("qa_"):
            return float(any(found))
        return sum(found) / len(found)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A sample of any size: ``build(size)`` is deterministic, and a larger size extends the
    same sample.  Sizes go from ``least`` to ``most`` (None: no limit)."""

    build: Callable[[int], Sample]
    least: int = 1
    most: int | None = None


class TooShort(Exception):
    """Even the smallest sample has more tokens (``needed``) than allowed."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def fill(recipe: Recipe, length: int, count_tokens: Callable[[str], int]) -> Sample:
    """The largest sample of at most ``length`` tokens, or one that leaves 1 % of them."""

    def cost(size: int) -> int:
        sample = recipe.build(size)
        return count_tokens(sample.text) + sample.max_tokens

    return recipe.build(find_size(cost, recipe.least, recipe.most, length))


def find_size(cost: Callable[[int], int], least: int, most: int | None, room: int) -> int:
    """The largest size whose cost is at most ``room``, or one within 1 % of it; costs grow
    about linearly, so linear interpolation finds it in a few steps."""
    low, low_cost = least, cost(least)
    if low_cost > room:
        raise TooShort(low_cost)
    high: int | None = None if most is None else most + 1
    high_cost: int | None = None
    size, first, first_cost = 2 * least + 8, low, low_cost
    for _ in range(STEPS):
        if room - low_cost <= SLACK * room or (high is not None and high - low <= 1):
            break
        size = max(low + 1, size if high is None else min(size, high - 1))
        now = cost(size)
        if now <= room:
            low, low_cost = size, now
        else:
            high, high_cost = size, now
        if high is not None and high_cost is not None:
            each = (high_cost - low_cost) / (high - low)
        else:
            each = (now - first_cost) / (size - first)
        size = low + int((room - low_cost) / max(each, 0.5))
    return low
