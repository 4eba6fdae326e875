"""A rule of eviction said beforehand is what the policy answers when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.cache import Pool
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.policies import Pyramid
from pyramidinfer.types import Trace
from tests.tiny import random_prompt, tiny_model

POLICY: dict[str, Any] = {"keep": 0.3, "min_context": 8, "window": 4, "stride": 3, "schedule": None}


def traced(family: str, dtype: torch.dtype, options: dict[str, Any], protect: Any) -> Trace:
    config = EngineConfig(kv_memory="4MiB", page_size=4, poison=True)
    engine = Engine(tiny_model(family, dtype), Pyramid(**POLICY, **options), config)
    return trace(engine, random_prompt(5, 150), 40, protect)


@pytest.mark.parametrize("protect", [(), [(20, 33), (70, 71)]], ids=["free", "protected"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"kernel": 1}, {"heads": "mean", "sinks": 0}], ids=str)
def test_carried_out_is_what_the_policy_says(
    family: str, options: dict[str, Any], protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in every layer and head, lengths at every step, and tokens."""
    calls = []
    asks = Pool.evicts_best
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: calls.append(asks(*given)) or calls[-1])
    together = traced(family, torch.float32, options, protect)
    assert calls and all(calls)
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: False)
    asked = traced(family, torch.float32, options, protect)
    assert together.kept_len_by_step == asked.kept_len_by_step
    assert together.token_ids == asked.token_ids
    for one, other in zip(together.kept_positions, asked.kept_positions, strict=True):
        assert all(mine.equal(its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lengths_are_the_same_in_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = traced("llama", dtype, {}, ())
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: False)
    asked = traced("llama", dtype, {}, ())
    assert together.kept_len_by_step == asked.kept_len_by_step


def test_shared_pages_are_copied_first() -> None:
    """Evicting from a forked cache leaves its twin as it was."""
    config = EngineConfig(kv_memory="4MiB", page_size=4)
    engine = Engine(tiny_model("llama"), Pyramid(**POLICY), config)
    request = engine.add(random_prompt(5, 150), SamplingParams(max_tokens=40, ignore_eos=True))
    while len(request.output) < 2:
        engine.step()
    assert request.sequence is not None
    twin = engine.pool.fork(request.sequence.table)
    before = [engine.pool.keys(twin, layer).clone() for layer in range(engine.adapter.depth)]
    while request.finish_reason is None:
        engine.step()
    for layer, keys in enumerate(before):
        assert torch.equal(engine.pool.keys(twin, layer), keys)
    engine.pool.release(twin)
