"""Calibration: after which layer of a model tokens may be dropped, found on tasks and on text.

The head profile says what each head needs, and the policy ``pyramid`` drops tokens between layers
only after the last layer with much need.  How much earlier a model bears it is measured here: with
questions inside the prompt, with questions that come later, and as divergence from what the model
says of running text.  Of each propagated share the earliest layer that costs nothing is found by
bisection; what computes least is written into the profile.  The tasks are none that results are
reported on (``study ruler``, ``study turns``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pyramidinfer.engine import LLM
from pyramidinfer.engine.profiling import progress_bar
from pyramidinfer.lab.quality import divergence
from pyramidinfer.lab.samples import Needle, Subject
from pyramidinfer.policies import Full, Pyramid
from pyramidinfer.policies.profile import Calibrated, Profile
from pyramidinfer.types import Layers, SamplingParams, Score

__all__ = ["Measured", "Task", "calibrate", "plans"]

#: Shares of the text that may go deeper.
SHARES = (0.2, 0.4)
#: A plan is free if it keeps so much of the score, and the divergence rises no further than this.
SCORE, RISE, NOISE = 0.97, 1.25, 0.005
#: Tokens at a prompt's end that go in later where the question comes later: it, and what is around.
LATER = 28


@dataclass(frozen=True)
class Task:
    """What to measure on.

    keep : of the policy meanwhile;  context : tokens of a prompt;  samples : questions, each asked
    inside and later;  passages : of running text.
    """

    subject: Subject
    keep: float = 0.3
    context: int = 1000
    samples: int = 8
    passages: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"--keep {self.keep} must lie between 0 and 1, so that some go")

    def quick(self) -> Task:
        """A third of the work."""
        return replace(self, context=700, samples=4, passages=2)


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
    """How many plans are measured at most on a model whose profile's own start is layer ``own``."""
    return 1 + len(SHARES) * own.bit_length()


def calibrate(llm: LLM, profile: Profile, task: Task, progress: bool | None = None,
              tell: Callable[[str], None] = lambda _: None) -> Profile:  # fmt: skip
    """The profile with what was found; ``tell`` hears how long it will take."""
    runs = _Runs(llm, task)
    base = Pyramid(keep=task.keep, profile=replace(profile, calibrated=None))
    layers = Layers((True,) * llm.engine.adapter.depth, llm.engine.adapter.kv_heads)
    own, most = base.begin(layers), plans(base.begin(layers))
    with progress_bar("which layers need all tokens", most, progress) as advance:
        begun = time.monotonic()
        whole = runs.measure(base)
        seconds = time.monotonic() - begun
        tell(f"{most} settings at most, about {most * seconds / 60:.1f} minutes")
        advance(1)
        if whole.score == 0:
            raise ValueError(
                f"with all tokens computed and keep={task.keep} the model answers none of the "
                f"questions, so nothing can be calibrated on them: give a higher --keep, or a text "
                f"that it knows (--text)"
            )
        best = (whole, own, 1.0)
        for share in SHARES:
            low, high = 0, own  # the earliest free start is in low..high; high stands for none
            for _ in range(own.bit_length()):
                if low < high:
                    middle = (low + high) // 2
                    found = runs.measure(replace(base, start_layer=middle, propagate_ratio=share))
                    if found.is_free(whole):
                        high = middle
                        best = min(best, (found, middle, share), key=lambda each: each[0].computed)
                    else:
                        low = middle + 1
                advance(1)
    found, start, share = best
    return replace(profile, calibrated=Calibrated(
        start, share, task.keep, round(found.score / whole.score, 4), round(found.computed, 4),
        round(found.kl, 5), task.context, 2 * task.samples, task.passages,
    ))  # fmt: skip


class _Runs:
    """The samples, and the full cache's scores of the text."""

    def __init__(self, llm: LLM, task: Task) -> None:
        corpus = task.subject.corpus()
        self.llm = llm
        self.needles = corpus.needles(task.seed, task.samples, task.context)
        passages = corpus.passages(task.seed, task.passages, task.context, 64)
        self.texts = [each.context for each in passages], [each.continuation for each in passages]
        self.full = self._scored(Full())

    def measure(self, policy: Pyramid) -> Measured:
        inside, computed = self._inside(policy)
        kls = [
            divergence(full, mine)
            for full, mine in zip(self.full, self._scored(policy), strict=True)
        ]
        return Measured((inside + self._later(policy)) / 2, float(np.mean(kls)), computed)

    def _inside(self, policy: Pyramid) -> tuple[float, float]:
        params = [_params(needle) for needle in self.needles]
        prompts = [needle.prompt for needle in self.needles]
        found = self.llm.generate(prompts, params, policy=policy)
        right = [needle.is_right(out.text) for needle, out in zip(self.needles, found, strict=True)]
        return float(np.mean(right)), float(np.mean([o.metrics.computed_share for o in found]))

    def _later(self, policy: Pyramid) -> float:
        right = []
        for needle in self.needles:
            with self.llm.prefill(needle.prompt[:-LATER], policy) as cache:
                (out,) = self.llm.generate([needle.prompt[-LATER:]], _params(needle), prefix=cache)
                right.append(needle.is_right(out.text))
        return float(np.mean(right))

    def _scored(self, policy: Pyramid | Full) -> list[Score]:
        return self.llm.score(*self.texts, policy=policy, logits=True)


def _params(needle: Needle) -> SamplingParams:
    return SamplingParams(max_tokens=needle.answer_tokens)
