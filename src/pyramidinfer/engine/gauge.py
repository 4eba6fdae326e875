"""Recent times of steps and drafts, and whether drafting paid off."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Literal, NamedTuple

__all__ = ["By", "Gauge", "Load"]

#: The drafter: the model over its draft view, or prompt lookup.
By = Literal["view", "lookup"]

#: The number of recent measurements of each kind that count, and the minimum number needed.
RECENT, ENOUGH = 7, 2
#: Assumed cost of a drafted token before it is measured, in plain steps (without drafts).
COST: dict[By, float] = {"view": 0.5, "lookup": 0.1}
#: Number of drafted steps after which drafting is judged; if it did not pay off, for how many steps
#: the drafter pauses the first time, and at most.
WATCHED, REST, LONGEST_REST = 12, 64, 1024


class Load(NamedTuple):
    """The number of requests that decode in a step, and the size of their caches (twice the base-2
    logarithm of the entries, so that steps of about the same size are compared)."""

    rows: int
    size: int


class Gauge:
    """Median seconds by kind of work and load.

    Costs are measured in plain steps (without drafts).  A drafter that did not pay off over some
    steps pauses, each time for twice as long.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Load], deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT)
        )
        self._paid: dict[By, list[tuple[float, float]]] = {"view": [], "lookup": []}
        self._rest: dict[By, int] = {"view": 0, "lookup": 0}
        self._next_rest: dict[By, int] = {"view": REST, "lookup": REST}

    def _median(self, kind: str, load: Load) -> float | None:
        measured = self._seconds[kind, load]
        return statistics.median(measured) if len(measured) >= ENOUGH else None

    def is_known(self, load: Load) -> bool:
        """Whether the time of a plain step with this load is known."""
        return self._median("plain", load) is not None

    def is_measured(self, load: Load) -> bool:
        """Whether the cost of the model's drafts (drafting and verifying) is known."""
        return all(self._median(kind, load) is not None for kind in ("verify", "view"))

    def verifying(self, load: Load) -> float | None:
        """The cost of verifying one more drafted token per request; None if unknown."""
        plain, more = self._median("plain", load), self._median("verify", load)
        return None if plain is None or more is None else more / plain

    def cost(self, by: By, load: Load) -> float:
        """The cost of drafting and verifying one more token per request."""
        plain, more = self._median("plain", load), self.verifying(load)
        making = self._median(by, load) if by == "view" else 0.0
        if plain is None or more is None or making is None:
            return COST[by]
        return more + making / plain

    def rests(self, by: By) -> bool:
        """Whether this drafter pauses in this step; call it once per step."""
        self._rest[by] = max(0, self._rest[by] - 1)
        return self._rest[by] > 0

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
        paid = self._paid[by]
        paid.append((tokens / load.rows, (guessing + seconds) / plain))
        if len(paid) < WATCHED:
            return
        gained, spent = map(sum, zip(*paid, strict=True))
        paid.clear()
        if gained >= spent:
            self._next_rest[by] = REST
            return
        self._rest[by] = self._next_rest[by]
        self._next_rest[by] = min(LONGEST_REST, 2 * self._next_rest[by])
