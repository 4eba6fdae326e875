"""What steps and guesses took lately, and whether guessing paid."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Literal, NamedTuple

__all__ = ["By", "Gauge", "Load"]

#: Who guesses: the model over what its drafts read, or the text so far.
By = Literal["view", "lookup"]

#: Measurements of a kind that count, and how many must be there.
RECENT, ENOUGH = 7, 2
#: What a guess is taken to cost before that was measured, in steps without any.
COST: dict[By, float] = {"view": 0.5, "lookup": 0.1}
#: Steps after which it is seen whether guessing paid; for how many steps it is left alone at first
#: where it did not, and at most.
WATCHED, REST, LONGEST_REST = 12, 64, 1024


class Load(NamedTuple):
    """Requests that decode in a step, and how much they hold (twice the logarithm, so that steps of
    about the same size are held against each other)."""

    rows: int
    size: int


class Gauge:
    """Seconds by kind of work and by what a step has to do, as medians.

    Costs are told in steps without guesses.  Where guesses did not pay over some steps, whoever
    made them rests, twice as long each time.
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
        """Whether it was measured what such a step takes without guesses."""
        return self._median("plain", load) is not None

    def is_measured(self, load: Load) -> bool:
        """Whether it was measured what the model's guesses cost, made and verified."""
        return all(self._median(kind, load) is not None for kind in ("verify", "view"))

    def verifying(self, load: Load) -> float | None:
        """What verifying one more guess of each request costs; None where that is not known."""
        plain, more = self._median("plain", load), self._median("verify", load)
        return None if plain is None or more is None else more / plain

    def cost(self, by: By, load: Load) -> float:
        """What one more guess of each request costs, made and verified."""
        plain, more = self._median("plain", load), self.verifying(load)
        making = self._median(by, load) if by == "view" else 0.0
        if plain is None or more is None or making is None:
            return COST[by]
        return more + making / plain

    def rests(self, by: By) -> bool:
        """Whether guesses of this kind are left alone in this step; asked once a step."""
        self._rest[by] = max(0, self._rest[by] - 1)
        return self._rest[by] > 0

    def ran(
        self, load: Load, counts: dict[By, list[int]], guessing: float, seconds: float, tokens: int
    ) -> None:
        """A step took ``seconds``, and ``guessing`` before it; it gave so many tokens.

        counts : by who made them, guesses of each request that had any.
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
