"""Invented facts whose answers are long: numbers, keys, codes, addresses, several names at once.

A layer may have copied a short value already; to generate a long value, the model must attend to
the text for each of its tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyramidinfer.lab.invented import PEOPLE, PLACES, TOWNS, invent, says

__all__ = ["KINDS", "SHORT", "LongFact", "invent_long"]

#: The one kind with a short answer.
SHORT = "short"
#: A text contains one fact of each kind.
KINDS = (SHORT, "number", "key", "code", "names", "address")
ROADS = ["Lane", "Street", "Hill", "Row"]


@dataclass(frozen=True, slots=True)
class LongFact:
    """A statement, the question it answers, the answer's first words, and the values that the
    answer must contain.

    kind : one of ``KINDS``.
    """

    kind: str
    statement: str
    question: str
    opening: str
    values: tuple[str, ...]

    def is_in(self, said: str) -> bool:
        """Whether a text contains every value, in any case and order."""
        return all(says(said, value) for value in self.values)


def invent_long(rng: random.Random) -> list[LongFact]:
    """A fact of each of ``KINDS``; all are about different places, people and events."""
    plain = rng.choice(invent(rng, 5))
    short = LongFact(SHORT, plain.statement, plain.question, plain.opening, (plain.value,))

    def drawn(names: list[str], count: int) -> list[str]:
        return rng.sample([name for name in names if name not in plain.statement], count)

    meter, safe, numbered, home = drawn(PLACES, 4)
    who, *guests = drawn(PEOPLE, 4)
    return [
        short,
        _one(
            "number",
            f"What does the meter of the {meter} read?",
            f"The meter of the {meter} reads",
            str(rng.randrange(10**11, 10**12)),
        ),
        _one(
            "key",
            f"Which key opens the safe in the {safe}?",
            f"The safe in the {safe} is opened by the key",
            _key(rng),
        ),
        _one(
            "code",
            f"What is the serial number of the {numbered}?",
            f"The serial number of the {numbered} is",
            f"{rng.getrandbits(64):016x}",
        ),
        _names(home, guests),
        _one(
            "address", f"Where does {who} live?", f"{who} lives at", _address(rng, drawn(TOWNS, 2))
        ),
    ]


def _one(kind: str, question: str, opening: str, value: str) -> LongFact:
    return LongFact(kind, f"{opening} {value}.", question, opening, (value,))


def _key(rng: random.Random) -> str:
    """Five groups of hexadecimal digits, 32 in all."""
    return "-".join(f"{rng.getrandbits(4 * size):0{size}x}" for size in (8, 4, 4, 4, 12))


def _address(rng: random.Random, towns: list[str]) -> str:
    road, town = towns
    number, code = rng.randrange(10, 200), rng.randrange(10_000, 100_000)
    return f"{number} {road} {rng.choice(ROADS)} in {code} {town}"


def _names(place: str, names: list[str]) -> LongFact:
    opening = f"The guest list of the {place} reads:"
    told = f"{opening} {', '.join(names[:-1])} and {names[-1]}."
    return LongFact(
        "names", told, f"Who is on the guest list of the {place}?", opening, tuple(names)
    )
