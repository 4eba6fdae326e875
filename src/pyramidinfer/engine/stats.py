"""What an engine holds and has done, in numbers that another thread may read."""

from __future__ import annotations

from typing import NamedTuple

from pyramidinfer.engine.drafting import Drafter
from pyramidinfer.engine.reuse import Conversations
from pyramidinfer.engine.scheduler import Scheduler

__all__ = ["Stats", "read_stats"]


class Stats(NamedTuple):
    """The engine at one moment, between two steps.

    ``running``: requests in flight, ``peak_running`` the most there ever were;  ``pages``: in the
    pool, ``pages_in_use`` those that somebody owns, ``pages_reusable`` those of finished
    conversations, which hold ``reuse_bytes``;  ``reserved_bytes``: of ``kv_memory``;
    ``swapped_bytes``: of host memory, by preempted requests.  ``caches``, ``cache_bytes`` and
    ``hits_from``: conversations by place.  The rest counts events since the start, as
    ``scheduler.Counts`` and ``Conversations`` do; ``file_errors``: files that could not be read or
    written;  ``prefix_queries``: tokens of prompts that might have begun with what is in a cache,
    ``prefix_hits``: those that did;  ``drafted``, ``accepted``, ``verifications``: as in
    ``DraftUsage``, of all requests.
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


def read_stats(
    scheduler: Scheduler, held: Conversations, drafter: Drafter, peak_running: int
) -> Stats:
    """The numbers now; for the engine's own thread."""
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
        prefix_queries=held.asked_tokens,
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
    )
