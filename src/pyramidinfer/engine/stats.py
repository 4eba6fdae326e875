"""Statistics of an engine, which another thread may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pyramidinfer.engine.drafting import Drafter
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.reuse import Conversations
from pyramidinfer.engine.scheduler import Scheduler

__all__ = ["Stats", "Work", "read_stats"]


@dataclass
class Work:
    """Seconds of all steps so far, and of drafting in them."""

    seconds: float = 0.0
    guessing: float = 0.0

    def add(self, seconds: float, guessing: float = 0.0) -> None:
        """Count a step."""
        self.seconds += seconds
        self.guessing += guessing


class Stats(NamedTuple):
    """The state of the engine at one moment, between two steps.

    ``running``: requests in flight; ``peak_running``: the most so far;  ``pages``: pages of the
    pool; ``pages_in_use``: pages with an owner; ``pages_reusable``: pages of finished
    conversations, which take ``reuse_bytes``;  ``reserved_bytes``: reserved bytes of ``kv_memory``;
    ``swapped_bytes``: host memory of preempted requests, and of lossless ones whose caches are
    there.  ``caches``, ``cache_bytes`` and ``hits_from``: conversations by place.  The other fields
    count events since the start, as in ``scheduler.Counts`` and ``Conversations``;
    ``file_errors``: files that could not be read or written;  ``drafted``, ``accepted``,
    ``verifications``: as in ``DraftUsage``, over all requests; ``step_seconds``,
    ``guessing_seconds``: as in ``Work``;  ``adapters_running``, ``adapters_waiting``: the names of
    the adapters of requests in flight and of waiting requests; ``recompressed``,
    ``recompressed_tokens``: as ``done`` and ``tokens`` of a ``Recompressor``, if one runs while the
    engine is idle.

    ``prefix_queries``: prompt tokens of admitted requests that could have reused a cache;
    ``prefix_hits``: those of them that were reused and not computed again.  Any new way to share
    caches adds its tokens to these two in ``read_stats``.
    """

    running: int
    waiting: int
    preempted: int
    peak_running: int
    pages: int
    pages_in_use: int
    pages_reusable: int
    reuse_bytes: int
    reserved_bytes: int
    swapped_bytes: int
    swapped: int
    recomputed: int
    restarted: int
    resumed: int
    tightened: int
    reuse_hits: int
    reuse_misses: int
    reuse_tokens: int
    reuse_dropped: int
    prefix_queries: int
    prefix_hits: int
    caches: dict[str, int]
    cache_bytes: dict[str, int]
    hits_from: dict[str, int]
    spills: int
    loads: int
    file_errors: int
    drafted: int
    accepted: int
    verifications: int
    step_seconds: float
    guessing_seconds: float
    adapters_running: list[str]
    adapters_waiting: list[str]
    recompressed: int = 0
    recompressed_tokens: float = 0.0


def read_stats(
    scheduler: Scheduler, held: Conversations, drafter: Drafter, work: Work, peak_running: int
) -> Stats:
    """The statistics now; call it in the engine's thread."""
    pool, done, disk = scheduler.pool, scheduler.counts, held.disk
    pages = sum(len(group.counts) for group in pool.groups)
    return Stats(
        running=scheduler.in_flight,
        waiting=len(scheduler.waiting),
        preempted=len(scheduler.preempted),
        peak_running=peak_running,
        pages=pages,
        pages_in_use=pages - sum(len(group.free) for group in pool.groups),
        pages_reusable=held.page_count,
        reuse_bytes=held.cost.bytes,
        reserved_bytes=scheduler.ledger.bytes,
        swapped_bytes=scheduler.host_bytes,
        swapped=done.swapped,
        recomputed=done.recomputed,
        restarted=done.restarted,
        resumed=done.resumed,
        tightened=done.tightened,
        reuse_hits=held.hits,
        reuse_misses=held.misses,
        reuse_tokens=held.reused_tokens,
        reuse_dropped=held.dropped,
        prefix_queries=held.queried_tokens,
        prefix_hits=held.reused_tokens,
        caches={
            "device": held.count,
            "host": len(held.host),
            "disk": len(disk) if disk is not None else 0,
        },
        cache_bytes={
            "device": held.cost.bytes,
            "host": held.host.bytes,
            "disk": disk.bytes if disk is not None else 0,
        },
        hits_from={place: held.hits_from[place] for place in ("device", "host", "disk")},
        spills=held.spills,
        loads=held.loads,
        file_errors=disk.errors if disk is not None else 0,
        drafted=drafter.drafted,
        accepted=drafter.accepted,
        verifications=drafter.verifications,
        step_seconds=work.seconds,
        guessing_seconds=work.guessing,
        adapters_running=_adapters([*scheduler.running, *scheduler.prefilling]),
        adapters_waiting=_adapters([*scheduler.waiting, *scheduler.preempted]),
    )


def _adapters(requests: list[Request]) -> list[str]:
    return sorted({each.adapter.name for each in requests if each.adapter is not None})
