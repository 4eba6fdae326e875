"""Generated documents: readable filler with facts in it, and questions about those facts.

The text is word-level: every word, number and mark is one token, written with spaces around it,
so ``"The archive of Mira Holt is in room 472 ."`` is ten tokens.  The same generator makes the
training texts of the model in the repository, the demo's documents and the tests of recall, each
with other seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = [
    "ANSWER_TOKENS",
    "SPECIALS",
    "Document",
    "Fact",
    "answer_words",
    "document",
    "filler_sentence",
    "question_words",
    "vocabulary",
]

SPECIALS = ("<pad>", "<unk>", "<bos>", "<end>", "<user>", "<assistant>")

THINGS = (
    "archive atlas banner camera chest clock compass crown diary drum globe harp journal lantern "
    "ledger map mirror piano portrait scroll seal statue sword telescope trophy violin"
).split()
PLACES = "room hall vault locker office cellar".split()
FIRST_NAMES = (
    "Ada Alma Anton Boris Clara Dario Edith Elias Emil Esther Felix Flora Greta Hanna Hugo Ida "
    "Igor Irma Ivan Jonas Julia Karl Klara Lara Leon Lina Lotte Lukas Magda Marta Mira Moritz "
    "Nadia Nina Olga Oscar Otto Paula Petra Ralf Rosa Rufus Sara Silas Simon Sonja Tara Theo "
    "Tilda Ulla Vera Viktor Wanda Willa Xenia Yann Yara Zeno Zita Bruno Carla Dora Erik Fritz"
).split()
LAST_NAMES = (
    "Abel Adler Albrecht Arden Ashby Bailey Barlow Beck Benson Berg Blake Bloom Brandt Brook "
    "Calder Carver Castell Chase Coles Conrad Crane Dahl Dalton Darrow Decker Devlin Doyle Drake "
    "Dunn Eames Eddy Elgar Ellis Engel Falk Farrow Fenn Finch Fisk Flint Foss Frost Gale Garner "
    "Gibbs Glass Graham Greer Grimm Haas Hale Harlan Hayes Heller Hobbs Holt Hume Hurst Innes "
    "Jarvis Jensen Joyce Keane Keller Kemp Kent Kirby Knight Krause Lang Larkin Leigh Lind Locke "
    "Lund Lyons Maddox Marsh Mercer Miles Moss Nash Nolan North Oakes Olsen Osborn Page Parr "
    "Pike Poole Porter Quill Quinn Radley Ramsey Reed Rhodes Rigby Roth Rowe Sandler Sayer "
    "Severin Shaw Skye Sloan Stark Stein Stone Sutter Swann Tate Thorne Tobin Travis Vance Vogel "
    "Wade Walsh Webb Weiss Wells West Winter Wolfe York Young Zander Ziegler"
).split()
NUMBERS = [str(number) for number in range(100, 1000)]

PEOPLE = (
    "baker gardener teacher sailor farmer painter doctor weaver carpenter singer shepherd miller "
    "student merchant librarian fisherman"
).split()
ADJECTIVES = (
    "old quiet young tired cheerful patient clever gentle careful proud lonely friendly"
).split()
QUALITIES = (
    "small heavy broken wooden silver dusty narrow bright empty painted green blue red white"
).split()
OBJECTS = (
    "basket lamp letter ladder blanket kettle boat wheel rope bottle book chair hammer coat bell "
    "cup"
).split()
SITES = (
    "bridge market harbour river forest church garden station valley mill square tower field "
    "village orchard shore"
).split()
MOVES = "walked ran hurried wandered returned climbed rode".split()
ACTS = "carried repaired found lost bought sold painted cleaned borrowed hid".split()
MANNERS = "slowly quietly quickly happily carefully again alone".split()
TIMES = "morning evening afternoon night spring summer autumn winter".split()
WEATHER = "rain snow wind fog sun storm".split()
WEATHER_ACTS = "covered reached crossed left touched".split()
FUNCTION_WORDS = (
    "The the of is in In at At to across near from and while because after before was Where , . ?"
).split()


def vocabulary() -> list[str]:
    """All tokens of the generated language without repetition, special tokens first."""
    lists = (
        SPECIALS,
        FUNCTION_WORDS,
        PLACES,
        THINGS,
        PEOPLE,
        ADJECTIVES,
        QUALITIES,
        OBJECTS,
        SITES,
        MOVES,
        ACTS,
        MANNERS,
        TIMES,
        WEATHER,
        WEATHER_ACTS,
        FIRST_NAMES,
        LAST_NAMES,
        NUMBERS,
    )
    return list(dict.fromkeys(word for words in lists for word in words))


@dataclass(frozen=True, slots=True)
class Fact:
    """The place of a person's thing: the needle."""

    thing: str
    first: str
    last: str
    place: str
    number: str

    def words(self) -> list[str]:
        """The fact's sentence in a document (ten words)."""
        return [
            "The",
            self.thing,
            "of",
            self.first,
            self.last,
            "is",
            "in",
            self.place,
            self.number,
            ".",
        ]


