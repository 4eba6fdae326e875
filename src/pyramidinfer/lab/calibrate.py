"""Calibration: after which layer of a model tokens may be dropped, found on tasks and on text.

The head profile says what each head needs, and the policy ``pyramid`` drops tokens between layers
only after the last layer with much need.  How much earlier a model bears it is measured here: with
questions inside the prompt, with questions that come later, and as divergence from what the model
says of running text.  Of each propagated share the earliest layer that costs nothing is found by
bisection over the layers without a sliding window; what computes least is written into the profile.
The tasks are none of RULER's, and the samples are none that a study reports on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import eq

import numpy as np

from pyramidinfer.engine import LLM
from pyramidinfer.engine.profiling import progress_bar
from pyramidinfer.lab import documents
from pyramidinfer.lab.asked import SENTENCE
from pyramidinfer.lab.invented import invent
from pyramidinfer.lab.quality import divergence
from pyramidinfer.lab.recall import ANSWER, AROUND
from pyramidinfer.lab.samples import Corpus, Subject
from pyramidinfer.policies import Full, Pyramid
from pyramidinfer.policies.profile import Calibrated, Profile
from pyramidinfer.types import SamplingParams, Score, TokenIds

__all__ = ["FACTS", "Measured", "Question", "Sample", "Task", "calibrate", "make_samples", "plans"]

#: Shares of the text that may go deeper.
SHARES = (0.2, 0.4)
#: A plan is free if it keeps so much of the score, and the divergence rises no further than this.
SCORE, RISE, NOISE = 0.97, 1.25, 0.005
#: Facts in every text: one is asked for in the prompt, all of them later.
FACTS = 5
#: Steps of the bar for every plan: text, questions inside, questions later.
PARTS = 3
#: Tokens scored after a passage.
CONTINUATION = 64


@dataclass(frozen=True)
class Task:
    """What to measure on.

    keep : of the policy meanwhile;  context : tokens of a prompt;  samples : texts with facts in
    them;  passages : of running text.
    """

    subject: Subject
    keep: float = 0.3
    context: int = 1000
    samples: int = 6
    passages: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"--keep {self.keep} must lie between 0 and 1, so that some go")

    def quick(self) -> Task:
        """A third of the work."""
        return replace(self, context=700, samples=3, passages=2)

    @property
    def questions(self) -> int:
        return self.samples * (1 + FACTS)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a plan was found to do: the mean score of both protocols, nats a token, layer-tokens."""

    score: float
    kl: float
    computed: float

    def is_free(self, whole: Measured) -> bool:
        """Whether it is no worse than with nothing dropped between layers before."""
        return self.score >= SCORE * whole.score and self.kl <= RISE * whole.kl + NOISE


def plans(own: int) -> int:
    """How many plans are measured at most where ``own`` layers that may be a start lie before the
    profile's own."""
    return 1 + len(SHARES) * own.bit_length()


