"""Calibration: find the layer after which tokens may be dropped, on tasks and on text.

The head profile says what each head needs, and the policy ``pyramid`` drops tokens between layers
only after the last layer with much need.  Calibration measures how much earlier the model tolerates
drops: with questions inside the prompt, with questions that come later, and by the divergence of
its predictions on running text.  For each propagated share, bisection over the layers without a
sliding window finds the earliest layer without any loss; the plan that computes least is written
into the profile.  Most answers are long (``lab/long_facts.py``), and no kind of question may lose
an answer: short answers survive settings that lose long ones.  The tasks differ from those of
RULER, and the samples differ from those that studies report on.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import eq

import numpy as np

from pyramidinfer.engine import LLM
from pyramidinfer.engine.profiling import progress_bar
from pyramidinfer.lab import documents
from pyramidinfer.lab.chat import Chat
from pyramidinfer.lab.long_facts import KINDS, SHORT, LongFact, invent_long
from pyramidinfer.lab.plans import Task
from pyramidinfer.lab.quality import divergence
from pyramidinfer.lab.recall import ANSWER, AROUND
from pyramidinfer.lab.samples import Corpus
from pyramidinfer.policies import Full, Pyramid
from pyramidinfer.policies.profile import Calibrated, Profile
from pyramidinfer.types import SamplingParams, Score, TokenIds

__all__ = ["INSIDE", "Measured", "Question", "Sample", "Task", "calibrate", "make_samples", "plans"]

#: Shares of the text's tokens that deeper layers may process.
SHARES = (0.2, 0.4)
#: A plan is free if the divergence does not exceed this, and no kind of question loses an answer.
RISE, NOISE = 1.25, 0.005
#: Questions of every text that are also asked inside the prompt; kinds take turns.
INSIDE = 2
#: Tokens that an answer may have in addition to its values, and between two values.
AROUND_VALUE = 8
#: Tokens scored after a passage.
CONTINUATION = 64

#: Number of wrong answers, by kind of question and protocol.
Wrong = Counter[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured under a plan.

    wrong : wrong answers, by kind of question and protocol;  score : share of right answers;
    kl : divergence in nats per token;  computed : share of layer-tokens.
    """

    wrong: Wrong
    score: float
    kl: float
    computed: float

    def is_free(self, whole: Measured) -> bool:
        """Whether the plan is as good as a run without drops between layers: for every kind of
        question and protocol, no more answers are wrong."""
        return self.wrong <= whole.wrong and self.kl <= RISE * whole.kl + NOISE


def plans(own: int) -> int:
    """Upper bound on the number of measured plans, if ``own`` layers before the profile's start may
    be the start."""
    return 1 + len(SHARES) * own.bit_length()


