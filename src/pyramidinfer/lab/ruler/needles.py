"""RULER's needles in a haystack: eight forms of finding the values of a key in a text.

Templates and forms are those of NVIDIA/RULER (``scripts/synthetic.yaml``, arXiv 2404.06654,
section 3); the words of the keys are our own.  Differences: a needle has any depth (RULER draws
from 40 steps in a text, different ones for different needles), keys and values are unique, and the
text starts at any of its sentences (RULER's at the first).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from pyramidinfer.lab.ruler.haystack import Haystack, hide
from pyramidinfer.lab.ruler.sample import Recipe, Sample
from pyramidinfer.lab.ruler.words import ADJECTIVES, NOUNS, number, unlike, uuid4, word_keys

__all__ = ["FORMS", "niah"]

MAX_TOKENS = 128
NEEDLE = "One of the special magic {what} for {key} is: {value}."


@dataclass(frozen=True, slots=True)
class Form:
    """A form: the haystack, the number of keys, the number of values per key, and the number of
    keys in the question."""

    hay: Literal["noise", "text", "needles"]
    value: Literal["numbers", "uuids"] = "numbers"
    key: Literal["words", "uuids"] = "words"
    keys: int = 1
    values: int = 1
    asked: int = 1


FORMS = {
    "niah_single_1": Form("noise"),
    "niah_single_2": Form("text"),
    "niah_single_3": Form("text", "uuids"),
    "niah_multikey_1": Form("text", keys=4),
    "niah_multikey_2": Form("needles"),
    "niah_multikey_3": Form("needles", "uuids", "uuids"),
    "niah_multivalue": Form("text", values=4),
    "niah_multiquery": Form("text", keys=4, asked=4),
}


def niah(task: str, rng: random.Random, length: int, text: Haystack) -> Recipe:
    """Needles at random depths between ``size`` sentences."""
    form = FORMS[task]
    draw_key = word_keys(rng) if form.key == "words" else lambda: uuid4(rng)
    draw_value = (lambda: number(rng)) if form.value == "numbers" else lambda: uuid4(rng)
    pairs = zip(unlike(draw_key), _grouped(unlike(draw_value), form.values), strict=True)
    own = list(islice(pairs, form.keys))
    needles = [_needle(form, key, value) for key, values in own for value in values]
    depths = [rng.random() for _ in needles]
    asked = rng.sample(own, form.asked)
    hay = Haystack.noise() if form.hay == "noise" else text
    start = hay.begin(rng)
    others: list[str] = []

    def sentences(size: int) -> list[str]:
        if form.hay != "needles":
            return hay.take(start, size)
        for key, values in islice(pairs, max(0, size - len(others))):
            others.append(_needle(form, key, values[0]))
        return others[:size]

    joint = "\n" if form.hay == "needles" else hay.joint
    wanted = [value for _, values in asked for value in values]
    instruction, question, answer = _words(form, [key for key, _ in asked], len(wanted) == 1)

    def build(size: int) -> Sample:
        context = instruction + joint.join(hide(needles, depths, sentences(size)))
        return Sample(task, context, question, answer, tuple(wanted), MAX_TOKENS)

    most = None
    if form.hay == "needles" and form.key == "words":
        most = len(ADJECTIVES) * len(NOUNS) * 3 // 4  # the number of different keys is limited
    return Recipe(build, most=most)


def _needle(form: Form, key: str, value: str) -> str:
    return NEEDLE.format(what=form.value, key=key, value=value)


def _grouped(values: Iterator[str], size: int) -> Iterator[tuple[str, ...]]:
    while True:
        yield tuple(islice(values, size))


def _words(form: Form, keys: list[str], one: bool) -> tuple[str, str, str]:
    """Instruction, question and the answer's first words; singular for one value."""
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    what = form.value[:-1] if one else form.value
    some, are, are_all = ("A", "is", "is") if one else ("Some", "are", "are all")
    return (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {what} afterwards.\n",
        f"\nWhat {are_all} the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
    )
