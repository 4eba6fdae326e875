"""The text around needles: sentences of a text, or RULER's noise."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pyramidinfer.engine.english import ENGLISH, paragraphs

__all__ = ["Haystack", "hide"]

#: RULER's noise, one line of it (NVIDIA/RULER, scripts/data/synthetic/niah.py).
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
#: A passage of more words without a full stop is cut into sentences of this many.
LONGEST = 80


@dataclass(frozen=True, slots=True)
class Haystack:
    """Sentences in text order, and their separator.

    name : the text's name in results.
    """

    name: str
    sentences: tuple[str, ...] = field(repr=False)
    joint: str = " "

    def __post_init__(self) -> None:
        if not self.sentences:
            raise ValueError(f"{self.name} holds no sentences: choose a text with some")

    @classmethod
    def default(cls) -> Haystack:
        """The prose of Python's own documentation, which needs no download."""
        return _english()

    @classmethod
    def read(cls, path: str | Path) -> Haystack:
        """A text file (UTF-8).  If more text is needed, it starts again from the beginning."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): name a text file"
            ) from None
        if not text.strip():
            raise ValueError(f"{path} is empty: name a file with text in it")
        return cls(path.name, _sentences(text))

    @classmethod
    def noise(cls) -> Haystack:
        """RULER's noise sentences: one line of five, repeated."""
        return cls("noise", (LINE,), "\n")

    def take(self, start: int, count: int) -> list[str]:
        """``count`` sentences from number ``start`` on; wraps at the end."""
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]

    def begin(self, rng: random.Random) -> int:
        """The index of a random first sentence."""
        return rng.randrange(len(self.sentences))


def hide(needles: list[str], depths: list[float], sentences: list[str]) -> list[str]:
    """Sentences with needles between them, each at its depth (0 to 1).  Needles with ascending
    depths keep their order."""
    found = list(sentences)
    places = sorted(zip(depths, range(len(needles)), strict=True), reverse=True)
    for depth, which in places:
        found.insert(round(depth * len(sentences)), needles[which])
    return found


@lru_cache(maxsize=1)
def _english() -> Haystack:
    return Haystack(ENGLISH, _sentences(" ".join(paragraphs())))


def _sentences(text: str) -> tuple[str, ...]:
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[^\sa-z])", " ".join(text.split())):
        words = sentence.split()
        step = LONGEST // 2 if len(words) > LONGEST else LONGEST
        found += [" ".join(words[at : at + step]) for at in range(0, len(words), step)]
    return tuple(found)