def calibrate(
    llm: LLM,
    profile: Profile,
    task: Task,
    progress: bool | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Profile:
    """The profile with the calibration added; ``tell`` receives an estimate of the duration."""
    base = Pyramid(keep=task.keep, profile=replace(profile, calibrated=None), min_context=1)
    layers = llm.engine.runner.layers_for(task.context + CONTINUATION)
    begin = base.begin(layers)
    starts = [layer for layer in range(begin) if layers.governed[layer]]  # others drop nothing
    own = len(starts)
    most, runs = plans(own), _Runs(llm, task)
    with progress_bar("which layers need all tokens", task.parts * most, progress) as advance:
        begun = time.monotonic()
        whole = runs.measure(base, advance)
        assert whole is not None
        minutes = most * (time.monotonic() - begun) / 60
        tell(f"at most {most} settings, about {minutes:.1f} minutes")
        if not any(kind != SHORT for kind, _ in runs.asked - whole.wrong):
            raise ValueError(
                f"with all tokens computed and keep={task.keep}, the model answers none of the "
                f"questions with long answers, so there is nothing to calibrate on: give a higher "
                f"--keep, or a text that the model knows (--text)"
            )
        best = (whole, min(begin, layers.count - 1), 1.0)
        for share in SHARES:
            low, high = 0, own  # the earliest free start is in low..high; high means none
            for _ in range(own.bit_length()):
                if low == high:
                    advance(task.parts)
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
            task.samples * (len(KINDS) + INSIDE),
            task.passages,
        ),
    )


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A question after the text: its tokens, how its answer is generated, and the check of the
    answer."""

    kind: str
    rest: TokenIds
    params: SamplingParams
    is_right: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """A text with facts in it, and a question about each."""

    context: TokenIds
    questions: tuple[Question, ...]

    def inside(self, at: int) -> list[Question]:
        """The questions that are asked inside the prompt if this is sample ``at``."""
        count = len(self.questions)
        return [self.questions[(INSIDE * at + i) % count] for i in range(INSIDE)]


def make_samples(corpus: Corpus, task: Task) -> list[Sample]:
    """Texts that have, with their longest question, ``task.context`` tokens or a few less."""
    make = _generated if corpus.ids is None else _told
    return [
        make(corpus, random.Random(f"calibrate {task.seed} {index}"), task.context)
        for index in range(task.samples)
    ]


def _told(corpus: Corpus, rng: random.Random, length: int) -> Sample:
    """Invented facts of all kinds, their statements evenly spread over a passage of the text."""
    chat, facts = corpus.chat, invent_long(rng)
    around = [chat.ask("", f"\n\n{fact.question}", f" {fact.opening}") for fact in facts]
    told = [chat.encode(f" {fact.statement}") for fact in rng.sample(facts, len(facts))]
    room = length - max(len(each.whole) for each in around) - sum(map(len, told))
    text = corpus.stretch(rng, room)
    for index in reversed(range(len(told))):
        at = int(room / len(told) * (index + rng.random()))
        text = text[:at] + told[index] + text[at:]
    questions = (
        Question(fact.kind, each.rest, _saying(chat, fact), fact.is_in)
        for each, fact in zip(around, facts, strict=True)
    )
    return Sample(around[0].context + text, tuple(questions))


def _saying(chat: Chat, fact: LongFact) -> SamplingParams:
    """Greedy sampling of as many tokens as the answer has."""
    sizes = [len(chat.encode(f" {value}")) + AROUND_VALUE for value in fact.values]
    return SamplingParams(max_tokens=sum(sizes))


def _generated(corpus: Corpus, rng: random.Random, length: int) -> Sample:
    """A document in the shipped model's language, with facts of one kind only."""
    document = documents.document(rng, length - AROUND, max(len(KINDS), length // 64))
    encode = corpus.tokenizer.convert_tokens_to_ids
    questions = (
        Question(
            "fact",
            encode([*documents.question_words(fact), "<end>", "<assistant>"]),
            ANSWER,
            partial(eq, " ".join(documents.answer_words(fact))),
        )
        for fact in rng.sample(document.facts, len(KINDS))
    )
    return Sample(encode(["<bos>", "<user>", *document.words]), tuple(questions))


class _Runs:
    """The samples, and the full cache's scores of the text."""

    def __init__(self, llm: LLM, task: Task) -> None:
        corpus = task.subject.corpus()
        self.llm, self.task, self.samples = llm, task, make_samples(corpus, task)
        own = random.Random(f"calibrate {task.seed}").getrandbits(32)  # passages that no study uses
        passages = corpus.passages(own, task.passages, task.context, CONTINUATION)
        self.asked = Counter(
            (each.kind, protocol)
            for at, sample in enumerate(self.samples)
            for protocol, asked in (("later", sample.questions), ("inside", sample.inside(at)))
            for each in asked
        )
        self.texts = [each.context for each in passages], [each.continuation for each in passages]
        self.full = self._scored(Full())

    def measure(
        self, policy: Pyramid, advance: Callable[[int], None], whole: Measured | None = None
    ) -> Measured | None:
        """Measure a plan; None as soon as it cannot be free compared with ``whole``."""
        kls = [
            divergence(full, mine)
            for full, mine in zip(self.full, self._scored(policy), strict=True)
        ]
        kl, wrong = float(np.mean(kls)), Wrong()
        shares: list[float] = []
        rounds = [partial(self._later, policy, each) for each in self.samples]
        rounds += [partial(self._inside, policy, shares, at) for at in range(len(self.samples))]
        for done, ask in enumerate(rounds):
            advance(1)
            if whole is not None and not Measured(wrong, 0, kl, 1).is_free(whole):
                advance(self.task.parts - 1 - done)
                return None
            wrong += ask()
        advance(1)
        score = 1 - wrong.total() / (self.task.samples * (len(KINDS) + INSIDE))
        return Measured(wrong, score, kl, float(np.mean(shares)))

    def _later(self, policy: Pyramid, sample: Sample) -> Wrong:
        """Kinds with wrong answers, if all questions continue on a text's compressed cache."""
        asked = sample.questions
        with self.llm.prefill(sample.context, policy) as cache:
            rests = [each.rest for each in asked]
            found = self.llm.generate(rests, [each.params for each in asked], prefix=cache)
        return _wrong("later", asked, [each.text for each in found])

    def _inside(self, policy: Pyramid, shares: list[float], at: int) -> Wrong:
        """The same with the question inside the prompt; ``shares`` receives the computed shares."""
        sample = self.samples[at]
        asked = sample.inside(at)
        prompts = [sample.context + each.rest for each in asked]
        found = self.llm.generate(prompts, [each.params for each in asked], policy=policy)
        shares += [each.metrics.computed_share for each in found]
        return _wrong("inside", asked, [each.text for each in found])

    def _scored(self, policy: Pyramid | Full) -> list[Score]:
        return self.llm.score(*self.texts, policy=policy, logits=True)


def _wrong(protocol: str, asked: Sequence[Question], said: list[str]) -> Wrong:
    return Counter(
        (each.kind, protocol)
        for each, text in zip(asked, said, strict=True)
        if not each.is_right(text.strip())
    )
