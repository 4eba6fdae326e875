"""Question answering in RULER's form, on invented facts.

RULER puts the paragraphs of SQuAD and HotpotQA among other paragraphs.  Those need a download, and
models know their answers by heart.  Here, documents are about people and companies that do not
exist, so an answer can only come from the text.  Scores are comparable with each other, not with
RULER's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyramidinfer.lab.ruler.haystack import Haystack, hide
from pyramidinfer.lab.ruler.sample import Recipe, Sample
from pyramidinfer.lab.ruler.words import unlike

__all__ = ["qa"]

MAX_TOKENS = 32
ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
FIRST = """
Ada Anton Bela Clara Dario Edda Emil Flora Greta Hugo Ida Ivo Jonas Karla Leo Lina Marek Mila Nora
Otto Paula Rosa Samuel Tilda Ulla Viktor Wanda Xenia Yara Zeno
""".split()
JOBS = """
accountant architect baker botanist carpenter chemist cook designer driver editor electrician
engineer gardener geologist lawyer librarian mechanic nurse painter pilot printer surveyor tailor
translator
""".split()
GOODS = [
    "bicycles",
    "boats",
    "books",
    "candles",
    "clocks",
    "coats",
    "door locks",
    "farm machines",
    "garden tools",
    "glassware",
    "hats",
    "kites",
    "lamps",
    "maps",
    "musical instruments",
    "ovens",
    "paper",
    "pumps",
    "rope",
    "shoes",
    "soap",
    "telescopes",
    "toys",
    "water filters",
]
HOBBIES = [
    "plays chess",
    "paints landscapes",
    "keeps bees",
    "sings in a choir",
    "repairs old radios",
    "goes rowing",
    "collects stamps",
    "grows tomatoes",
    "writes short stories",
    "bakes bread",
    "runs marathons",
    "watches birds",
]
PERSON = [
    "{person} was born in the town of {birth} in {year}. After school {first} trained as {a_job} "
    "and has worked for {company} ever since. In the evenings {first} {hobby}.",
    "{person} works as {a_job} at {company}. Born in the town of {birth} in {year}, {first} grew "
    "up there with three older sisters. At weekends {first} {hobby}.",
    "As {a_job}, {person} joined {company} at the age of 25. Friends know that {first} {hobby}. "
    "{first} was born in {birth} in {year}, on a winter morning.",
]
COMPANY = [
    "{company} makes {goods}. It was founded in {year} by two brothers and has its head office in "
    "the town of {seat}. Some {staff} people work there.",
    "The head office of {company} is in {seat}. Since {year} the firm has made {goods}, which it "
    "sells in eleven countries. It has {staff} employees.",
    "Known for its {goods}, {company} was founded in {year}. About {staff} people work for it, "
    "most of them at the head office in {seat}.",
]
ONE = ("In which town was {person} born?", "In which town is the head office of {company}?")
TWO = "In which town is the head office of the company that {person} works for?"


@dataclass(frozen=True, slots=True)
class Fact:
    """A person, the place of birth, the company that the person works for and the company's
    place."""

    person: str
    birth: str
    company: str
    seat: str
    about_person: str
    about_company: str


class World:
    """An endless source of facts.  No name is part of another one: each begins with two unique
    syllables (consonant, vowel, consonant)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.stems = unlike(lambda: (self._syllable() + self._syllable()).capitalize())

    def draw(self) -> Fact:
        pick = self.rng.choice
        first = pick(FIRST)
        names = {
            "person": f"{first} {next(self.stems)}{pick(['en', 'sen', 'er', 'a', 'ov'])}",
            "birth": next(self.stems) + pick(["ford", "ton", "by", "ham", "stead"]),
            "company": f"{next(self.stems)} {pick(['Works', 'Limited', 'Brothers', 'Company'])}",
            "seat": next(self.stems) + pick(["ford", "ton", "by", "ham", "stead"]),
        }
        job = pick(JOBS)
        more = {
            "first": first,
            "a_job": f"{'an' if job[0] in 'aeiou' else 'a'} {job}",
            "hobby": pick(HOBBIES),
            "goods": pick(GOODS),
            "staff": self.rng.randrange(30, 900),
        }
        years = self.rng.sample(range(1900, 1995), 2)  # one year in both would join the documents
        person, company = (
            pick(each).format(**names, **more, year=year)
            for each, year in zip((PERSON, COMPANY), years, strict=True)
        )
        return Fact(**names, about_person=person, about_company=company)

    def _syllable(self) -> str:
        pick = self.rng.choice
        return pick("bdfghklmnprstv") + pick("aeiou") + pick("dklmnrst")


def qa(task: str, rng: random.Random, length: int, text: Haystack) -> Recipe:
    """Documents that include those with the answer: one document in ``qa_facts_1``; in
    ``qa_facts_2`` one that names the company and one that gives its place."""
    two = task == "qa_facts_2"
    asked_person = two or rng.random() < 0.5
    depths = [rng.random() for _ in range(2 if two else 1)]
    world = World(rng)
    own = world.draw()
    if two:
        gold, question, answer = [own.about_person, own.about_company], TWO, own.seat
    elif asked_person:
        gold, question, answer = [own.about_person], ONE[0], own.birth
    else:
        gold, question, answer = [own.about_company], ONE[1], own.seat
    question = question.format(person=own.person, company=own.company)
    others: list[str] = []

    def build(size: int) -> Sample:
        while len(others) < size:
            other = world.draw()
            about = [other.about_person, other.about_company]
            others.extend(rng.sample(about, 2))
        documents = hide(gold, depths, others[:size])
        listed = "\n\n".join(f"Document {at}:\n{each}" for at, each in enumerate(documents, 1))
        return Sample(
            task,
            f"{ASK}\n\nThe following are given documents.\n\n{listed}",
            f"\n\n{ASK}\n\nQuestion: {question}",
            " Answer:",
            (answer,),
            MAX_TOKENS,
        )

    return Recipe(build)
