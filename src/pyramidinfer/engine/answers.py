"""The output of a request: its cache, its times, its text."""

from __future__ import annotations

import time

from pyramidinfer.cache import Pool
from pyramidinfer.engine.memory import full_lens, uncoded_bytes
from pyramidinfer.engine.request import Drafting, Request
from pyramidinfer.models import ModelRunner
from pyramidinfer.types import DraftUsage, KVUsage, RequestMetrics, RequestOutput

__all__ = ["drafts", "metrics", "output", "usage"]


def usage(pool: Pool, runner: ModelRunner, request: Request) -> KVUsage:
    """The request's cache now, or at its end."""
    if request.kv is not None or (request.cache is None and request.preempted is None):
        none = (0,) * runner.depth
        return request.kv or KVUsage(0, ((0,) * runner.kv_heads,) * runner.depth, none, 0, 0, 0)
    if request.preempted is not None:
        return request.preempted.kv
    table = request.table
    now = pool.bytes(table)
    peak = max(table.peak_bytes, now + table.extra_bytes)
    kept = tuple(map(tuple, table.entries.tolist()))
    host = 0 if table.away is None else table.away.bytes
    full = full_lens(runner, table.seen_len, [max(heads) for heads in kept])
    whole = uncoded_bytes(pool.layout, runner, full)
    return KVUsage(table.seen_len, kept, full, now, peak, whole, request.lowered_to, host)


def drafts(request: Request) -> DraftUsage | None:
    """Statistics of the request's drafts so far; None if it is not lossless."""
    if not request.policy.guesses:
        return None
    done = request.drafting or Drafting()
    return DraftUsage(done.drafted, done.accepted, done.verifications)


def metrics(runner: ModelRunner, request: Request) -> RequestMetrics:
    """The request's times and work so far."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - request.times.arrived

    new = request.computed and request.computed[0]
    computed = sum(request.computed) / runner.depth
    return RequestMetrics(
        since(request.times.started),
        since(request.times.first_token),
        (request.times.ended or time.monotonic()) - request.times.arrived,
        computed,
        computed / new if new else 0.0,
        drafts(request),
    )


def output(pool: Pool, runner: ModelRunner, request: Request) -> RequestOutput:
    """The request's answer so far."""
    text = ""
    if request.detokenizer:
        text = request.detokenizer.text if request.ended else request.detokenizer.stable
    logprobs = list(request.logprobs) if request.params.logprobs is not None else None
    told = request.prompt_top is not None and (request.prompt_logprobs or request.output)
    return RequestOutput(
        request.id,
        list(request.prompt),
        text,
        list(request.output),
        request.finish_reason,
        logprobs,
        metrics(runner, request),
        usage(pool, runner, request),
        [None, *request.prompt_logprobs] if told else None,
    )
