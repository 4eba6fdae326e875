"""RULER's tasks over a whole text: variable tracing (vt), common and frequent words (cwe, fwe).

Templates and counts are those of NVIDIA/RULER (``scripts/data/synthetic``, arXiv 2404.06654,
section 3).  Differences:

vt : an assignment has its own line (RULER: the start of a noise line); variables of the
    worked example have five letters too (three), and it is about half as long (up to 500 tokens).
cwe : words are those of Python's documentation (``words.english_words``; RULER: ``wonderwords``);
    common ones have five letters or more, and none is common in the worked example as well.
fwe : the tokens to generate count (RULER lets the text alone fill the length).
cwe, fwe : each sample is shuffled in an order of its own (RULER: one order for all).
"""

from __future__ import annotations

import random
import string
from itertools import islice, pairwise

from pyramidinfer.lab.ruler.haystack import Haystack, hide
from pyramidinfer.lab.ruler.sample import Recipe, Sample
from pyramidinfer.lab.ruler.words import coded, english_words, unlike

__all__ = ["cwe", "fwe", "vt", "zipf_counts"]

HOPS = 4
#: Noise lines of vt's worked example, some 500 letters.
EXAMPLE_LINES = 6
#: From this length in tokens, cwe repeats its words more often: RULER's 4,096 less a template.
LONG = 4096 - 128
COMMON = 10
#: Minimum letters of a common word: a shorter one ("the") occurs in any answer.
LETTERS = 5
#: The sum of 1 / k², k from 1 on: the normalizer of Zipf's law with exponent 2.
ZETA_2 = 1.6449340668482264
#: From this number of words, Zipf's ranks 1 to 5 have different counts.
LEAST_CODED = 73


def vt(task: str, rng: random.Random, length: int, text: Haystack) -> Recipe:
    """One chain of four hops in noise; the question asks for all variables with the first one's
    value."""
    noise = Haystack.noise()
    names = unlike(lambda: coded(rng, 5, string.ascii_uppercase))
    values = unlike(lambda: str(rng.randrange(10_000, 100_000)))

    def chain() -> tuple[list[str], str, list[str], list[float]]:
        own, value = list(islice(names, HOPS + 1)), next(values)
        lines = [f"VAR {own[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(own)]
        return own, value, lines, sorted(rng.random() for _ in own)

    def words(value: str, lines: list[str], depths: list[float], size: int) -> tuple[str, str, str]:
        hidden = "\n".join(hide(lines, depths, noise.take(0, size)))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            f"text.\n\n{hidden}",
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above.",
            f" Answer: According to the chain(s) of variable assignment in the text above, "
            f"{HOPS + 1} variables are assigned the value {value}, they are: ",
        )

    shown, value, lines, depths = chain()
    example = "".join(words(value, lines, depths, EXAMPLE_LINES)) + " ".join(shown) + "\n\n"
    own, value, lines, depths = chain()

    def build(size: int) -> Sample:
        context, question, answer = words(value, lines, depths, size)
        return Sample(task, example + context, question, answer, tuple(own), 30)

    return Recipe(build)


def cwe(task: str, rng: random.Random, length: int, text: Haystack) -> Recipe:
    """A numbered list in which ten words are frequent and all others rare.  The vocabulary limits
    it to about 40,000 tokens."""
    often, seldom = (30, 3) if length >= LONG else (6, 1)
    shown, shown_often, shown_seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)
    words = rng.sample(english_words(), len(english_words()))
    long = [word for word in words if len(word) >= LETTERS]
    shown_common, common = long[:COMMON], long[COMMON : 2 * COMMON]
    rest = [word for word in words if word not in {*shown_common, *common}]
    cut = shown - COMMON
    shuffle = rng.getrandbits(64)

    def listed(common: list[str], often: int, others: list[str], seldom: int) -> tuple[str, str]:
        items = common * often + others * seldom
        random.Random(shuffle).shuffle(items)
        return (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{_numbered(items)}",
            f"\nQuestion: What are the {COMMON} most common words in the above list?",
        )

    answer = f" Answer: The top {COMMON} words that appear most often in the list are:"
    example = "".join(listed(shown_common, shown_often, rest[:cut], shown_seldom))
    example += f"{answer} {_numbered(shown_common)}\n"

    def build(size: int) -> Sample:
        context, question = listed(common, often, rest[cut : cut + size], seldom)
        return Sample(task, example + context, question, answer, tuple(common), 120)

    return Recipe(build, most=len(rest) - cut)


def fwe(task: str, rng: random.Random, length: int, text: Haystack) -> Recipe:
    """Words of random letters with frequencies by Zipf's law; the most frequent is written as dots,
    and the question asks for the next three."""
    letters, shuffle = random.Random(rng.getrandbits(64)), rng.getrandbits(64)
    fresh = unlike(lambda: coded(letters, 6, string.ascii_lowercase))
    vocabulary = ["...", *islice(fresh, 3)]
    asked = tuple(vocabulary[1:4])

    def build(size: int) -> Sample:
        counts = zipf_counts(size)
        vocabulary.extend(islice(fresh, max(0, len(counts) - len(vocabulary))))
        items = [word for word, n in zip(vocabulary, counts, strict=False) for _ in range(n)]
        random.Random(shuffle).shuffle(items)
        return Sample(
            task,
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(items)}",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words "
            "are:",
            asked,
            50,
        )

    return Recipe(build, least=LEAST_CODED)


def zipf_counts(size: int) -> list[int]:
    """The count of each rank among ``size`` words by Zipf's law with exponent 2, rounded down;
    ranks with count 0 are left out."""
    counts, rank = [], 1
    while (count := int(size / (ZETA_2 * rank**2))) > 0:
        counts.append(count)
        rank += 1
    return counts


def _numbered(items: list[str]) -> str:
    return " ".join(f"{at}. {item}" for at, item in enumerate(items, 1))
