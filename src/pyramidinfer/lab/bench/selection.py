"""The time of token selection: window scores, ranking, gathering and compaction.

The paper reports no gain of its method at small batch sizes, because selection costs as much as it
saves.  Here, a pass is timed around all work that a full cache does not need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.setting import run_pass
from pyramidinfer.lab.bench.timing import synchronize
from pyramidinfer.types import TokenIds

__all__ = ["measure_selection"]


class Clock:
    """Seconds in the outermost of the entered spans, by name.

    ``extra``: time of the measurement itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.extra, self._inside = device, 0.0, False
        self.seconds: dict[str, float] = dict.fromkeys(("scores", "retain", "evict"), 0.0)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, start = True, self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start
            self._inside = False

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


class TimedBackend:
    """A backend that times its scores; all other work goes to the ``inner`` backend."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.inner, self.clock = inner, clock
        self.window_scores = self._timed(inner.window_scores)
        self.column_sums = self._timed(inner.column_sums)
        self.prefill_scored = inner.prefill_scored and self._scored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            with self.clock.span("scores"):
                return work(*given, **options)

        return timed

    def _scored(self, *given: Any) -> Any:
        """``prefill_scored``, of which only the time above that of ``prefill`` counts."""
        clock, start = self.clock, self.clock.now()
        self.inner.prefill(*given[:6])
        middle = clock.now()
        done = self.inner.prefill_scored(*given)
        clock.seconds["scores"] += clock.now() - middle - (middle - start)
        clock.extra += middle - start
        return done


def measure_selection(engine: Engine, prompts: list[TokenIds], output_len: int) -> dict[str, float]:
    """Seconds of selection in a pass, as shares of its prefill and of its decode time."""
    runner, clock = engine.runner, Clock(engine.runner.device)
    chosen, span = runner.chosen, runner.span
    timed: Any = TimedBackend(chosen.attention, clock)
    runner.chosen, runner.span = replace(chosen, attention=timed), clock.span
    try:
        run = run_pass(engine, prompts, output_len)
    finally:
        runner.chosen, runner.span = chosen, span
    prefill, decode = clock.seconds["scores"] + clock.seconds["retain"], clock.seconds["evict"]
    before = run.prefill_seconds - clock.extra
    after = run.seconds - run.prefill_seconds
    return {
        "prefill_seconds": prefill,
        "prefill_share": prefill / before,
        "decode_seconds": decode,
        "decode_share": decode / after if after > 0 else 0.0,
    }
