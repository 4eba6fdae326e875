"""What is told of a request: its cache, its times, its text."""

from __future__ import annotations

import time

from pyramidinfer.cache import Pool
from pyramidinfer.engine.memory import bytes_of, full_lens
from pyramidinfer.engine.request import Request
from pyramidinfer.models import Adapter
from pyramidinfer.types import KVUsage, RequestMetrics, RequestOutput

__all__ = ["metrics", "output", "usage"]


def usage(pool: Pool, adapter: Adapter, request: Request) -> KVUsage:
    """What the request's cache is now (or was, once it has ended)."""
    if request.kv is not None or request.sequence is None:
        none = (0,) * adapter.depth
        return request.kv or KVUsage(0, ((0,) * adapter.kv_heads,) * adapter.depth, none, 0, 0, 0)
    if request.away is not None:
        return request.away.kv
    table = request.sequence.table
    now = pool.bytes(table)
    peak = max(table.peak_bytes, now + table.extra_bytes)
    kept = tuple(table.lens(layer) for layer in range(adapter.depth))
    full = full_lens(adapter, table.seen_len, [max(heads) for heads in kept])
    whole = bytes_of(pool.layout, adapter, full)
    return KVUsage(table.seen_len, kept, full, now, peak, whole, request.lowered_to)


def metrics(adapter: Adapter, request: Request) -> RequestMetrics:
    """What the request took so far."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - request.arrived

    new = request.computed and request.computed[0]
    computed = sum(request.computed) / adapter.depth
    return RequestMetrics(
        since(request.started), since(request.first_token),
        (request.ended or time.monotonic()) - request.arrived,
        computed, computed / new if new else 0.0,
    )  # fmt: skip


def output(pool: Pool, adapter: Adapter, request: Request) -> RequestOutput:
    """The request's answer so far."""
    text = ""
    if request.detokenizer:
        ended = request.finish_reason is not None
        text = request.detokenizer.text if ended else request.detokenizer.settled
    logprobs = list(request.logprobs) if request.params.logprobs is not None else None
    told = request.prompt_top is not None and (request.prompt_logprobs or request.output)
    return RequestOutput(
        request.id, list(request.prompt), text, list(request.output), request.finish_reason,
        logprobs, metrics(adapter, request), usage(pool, adapter, request),
        [None, *request.prompt_logprobs] if told else None,
    )  # fmt: skip
