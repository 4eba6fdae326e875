"""What needles are hidden in: sentences of a text, or RULER's own noise."""

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
#: A stretch of more words without a full stop is cut into sentences of so many.
LONGEST = 80


@dataclass(frozen=True, slots=True)
class Haystack:
    """Sentences in a text's order, and what stands between them.

    name : what a result calls the text.
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
        """A text file (UTF-8).  Where more is wanted than it holds, it begins again."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): name a text file"
            ) from None
        if not text.strip():
            raise ValueError(f"{path} is empty: name a file with text in it")
        return cls(path.name, _sentences(text))

    @classmethod
    def noise(cls) -> Haystack:
        """RULER's noise sentences: one line of five, again and again."""
        return cls("noise", (LINE,), "\n")

    def take(self, start: int, count: int) -> list[str]:
        """``count`` sentences from number ``start`` on, from the first again after the last."""
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]

    def begin(self, rng: random.Random) -> int:
        """A sentence to start at."""
        return rng.randrange(len(self.sentences))


def hide(needles: list[str], depths: list[float], sentences: list[str]) -> list[str]:
    """Sentences with needles between them, each at its depth (0 to 1).  Needles of one order stay
    in it where their depths ascend."""
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