def calibrate(
    llm: LLM,
    profile: Profile,
    task: Task,
    progress: bool | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Profile:
    """The profile with what was found; ``tell`` hears how long it will take."""
    base = Pyramid(keep=task.keep, profile=replace(profile, calibrated=None), min_context=1)
    layers = llm.engine.runner.layers_for(task.context + CONTINUATION)
    begin = base.begin(layers)
    starts = [layer for layer in range(begin) if layers.governed[layer]]  # others drop nothing
    own = len(starts)
    most, runs = plans(own), _Runs(llm, task)
    with progress_bar("which layers need all tokens", PARTS * most, progress) as advance:
        begun = time.monotonic()
        whole = runs.measure(base, advance)
        assert whole is not None
        minutes = most * (time.monotonic() - begun) / 60
        tell(f"{most} settings at most, about {minutes:.1f} minutes")
        if whole.score == 0:
            raise ValueError(
                f"with all tokens computed and keep={task.keep} the model answers none of the "
                f"questions, so nothing can be calibrated on them: give a higher --keep, or a text "
                f"that it knows (--text)"
            )
        best = (whole, min(begin, layers.count - 1), 1.0)
        for share in SHARES:
            low, high = 0, own  # the earliest free start is in low..high; high stands for none
            for _ in range(own.bit_length()):
                if low == high:
                    advance(PARTS)
                    continue
                middle = (low + high) // 2
                plan = replace(base, start_layer=starts[middle], propagate_ratio=share)
                found = runs.measure(plan, advance, whole)
                if found is not None and found.is_free(whole):
                    high = middle
                    best = min(
                        best, (found, starts[middle], share), key=lambda each: each[0].computed
                    )
                else:
                    low = middle + 1
    found, start, share = best
    return replace(
        profile,
        calibrated=Calibrated(
            start,
            share,
            task.keep,
            round(found.score / whole.score, 4),
            round(found.computed, 4),
            round(found.kl, 5),
            task.context,
            task.questions,
            task.passages,
        ),
    )


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """What follows the text, how the answer is generated, and whether it is right."""

    rest: TokenIds
    params: SamplingParams
    is_right: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """A text with facts in it, and a question about each."""

    context: TokenIds
    questions: tuple[Question, ...]


def make_samples(corpus: Corpus, task: Task) -> list[Sample]:
    """Texts that are with their longest question ``task.context`` tokens long, or a few less."""
    make = _generated if corpus.ids is None else _told
    return [
        make(corpus, random.Random(f"calibrate {task.seed} {index}"), task.context)
        for index in range(task.samples)
    ]


def _told(corpus: Corpus, rng: random.Random, length: int) -> Sample:
    """Invented facts of five kinds, one in every fifth of a stretch of the text."""
    chat, facts = corpus.chat, invent(rng, FACTS)
    around = [chat.ask("", f"\n\n{fact.question}", f" {fact.opening}") for fact in facts]
    told = [chat.encode(f" {fact.statement}") for fact in rng.sample(facts, FACTS)]
    room = length - max(len(each.whole) for each in around) - sum(map(len, told))
    text = corpus.stretch(rng, room)
    for index in reversed(range(FACTS)):
        at = int(room / FACTS * (index + rng.random()))
        text = text[:at] + told[index] + text[at:]
    questions = (
        Question(each.rest, SENTENCE, fact.is_in) for each, fact in zip(around, facts, strict=True)
    )
    return Sample(around[0].context + text, tuple(questions))


def _generated(corpus: Corpus, rng: random.Random, length: int) -> Sample:
    """A document in the shipped model's language."""
    document = documents.document(rng, length - AROUND, max(FACTS, length // 64))
    encode = corpus.tokenizer.convert_tokens_to_ids
    questions = (
        Question(
            encode([*documents.question_words(fact), "<end>", "<assistant>"]),
            ANSWER,
            partial(eq, " ".join(documents.answer_words(fact))),
        )
        for fact in rng.sample(document.facts, FACTS)
    )
    return Sample(encode(["<bos>", "<user>", *document.words]), tuple(questions))


class _Runs:
    """The samples, and the full cache's scores of the text."""

    def __init__(self, llm: LLM, task: Task) -> None:
        corpus = task.subject.corpus()
        self.llm, self.samples = llm, make_samples(corpus, task)
        own = random.Random(f"calibrate {task.seed}").getrandbits(32)  # no study's passages
        passages = corpus.passages(own, task.passages, task.context, CONTINUATION)
        self.texts = [each.context for each in passages], [each.continuation for each in passages]
        self.full = self._scored(Full())

    def measure(
        self, policy: Pyramid, advance: Callable[[int], None], whole: Measured | None = None
    ) -> Measured | None:
        """What a plan does; None once it cannot be free beside ``whole`` whatever is still left."""
        kls = [
            divergence(full, mine)
            for full, mine in zip(self.full, self._scored(policy), strict=True)
        ]
        kl = float(np.mean(kls))
        advance(1)
        if whole is not None and not Measured(1, kl, 1).is_free(whole):
            advance(PARTS - 1)
            return None
        inside, computed = self._inside(policy)
        advance(1)
        if whole is not None and not Measured((inside + 1) / 2, kl, 1).is_free(whole):
            advance(PARTS - 2)
            return None
        later = self._later(policy)
        advance(1)
        return Measured((inside + later) / 2, kl, computed)

    def _inside(self, policy: Pyramid) -> tuple[float, float]:
        """Of every text another fact is asked for, kinds in turn."""
        asked = [each.questions[at % FACTS] for at, each in enumerate(self.samples)]
        prompts = [each.context + q.rest for each, q in zip(self.samples, asked, strict=True)]
        found = self.llm.generate(prompts, [q.params for q in asked], policy=policy)
        right = [q.is_right(out.text.strip()) for q, out in zip(asked, found, strict=True)]
        return float(np.mean(right)), float(np.mean([o.metrics.computed_share for o in found]))

    def _later(self, policy: Pyramid) -> float:
        """Every text is taken in once, and all questions go on from what is left of it."""
        right: list[bool] = []
        for each in self.samples:
            params = [q.params for q in each.questions]
            with self.llm.prefill(each.context, policy) as cache:
                found = self.llm.generate([q.rest for q in each.questions], params, prefix=cache)
            right += [
                q.is_right(out.text.strip()) for q, out in zip(each.questions, found, strict=True)
            ]
        return float(np.mean(right))

    def _scored(self, policy: Pyramid | Full) -> list[Score]:
        return self.llm.score(*self.texts, policy=policy, logits=True)
