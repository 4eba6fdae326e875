"""Recent times of steps and drafts, and how much time drafting may lose while it is tried."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Literal, NamedTuple

__all__ = ["By", "Gauge", "Kind", "Load", "memory_bound"]

#: The drafter: the model over its draft view, or prompt lookup.
By = Literal["view", "lookup"]
#: Kinds of work: a plain step (without drafts), verifying one more token per request, and drafting
#: one more token with the model.
Kind = Literal["plain", "verify", "view"]

#: The number of recent measurements of each kind that count, and the minimum number needed.
RECENT, ENOUGH = 7, 2
#: Share of the time that each drafter may lose in trials.
LOSS = 0.0075
#: In plain steps: how far a drafter that seems to pay may overdraw its account, and the largest
#: balance of an account.
ADVANCE, SAVED = 2.0, 0.5


class Load(NamedTuple):
    """The number of requests that decode in a step, and the size of their caches (twice the base-2
    logarithm of the entries, so that steps of about the same size are compared)."""

    rows: int
    size: int

    def distance(self, other: Load) -> int:
        """How much two loads differ."""
        return abs(self.rows - other.rows) + abs(self.size - other.size)


def memory_bound(cache: float, read: float, group: int, on_gpu: bool) -> dict[Kind, float]:
    """The expected costs of drafts in plain steps, used until they are measured.

    cache : bytes of the caches divided by bytes of the weights;  read : share of the cache that
    drafts read;  group : query heads per KV head.  A step takes the time to read memory.  On a
    CPU, arithmetic for another row takes time too: little for the weights; for the cache, it grows
    with the number of query heads that read an entry.
    """
    share = cache / (1 + cache)
    verify = 0.05 if on_gpu else 0.15 * (1 - share) + 0.25 * min(group, 3) * share
    return {"plain": 1.0, "verify": verify, "view": 1 - share + read * share}


class Gauge:
    """Median seconds by kind of work and load, and an account of the time that drafts lost.

    Costs are in plain steps.  A load that was not measured has the costs of the most similar
    measured load, or ``expected`` ones if there is none.

    Every measured step adds ``LOSS`` to a drafter's account, and a step with drafts adds what it
    gained or lost.  A drafter that seems to pay may overdraw its account by ``ADVANCE``; any other
    drafter is tried only when its account covers the expected loss.
    """

    def __init__(self, expected: Callable[[Load], dict[Kind, float]]) -> None:
        self._expected = expected
        self._seconds: dict[tuple[Kind, Load], deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT)
        )
        self._account: dict[By, float] = {"view": 0.0, "lookup": 0.0}

    def _median(self, kind: Kind, load: Load) -> float | None:
        measured = self._seconds.get((kind, load), ())
        return statistics.median(measured) if len(measured) >= ENOUGH else None

    def _cost(self, kind: Kind, load: Load) -> float:
        known = [
            (load.distance(other), other)
            for name, other in self._seconds
            if name == kind and self._median(kind, other) and self._median("plain", other)
        ]
        if not known:
            return self._expected(load)[kind]
        other = min(known)[1]
        return (self._median(kind, other) or 0.0) / (self._median("plain", other) or 1.0)

    def is_known(self, load: Load) -> bool:
        """Whether the time of a plain step with this load is known."""
        return self._median("plain", load) is not None

    def verifying(self, load: Load) -> float:
        """The cost of verifying one more drafted token per request."""
        return self._cost("verify", load)

    def cost(self, by: By, load: Load) -> float:
        """The cost of drafting and verifying one more token per request."""
        return self.verifying(load) + (self._cost("view", load) if by == "view" else 0.0)

    def covers(self, by: By, loss: float | None = None) -> bool:
        """Whether a drafter may be used in a step that is expected to lose this many plain steps
        (None: to gain)."""
        if loss is None:
            return self._account[by] > -ADVANCE
        return self._account[by] >= min(loss, SAVED)

    def begin(self) -> None:
        """Count a measured step in which drafts are possible."""
        for by, saved in self._account.items():
            self._account[by] = min(SAVED, saved + LOSS)

    def ran(
        self, load: Load, counts: dict[By, list[int]], guessing: float, seconds: float, tokens: int
    ) -> None:
        """Record a step of ``seconds``, after ``guessing`` seconds of drafting, that gave
        ``tokens`` tokens.

        counts : by drafter, the number of drafted tokens of each request that had any.
        """
        guessed = sum(map(sum, counts.values()))
        if not guessed:
            self._seconds["plain", load].append(seconds)
            return
        if (plain := self._median("plain", load)) is None:
            return
        self._seconds["verify", load].append(max(0.0, seconds - plain) * load.rows / guessed)
        by: By = "view" if counts["view"] else "lookup"
        if by == "view":
            self._seconds["view", load].append(guessing / max(counts["view"]))
        gained = tokens / load.rows - (guessing + seconds) / plain
        self._account[by] = min(SAVED, self._account[by] + gained)
