"""Held requests: going on with a cache, and forgetting the end of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pyramidinfer.engine.checks import check_count, check_stream, check_tokens
from pyramidinfer.engine.making import Spans, is_endless
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.request import Request
from pyramidinfer.models.intake import Sequence
from pyramidinfer.types import SamplingParams, TokenIds

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["branch", "copy_held", "extend", "truncate"]


def extend(engine: Engine, request: Request, tokens: TokenIds, params: SamplingParams,
           protect: Spans, hold: bool) -> Request:  # fmt: skip
    """See :meth:`Engine.extend`."""
    turn, old = _next(engine, request, tokens, params, protect, hold)
    turn.sequence, request.sequence, request.hold = old, None, False
    turn.promised, request.promised = request.promised, None
    turn.lowered_to = request.lowered_to
    engine.submit(turn)
    return turn


def branch(engine: Engine, request: Request, tokens: TokenIds, params: SamplingParams,
           protect: Spans) -> Request:  # fmt: skip
    """See :meth:`Engine.branch`."""
    turn, _ = _next(engine, request, tokens, params, protect, False)
    turn.onto, turn.lowered_to = request, request.lowered_to
    return turn


def copy_held(engine: Engine, turn: Request) -> None:
    """Give a request that is about to be queued its copy of the cache that it goes on with."""
    held, turn.onto = turn.onto, None
    if held is None:
        return
    if held.sequence is None:
        raise ValueError(f"request {held.id} holds its cache no longer; nothing can go on from it")
    turn.sequence = replace(held.sequence, table=engine.pool.fork(held.sequence.table))


def _next(engine: Engine, request: Request, tokens: TokenIds, params: SamplingParams,
          protect: Spans, hold: bool) -> tuple[Request, Sequence]:  # fmt: skip
    """What goes on with a held request, checked, and what that one holds."""
    old = request.sequence
    if not request.hold or old is None or request.finish_reason is None:
        raise ValueError(f"request {request.id} holds no cache; add it with hold=True")
    check_tokens(tokens, engine.adapter.vocab_size)
    text = request.prompt + request.output + list(tokens)
    turn = engine.make(text, params, policy=request.policy, hold=hold, on=old.table,
                     protect=[*request.protect, *protect])  # fmt: skip
    if is_endless(engine, request.policy, len(text)):  # its rotary positions begin again
        limit = engine.adapter.streaming.limit(old.is_long)
        check_stream(len(tokens) + 1, int(old.table.kept.max()), limit)
    elif not old.is_long and is_long(
        engine.adapter, request.policy, len(text) - old.table.seen_len, len(text), turn.max_new
    ):
        raise ValueError(
            "the text outgrows the rotary range its cache was made for; start a new request"
        )
    return turn, old


def truncate(engine: Engine, request: Request, seen_len: int) -> None:
    """See :meth:`Engine.truncate`."""
    sequence = request.sequence
    if not request.hold or sequence is None or request.finish_reason is None:
        raise ValueError(f"request {request.id} holds no cache; add it with hold=True")
    table, seen_len = sequence.table, check_count("seen_len", seen_len)
    for layer, shape in enumerate(engine.adapter.shapes):
        if shape.window is None or sequence.layers.governed[layer] or seen_len < 1:
            continue
        oldest = int(engine.pool.positions(table, layer).min())
        if oldest > max(0, seen_len - shape.window + 1):
            raise ValueError(
                f"cannot go back to {seen_len} tokens: layer {layer} keeps its window only, "
                f"from position {oldest} on"
            )
    engine.pool.truncate(table, seen_len)
    table.state = request.policy.truncated(table.state, table.kept.tolist())
    if request.policy.streams:
        engine.adapter.streaming.forget(table)
        engine.adapter.streaming.close_gaps(engine.pool, sequence)
    request.prompt, request.output = (request.prompt + request.output)[:seen_len], []
    request.protect = tuple(
        (start, min(stop, seen_len)) for start, stop in request.protect if start < seen_len
    )
    engine.ledger.promise(request, engine.ledger.held(table))
