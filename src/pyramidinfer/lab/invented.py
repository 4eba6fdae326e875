"""Invented facts of several kinds, which are inserted into real text and asked for later."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pyramidinfer.engine.english import paragraphs

__all__ = ["Fact", "fit", "hide_facts", "invent", "says", "stretch"]

T = TypeVar("T")
PEOPLE = [
    f"{first} {last}"
    for first in ("Ada", "Bruno", "Clara", "Dora", "Emil", "Flora", "Greta", "Hugo", "Ida", "Jonas")
    for last in (
        "Alder",
        "Brandt",
        "Castell",
        "Dunmore",
        "Ekholm",
        "Ferrant",
        "Halloran",
        "Winslow",
    )
]
PLACES = [
    "boat house",
    "bakery",
    "clock tower",
    "observatory",
    "mill",
    "lighthouse",
    "chapel",
    "greenhouse",
    "railway station",
    "town library",
    "old brewery",
    "ferry pier",
]
TOWNS = """
Aberdale Brackenford Cullingham Dorvale Eskmouth Farrowby Glenmoor Hexbridge Ilminster Kettleby
Lowick Marrowdale Netherby Oxcombe
""".split()
COLOURS = ["crimson", "turquoise", "violet", "ivory", "amber", "magenta", "scarlet", "indigo"]
MONTHS = ["January", "February", "April", "June", "July", "September", "November", "December"]
EVENTS = [
    "harvest fair",
    "chess evening",
    "book sale",
    "rowing race",
    "flower show",
    "choir visit",
    "lantern walk",
    "cheese market",
]


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement, the question it answers, the answer's first words, and the expected value.

    kind : ``code``, ``town``, ``colour``, ``name`` or ``date``.
    """

    kind: str
    statement: str
    question: str
    opening: str
    value: str

    def is_in(self, said: str) -> bool:
        """Whether a text contains the value as whole words, ignoring case."""
        return says(said, self.value)


def says(said: str, value: str) -> bool:
    """Whether a text contains a value as whole words, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE) is not None


def invent(rng: random.Random, count: int) -> list[Fact]:
    """``count`` facts of the five kinds in turn; no person, place or value occurs twice."""
    people, places = rng.sample(PEOPLE, len(PEOPLE)), rng.sample(PLACES, len(PLACES))
    towns, colours = rng.sample(TOWNS, len(TOWNS)), rng.sample(COLOURS, len(COLOURS))
    events = rng.sample(EVENTS, len(EVENTS))
    most = 5 * min(len(TOWNS), len(COLOURS), len(EVENTS) // 2)
    if not 1 <= count <= most:
        raise ValueError(f"{count} facts for one text: give 1 to {most}")
    found = []
    for index in range(count):
        kind = ("code", "town", "colour", "name", "date")[index % 5]
        if kind == "code":
            place, value = places.pop(), str(rng.randrange(10**6, 10**7))
            opening = f"The access code of the {place} is"
            question = f"What is the access code of the {place}?"
        elif kind == "town":
            who, value = people.pop(), towns.pop()
            opening, question = f"{who} moved to", f"To which town did {who} move?"
        elif kind == "colour":
            place, value = places.pop(), colours.pop()
            opening = f"The door of the {place} is painted"
            question = f"In which colour is the door of the {place} painted?"
        elif kind == "name":
            event, value = events.pop(), people.pop()
            opening, question = f"The {event} is organised by", f"Who organises the {event}?"
        else:
            event, value = events.pop(), f"{rng.randrange(1, 29)} {rng.choice(MONTHS)}"
            opening, question = f"The {event} begins on", f"On which day does the {event} begin?"
        found.append(Fact(kind, f"{opening} {value}.", question, opening, value))
    return found


def stretch(rng: random.Random, texts: Sequence[str], wanted: int) -> list[str]:
    """Consecutive sentences of about ``wanted`` characters from a random start; wraps at the
    end."""
    at, size = rng.randrange(len(texts)), 0
    found: list[str] = []
    while True:
        for sentence in texts[at % len(texts)].split(". "):
            if size >= wanted:
                return found
            found.append(sentence if sentence.endswith(".") else f"{sentence}.")
            size += len(found[-1]) + 1
        at += 1


def fit(build: Callable[[int], T], size: Callable[[T], int], length: int) -> T:
    """The result of ``build`` for the number of characters that gives at most ``length`` tokens.

    Found by bisection.  Returns the smallest result (no characters) if even that has more tokens.
    """
    low, high, best = 0, 8 * length, build(0)
    while high - low > 40:
        middle = (low + high) // 2
        made = build(middle)
        if size(made) <= length:
            low, best = middle, made
        else:
            high = middle
    return best


def hide_facts(rng: random.Random, facts: Sequence[Fact], wanted: int) -> str:
    """Real English of about ``wanted`` characters with the facts' statements between its
    sentences, spread over the whole text in random order."""
    sentences = stretch(rng, paragraphs(), wanted)
    order = rng.sample(list(facts), len(facts))
    for index in reversed(range(len(order))):
        part = len(sentences) / len(order)
        sentences.insert(int(part * (index + rng.random())), order[index].statement)
    return " ".join(sentences)
