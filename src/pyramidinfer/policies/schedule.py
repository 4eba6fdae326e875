"""A calibrated schedule: how much each layer of one model suffers from losing entries.

``pyramidinfer calibrate`` measures it and writes it as JSON; ``Pyramid`` turns it into a start
layer, a propagated share and per-layer budgets for any ``keep``.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from pyramidinfer.config import is_number

__all__ = ["FILE_NAME", "HEADS", "Schedule", "allocate"]

#: A schedule of this name in a model's folder belongs to that model.
FILE_NAME = "pyramid_schedule.json"

#: How the weights of heads and queries become one score.
HEADS = ("max", "mean")


@dataclass(frozen=True, repr=False)
class Schedule:
    """What calibration found, and the budgets it chose.

    start_layer : the first layer after which tokens may be dropped; the last layer for none.
    propagate : share of the prompt that goes deeper than ``start_layer``.
    shares : the shares of a layer's cache that were tried, ascending, the last one is 1.
    loss : ``[layers][shares]`` what holding one layer to a share costs (KL of the next-token
        distributions against the full cache, nats per token).
    heads, kernel : the scores that lost least: ``"max"`` or ``"mean"`` over heads and queries,
        max-pooled over so many neighbours.
    keep : mean over layers of the budgets chosen for the target.
    kl : measured divergence of the whole schedule at ``keep``.
    """

    start_layer: int
    propagate: float
    shares: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    heads: str
    kernel: int
    keep: float
    kl: float

    def __repr__(self) -> str:
        return (
            f"Schedule({self.layers} layers, start {self.start_layer}, propagate "
            f"{self.propagate:g}, keep {self.keep:g} at KL {self.kl:.2g})"
        )

    @property
    def layers(self) -> int:
        return len(self.loss)

    def budgets(self, keep: float, caps: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """Share of the text that each layer keeps, ``keep`` in the mean, at the least loss.

        caps : the most each layer can hold; None is what the schedule itself lets through.
        """
        return _budgets(self, keep, caps)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write it as JSON, with what it was made from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        budgets = [round(share, 4) for share in self.budgets(self.keep)]
        body = {"schedule": asdict(self), "budgets": budgets, "about": about}
        path.write_text(json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule; ``ValueError`` where the file holds none."""
        try:
            found = json.loads(Path(path).read_text())["schedule"]
            schedule = cls(
                found["start_layer"], found["propagate"], tuple(found["shares"]),
                tuple(tuple(row) for row in found["loss"]), found["heads"], found["kernel"],
                found["keep"], found["kl"],
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"schedule {str(path)!r} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is no schedule ({error!r}); make one with pyramidinfer calibrate"
            ) from None
        schedule._check(str(path))
        return schedule

    def _check(self, path: str) -> None:
        numbers = [self.propagate, self.keep, self.kl, *self.shares]
        numbers += [value for row in self.loss for value in row]
        if not (
            self.shares
            and all(is_number(value) and math.isfinite(value) for value in numbers)
            and self.shares[0] > 0
            and all(low < high for low, high in pairwise(self.shares))
            and self.shares[-1] == 1
            and 0 < self.keep <= 1
            and self.loss
            and all(len(row) == len(self.shares) for row in self.loss)
            and type(self.start_layer) is int
            and 0 <= self.start_layer < len(self.loss)
            and 0 < self.propagate <= 1
            and self.heads in HEADS
            and type(self.kernel) is int
            and self.kernel >= 1
            and self.kernel % 2 == 1
        ):
            raise ValueError(f"{path!r} is a damaged schedule; make it again")


@lru_cache(maxsize=256)
def _budgets(schedule: Schedule, keep: float, caps: tuple[float, ...] | None
             ) -> tuple[float, ...]:  # fmt: skip
    own = [
        1.0 if layer <= schedule.start_layer else schedule.propagate
        for layer in range(schedule.layers)
    ]
    return tuple(allocate(schedule.shares, schedule.loss, keep, list(caps or own)))


def allocate(shares: tuple[float, ...], loss: tuple[tuple[float, ...], ...], keep: float,
             caps: list[float]) -> list[float]:  # fmt: skip
    """Shares per layer, ``keep`` in the mean, that cost least if losses add up.

    Every layer begins at the smallest share; then whichever step down some layer's loss curve
    (its lower convex hull) saves most per entry is taken, until the mean is reached; the last
    step is taken in part.  ``caps``: the most each layer can hold; where all are full the mean
    stays below ``keep``.
    """
    held = [min(shares[0], cap) for cap in caps]
    steps = []
    for layer, (row, cap) in enumerate(zip(loss, caps, strict=True)):
        for (low, before), (high, after) in _hull_steps(shares, row):
            if low < cap:
                gain = (before - after) / (high - low)
                steps.append((-gain, high, layer, min(high, cap) - low))
    steps.sort()  # along one hull gains only fall; where nothing is gained, level up
    left = keep * len(caps) - sum(held)
    if left <= 0:  # less than the smallest share everywhere
        return [keep * len(caps) * share / sum(held) for share in held]
    for _, _, layer, width in steps:
        taken = min(width, left)
        held[layer] += taken
        left -= taken
        if left <= 0:
            break
    return held


def _hull_steps(shares: tuple[float, ...], row: tuple[float, ...]
                ) -> list[tuple[tuple[float, float], tuple[float, float]]]:  # fmt: skip
    """Edges of the lower convex hull of a loss curve that never rises."""
    falling = list(accumulate(row, min))
    hull: list[tuple[float, float]] = []
    for point in zip(shares, falling, strict=True):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return list(pairwise(hull))
