"""What choosing tokens costs: window scores, ranking, gathering and compaction, on a clock.

The paper says of its own method that it gains nothing at small batch, because this costs what it
saves.  Here a pass is run with clocks around everything that a full cache does without.
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
from pyramidinfer.models.device import Device
from pyramidinfer.types import TokenIds

__all__ = ["measure_selection"]


class Clock:
    """Seconds spent in the outermost of the functions it was put around."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.extra, self._deep = device, 0.0, 0.0, False

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            if self._deep:
                return work(*given, **options)
            self._deep = True
            try:
                done, seconds = self._run(work, *given, **options)
                self.seconds += seconds
                return done
            finally:
                self._deep = False

        return timed

    def beyond(
        self, work: Callable[..., Any], plain: Callable[..., Any], shared: int
    ) -> Callable[..., Any]:
        """Count what ``work`` takes longer than ``plain`` on its first ``shared`` arguments."""

        def timed(*given: Any) -> Any:
            _, without = self._run(plain, *given[:shared])
            done, seconds = self._run(work, *given)
            self.seconds += seconds - without
            self.extra += without
            return done

        return timed

    def _run(self, work: Callable[..., Any], *given: Any, **options: Any) -> tuple[Any, float]:
        synchronize(self.device)
        start = time.perf_counter()
        done = work(*given, **options)
        synchronize(self.device)
        return done, time.perf_counter() - start


class TimedBackend:
    """A backend whose scores are on a clock; everything else is the ``inner`` backend's."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.inner = inner
        self.window_scores = clock.around(inner.window_scores)
        self.column_sums = clock.around(inner.column_sums)
        scored = inner.prefill_scored
        self.prefill_scored = scored and clock.beyond(scored, inner.prefill, shared=6)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def measure_selection(engine: Engine, prompts: list[TokenIds], output_len: int) -> dict[str, float]:
    """Seconds of selection in a pass, as shares of its prefill and of its decoding."""
    prefill, decode = Clock(engine.runner.device), Clock(engine.runner.device)
    with _clocks(engine, prefill, decode):
        run = run_pass(engine, prompts, output_len)
    before = run.prefill_seconds - prefill.extra
    after = run.seconds - run.prefill_seconds
    return {
        "prefill_seconds": prefill.seconds,
        "prefill_share": prefill.seconds / before,
        "decode_seconds": decode.seconds,
        "decode_share": decode.seconds / after if after > 0 else 0.0,
    }


@contextmanager
def _clocks(engine: Engine, prefill: Clock, decode: Clock) -> Iterator[None]:
    runner: Any = engine.runner
    chosen = runner.chosen
    runner.chosen = replace(chosen, attention=TimedBackend(chosen.attention, prefill))
    runner._finish_layer = prefill.around(runner._finish_layer)
    runner._evict = decode.around(_untimed(runner, chosen, runner._evict))
    try:
        yield
    finally:
        runner.chosen = chosen
        del runner._finish_layer, runner._evict


def _untimed(runner: Any, chosen: Device, work: Callable[..., Any]) -> Callable[..., Any]:
    """``work`` with the plain backend: what it asks of it is on its own clock already."""

    def run(*given: Any) -> Any:
        timed, runner.chosen = runner.chosen, chosen
        try:
            return work(*given)
        finally:
            runner.chosen = timed

    return run
