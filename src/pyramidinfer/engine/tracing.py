"""Run one prompt alone and record which entries remain in which layer."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.offloading import is_offloaded
from pyramidinfer.engine.request import Request
from pyramidinfer.models.batch import Batch, Work
from pyramidinfer.types import SamplingParams, TokenIds, Trace

__all__ = ["trace"]


def trace(
    engine: Engine,
    prompt: TokenIds,
    max_tokens: int,
    protect: Items[tuple[int, int]],
    lora: str | None = None,
) -> Trace:
    """See :meth:`pyramidinfer.LLM.trace`.  Every generated token is fed, including the last."""
    if type(max_tokens) is not int or max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens!r} must be a whole number of at least 0")
    if is_offloaded(engine.shared, engine.policy):
        raise ValueError(
            "a trace reads the whole cache in the pool, and offload_lossless moves a part of it to "
            "host memory: start the engine without offload_lossless"
        )
    with engine.together("trace", prompt, max_tokens, protect, lora):
        return _traced(engine, prompt, max_tokens, protect, lora)


def _traced(
    engine: Engine,
    prompt: TokenIds,
    max_tokens: int,
    protect: Items[tuple[int, int]],
    lora: str | None,
) -> Trace:
    params = SamplingParams(max_tokens=max_tokens + 1, ignore_eos=True)
    request = engine.make(prompt, params, protect=protect, lora=lora)
    if request.max_new < max_tokens:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_tokens} generated ones exceed the model's "
            f"{engine.runner.max_positions} positions"
        )
    if not engine.ledger.fits(request.cost):
        raise ValueError("other requests hold the memory this trace needs; let them finish first")
    engine.ledger.reserve(request, request.cost)
    try:
        return _run(engine, request, max_tokens)
    finally:
        engine.ledger.reserve(request, None)
        if request.cache is not None:
            engine.pool.release(request.cache)


def _run(engine: Engine, request: Request, max_tokens: int) -> Trace:
    pool, runner = engine.pool, engine.runner
    engine.shared.start(request)
    prefill = request.prefill
    assert prefill is not None
    nothing = torch.empty(0, dtype=torch.int64, device=runner.device)
    work = Work(prefill, prefill.work_left)
    logits = runner.forward(pool, Batch([], nothing, [work])).logits[0]
    prefill_logits, table = logits, request.table

    def positions() -> list[list[Tensor]]:
        return [
            [head[head >= 0].sort().values for head in runner.positions(pool, table, layer)]
            for layer in range(runner.depth)
        ]

    after_prefill, tokens, lengths = positions(), [], []
    for _ in range(max_tokens):
        tokens.append(int(logits.argmax()))
        fed = torch.tensor([tokens[-1]], device=runner.device)
        stepped = runner.forward(pool, Batch([request], fed, []))
        assert stepped.decoding is not None
        runner.commit(pool, request, stepped.decoding, 0)
        logits = stepped.logits[0]
        lengths.append(table.kept.tolist())
    return Trace(
        list(request.prompt),
        after_prefill,
        positions(),
        lengths,
        tokens,
        prefill_logits,
        logits,
        prefill.computed,
    )