@dataclass(frozen=True, slots=True)
class Document:
    """A document's words, its facts and the position of each fact's first word."""

    words: list[str]
    facts: list[Fact]
    starts: list[int]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def question_words(fact: Fact) -> list[str]:
    return ["Where", "is", "the", fact.thing, "of", fact.first, fact.last, "?"]


def answer_words(fact: Fact) -> list[str]:
    """The right answer: the fact itself."""
    return fact.words()


#: Generated tokens of an answer: the sentence and the end mark.
ANSWER_TOKENS = 11


def filler_sentence(rng: random.Random) -> list[str]:
    """One sentence of the grammar, 7 to 19 words, full stop included."""
    pick = rng.choice

    def someone() -> list[str]:
        return ["the", pick(ADJECTIVES), pick(PEOPLE)]

    def something() -> list[str]:
        return ["the", pick(QUALITIES), pick(OBJECTS)]

    def somewhere(*relations: str) -> list[str]:
        return [pick(relations), "the", pick(SITES)]

    def clause() -> list[str]:
        kind = rng.randrange(4)
        if kind == 0:
            return [*someone(), pick(MOVES), pick(MANNERS), *somewhere("to", "across", "from")]
        if kind == 1:
            return [*someone(), pick(ACTS), *something(), *somewhere("near", "at", "in")]
        if kind == 2:
            return ["the", pick(WEATHER), pick(WEATHER_ACTS), "the", pick(SITES)]
        return [*something(), "was", "in", "the", pick(SITES)]

    words = clause()
    shape = rng.randrange(4)
    if shape == 0:
        words = [pick(("in", "at")), "the", pick(TIMES), ",", *words]
    elif shape == 1:
        words = [*words, pick(("while", "because", "after", "before", "and")), *clause()]
    words = [words[0].capitalize(), *words[1:]]
    return [*words, "."]


def sample_facts(rng: random.Random, count: int) -> list[Fact]:
    """``count`` facts about different people: family names and numbers are not repeated."""
    if count > len(LAST_NAMES):
        raise ValueError(f"{count} facts requested; one document holds at most {len(LAST_NAMES)}")
    lasts, numbers = rng.sample(LAST_NAMES, count), rng.sample(NUMBERS, count)
    return [
        Fact(rng.choice(THINGS), rng.choice(FIRST_NAMES), last, rng.choice(PLACES), number)
        for last, number in zip(lasts, numbers, strict=True)
    ]


def document(rng: random.Random, length: int, facts: int) -> Document:
    """A document of exactly ``length`` words with ``facts`` facts at random places in filler text.

    The first filler sentence is shortened at its start to reach the exact length.
    """
    needles = sample_facts(rng, facts)
    room = length - sum(len(fact.words()) for fact in needles)
    if room < 0:
        raise ValueError(f"{facts} facts do not fit in a document of {length} words")
    filler: list[list[str]] = []
    while room > 0:
        sentence = filler_sentence(rng)
        filler.append(sentence[max(0, len(sentence) - room) :])
        room -= len(filler[-1])
    slots = sorted(rng.randrange(len(filler) + 1) for _ in needles)
    words: list[str] = []
    starts: list[int] = []
    cut = filler[-1:] if filler else []
    body = cut + filler[:-1]
    for index in range(len(body) + 1):
        while len(starts) < len(slots) and slots[len(starts)] == index:
            fact = needles[len(starts)]
            starts.append(len(words))
            words.extend(fact.words())
        if index < len(body):
            words.extend(body[index])
    return Document(words, needles, starts)
