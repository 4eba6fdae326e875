"""The checks of ``verify``: the results of the full cache, and the share that a policy retains.

A check takes samples in rounds, as many as the time allows, and is evaluated at the end.  Every
sample is run with both the full cache and the policy.  Retrieval is in ``retrieval.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import stats

from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.long import (
    first_difference,
    long_prompts,
    losses_under_full,
    measure_long,
    repetition,
)
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.ruler.grid import SCREEN
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.text import CONTINUATION, loss, measure_text
from pyramidinfer.lab.turns import in_groups, make_talks
from pyramidinfer.policies import Full, Policy

__all__ = ["LONG", "Bench", "Check", "Kind", "LongAnswers", "Pairs", "Text", "Turns", "jeffreys"]

LONG = 128  # tokens of a long answer


@dataclass(frozen=True, slots=True)
class Check:
    """One check: ``full`` and ``mine`` in words, and the retained share with its 95 % interval
    (None: the full cache fails here, so the check does not count).

    kv_share, computed_share : bytes and layer-tokens as shares of the full cache's, if measured.
    """

    name: str
    full: str
    mine: str
    share: float | None
    low: float = 0.0
    high: float = 1.0
    samples: int = 0
    kv_share: float | None = None
    computed_share: float | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """The setup that all checks share: a model under a policy, with a prompt length.

    machine : the engine of the full cache, in the model's own dtype.
    """

    machine: Asker
    subject: Subject
    policy: Policy
    length: int

    @property
    def own(self) -> Asker:
        """The engine of the policy; the subject sets how it stores cache and weights."""
        return self.machine if self.subject == self.subject.plain else asker(self.subject)


class Kind(Protocol):
    """Takes samples and turns them into checks; ``telling`` is the progress message."""

    telling: str

    def more(self, seed: int, count: int) -> None: ...

    def checks(self) -> list[Check]: ...


def jeffreys(shares: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of shares between 0 and 1, with Jeffreys' prior.  Unlike a
    bootstrap interval, it has a width even if all samples are equal."""
    total, count = math.fsum(shares), len(shares)
    low, high = stats.beta.ppf((0.025, 0.975), total + 0.5, count - total + 0.5)
    return (0.0 if total == 0 else float(low)), (1.0 if total == count else float(high))


@dataclass
class Pairs:
    """Paired samples of one check so far."""

    full: list[float] = field(default_factory=list)
    mine: list[float] = field(default_factory=list)
    kv: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """The samples of several checks together."""
        names = ("full", "mine", "kv", "computed")
        return cls(*([v for part in parts for v in getattr(part, name)] for name in names))

    def of_scores(self, name: str, note: str = "") -> Check:
        """The share of the full cache's right answers that the policy also gets right."""
        if np.mean(self.full) < SCREEN:
            return Check(name, f"{np.mean(self.full):.2f}", "–", None)
        shares = [min(1.0, m / t) for m, t in zip(self.mine, self.full, strict=True) if t > 0]
        return Check(
            name,
            f"{np.mean(self.full):.2f}{note}",
            f"{np.mean(self.mine):.2f}",
            float(np.mean(shares)),
            *jeffreys(shares),
            len(shares),
            *self._means(),
        )

    def of_losses(self, name: str, full: str = "", mine: str = "") -> Check:
        """The full cache's perplexity over the policy's, at most 1."""
        gained = [t - m for t, m in zip(self.full, self.mine, strict=True)]
        share, low, high = (
            min(1.0, math.exp(each)) for each in (float(np.mean(gained)), *interval(gained))
        )
        return Check(
            name,
            f"perplexity {math.exp(np.mean(self.full)):.2f}{full}",
            f"{math.exp(np.mean(self.mine)):.2f}{mine}",
            share,
            low,
            high,
            len(gained),
            *self._means(),
        )

    def _means(self) -> tuple[float | None, float | None]:
        return (
            float(np.mean(self.kv)) if self.kv else None,
            float(np.mean(self.computed)) if self.computed else None,
        )


class Turns:
    """Facts given in a chat's first turn and asked for in later turns, on the same cache."""

    telling = "turns of a chat"

    def __init__(self, bench: Bench) -> None:
        self.bench, self.pairs = bench, Pairs()

    def more(self, seed: int, count: int) -> None:
        machine, own, policy = self.bench.machine, self.bench.own, self.bench.policy
        if self.pairs.full and np.mean(self.pairs.full) < SCREEN:
            return
        talks = make_talks(machine, seed, count + 1, self.bench.length)
        full, mine = (
            in_groups(each, way, talks) for each, way in ((machine, Full()), (own, policy))
        )
        self.pairs.full += [score for run in full for score in run.scores]
        self.pairs.mine += [score for run in mine for score in run.scores]
        self.pairs.kv += [run.kv_shares[-1] for run in mine]

    def checks(self) -> list[Check]:
        return [self.pairs.of_scores(self.telling)]


class Text:
    """How well text is predicted on the compressed cache of the text before it."""

    telling = "text"

    def __init__(self, bench: Bench) -> None:
        self.bench, self.pairs = bench, Pairs()

    def more(self, seed: int, count: int) -> None:
        machine, own, policy = self.bench.machine, self.bench.own, self.bench.policy
        passages = self.bench.subject.corpus().passages(
            seed, count, self.bench.length, CONTINUATION
        )
        full, mine = (
            measure_text(each, way, passages) for each, way in ((machine, Full()), (own, policy))
        )
        self.pairs.full += [loss(each) for each in full]
        self.pairs.mine += [loss(each) for each in mine]
        self.pairs.kv += [each.kv.bytes / each.kv.full_bytes for each in mine]
        self.pairs.computed += [each.metrics.computed_share for each in mine]

    def checks(self) -> list[Check]:
        return [self.pairs.of_losses(self.telling)]


class LongAnswers:
    """Long answers, scored by their likelihood under the model with its full cache."""

    telling = f"{LONG} tokens generated"

    def __init__(self, bench: Bench) -> None:
        self.bench, self.pairs = bench, Pairs()
        self.same: list[int] = []
        self.repeated: tuple[list[float], list[float]] = [], []

    def more(self, seed: int, count: int) -> None:
        machine, own, policy = self.bench.machine, self.bench.own, self.bench.policy
        prompts = long_prompts(machine, self.bench.subject, seed, count, self.bench.length)
        full, mine = (
            measure_long(each, way, prompts, LONG)
            for each, way in ((machine, Full()), (own, policy))
        )
        self.pairs.full += losses_under_full(machine, prompts, full)
        self.pairs.mine += losses_under_full(machine, prompts, mine)
        self.pairs.kv += [run.kv_share for run in mine]
        self.same += [
            first_difference(a.token_ids, b.token_ids) for a, b in zip(mine, full, strict=True)
        ]
        for found, runs in zip(self.repeated, (full, mine), strict=True):
            found += [repetition(run.token_ids) for run in runs]

    def checks(self) -> list[Check]:
        full, mine = (float(np.mean(each)) for each in self.repeated)
        return [
            self.pairs.of_losses(
                self.telling,
                f", {full:.0%} repeated",
                f", {mine:.0%}; first {np.mean(self.same):.0f} tokens identical",
            )
        ]
