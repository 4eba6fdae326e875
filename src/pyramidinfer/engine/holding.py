"""Held requests: continuing on a cache, and removing the end of it."""

from __future__ import annotations

from pyramidinfer.cache import Pool
from pyramidinfer.engine.checks import check_count, check_stream, check_tokens
from pyramidinfer.engine.making import Maker, Spans
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["check_held", "check_holds", "copy_held", "next_turn", "truncate"]


def copy_held(pool: Pool, turn: Request) -> None:
    """Give a request that is about to be queued its copy of the cache that it continues on."""
    check_held(turn)
    held, turn.onto = turn.onto, None
    if held is not None:
        turn.take(pool.fork(held.table), held)


def check_held(turn: Request) -> None:
    """``ValueError`` if the cache that it continues on is gone."""
    held = turn.onto
    if held is not None and held.cache is None:
        raise ValueError(f"request {held.id} no longer holds its cache, so none can continue it")


def next_turn(
    maker: Maker,
    request: Request,
    tokens: TokenIds,
    params: SamplingParams,
    protect: Spans,
    hold: bool,
) -> Request:
    """A checked request that continues on a held request; it has no cache yet."""
    check_holds(request)
    old, shared = request.table, maker.shared
    check_tokens(tokens, shared.runner.vocab_size)
    text = request.prompt + request.output + list(tokens)
    spans = [*request.protect, *protect]
    turn = maker.make(
        text, params, request.policy, spans, hold, old, None, 1, adapter=request.adapter
    )
    if shared.is_endless(request.policy, len(text)):  # its rotary positions start again
        limit = shared.runner.streaming.limit(request.is_long)
        check_stream(len(tokens) + 1, int(old.kept.max()), limit)
    elif not request.is_long and is_long(
        shared.runner, request.policy, len(text) - old.seen_len, len(text), turn.max_new
    ):
        raise ValueError("the text exceeds the rotary range of its cache; start a new request")
    turn.lowered_to = request.lowered_to
    return turn


def check_holds(request: Request) -> None:
    """``ValueError`` if a request holds no cache."""
    if not request.hold or request.cache is None or not request.ended:
        raise ValueError(f"request {request.id} holds no cache; add it with hold=True")


def truncate(shared: Shared, request: Request, seen_len: int) -> None:
    """See :meth:`Engine.truncate`."""
    check_holds(request)
    table, runner, pool = request.table, shared.runner, shared.pool
    seen_len = check_count("seen_len", seen_len)
    problems = runner.stages.gather(_why_not(shared, request, seen_len))
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)
    pool.truncate(table, seen_len, lambda own: runner.ranks.join(own, runner.kv_heads))
    runner.stages.sync_lengths(table.kept)
    table.state = request.policy.truncated(table.state, table.kept)
    if request.policy.streams:
        runner.streaming.forget(table)
        runner.streaming.close_gaps(pool, request)
    request.prompt, request.output = (request.prompt + request.output)[:seen_len], []
    request.protect = request.protected_in(seen_len)
    request.chain, request.prefix = None, min(request.prefix, seen_len)
    shared.ledger.reserve(request, shared.ledger.held(table))


def _why_not(shared: Shared, request: Request, seen_len: int) -> str | None:
    """The reason why a request cannot be truncated to this many tokens: a layer has dropped tokens
    that would be visible again."""
    table, pool = request.table, shared.pool
    for layer in pool.own_layers:
        window = shared.runner.shapes[layer].window
        if window is None or request.layers.governed[layer] or seen_len < 1:
            continue
        oldest = int(pool.positions(table, layer).min())
        if oldest > max(0, seen_len - window + 1):
            return (
                f"cannot go back to {seen_len} tokens: layer {layer} keeps its window only, from "
                f"position {oldest} on"
            )
    return None
