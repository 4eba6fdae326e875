"""Rules that the kernels carry out keep what they keep in torch, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.cache import Pool
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.policies import H2O, Duo, Policy, Pyramid, StreamingLLM
from pyramidinfer.types import Trace
from tests.tiny import random_prompt, tiny_model

POLICY: dict[str, Any] = {
    "keep": 0.3,
    "min_context": 8,
    "recent": 4,
    "window": 4,
    "kernel": 7,
    "stride": 3,
}
EVEN = {**POLICY, "sharpness": 0.0}  # heads hold as much as each other
SOME = {**POLICY, "keep": 0.6, "sharpness": 4.0}  # some of them everything
HEADS: dict[str, Any] = {"keep": 0.4, "sinks": 2, "recent": 8, "min_context": 8, "stride": 3}


def traced(family: str, dtype: torch.dtype, policy: Policy, protect: Any) -> Trace:
    config = EngineConfig(kv_memory="4MiB", page_size=4)
    engine = Engine(tiny_model(family, dtype), policy, config)
    return trace(engine, random_prompt(5, 150), 40, protect)


@pytest.mark.parametrize("protect", [(), [(20, 33), (70, 71)]], ids=["free", "protected"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(
    "policy",
    [
        Pyramid(**POLICY),
        Pyramid(**{**POLICY, "kernel": 1}),
        Pyramid(**{**SOME, "sinks": 0}),
        Pyramid(**EVEN),
        Duo(**HEADS),
        Duo(**{**HEADS, "sinks": 0, "stride": 1}),
        H2O(keep=0.4),
        StreamingLLM(keep=0.2),
    ],
    ids=["pyramid", "unpooled", "some whole", "even", "duo", "duo at once", "h2o", "streaming"],
)
def test_carried_out_together_is_what_each_layer_keeps(
    family: str, policy: Policy, protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in every layer and head, lengths at every step, tokens; to the last bit where
    nothing is scored."""
    calls = []
    asks = Pool.evicts_best
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: calls.append(asks(*given)) or calls[-1])
    together = traced(family, torch.float32, policy, protect)
    assert calls and all(calls)
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: False)
    asked = traced(family, torch.float32, policy, protect)
    assert together.kept_len_by_step == asked.kept_len_by_step
    assert together.token_ids == asked.token_ids
    for one, other in zip(together.kept_positions, asked.kept_positions, strict=True):
        assert all(mine.equal(its) for mine, its in zip(one, other, strict=True))
    if not isinstance(policy, Pyramid):
        assert together.final_logits.equal(asked.final_logits)


@pytest.mark.parametrize(
    "policy", [Pyramid(**EVEN), Pyramid(**SOME), Duo(**HEADS)], ids=["even", "some whole", "duo"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lengths_are_the_same_in_16_bits(
    dtype: torch.dtype, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = traced("llama", dtype, policy, ())
    monkeypatch.setattr(Pool, "evicts_best", lambda *given: False)
    asked = traced("llama", dtype, policy, ())
    assert together.kept_len_by_step == asked.kept_len_by_step


@pytest.mark.parametrize(
    "policy", [Pyramid(**EVEN), Pyramid(**SOME), Duo(**HEADS)], ids=["even", "some whole", "duo"]
)
def test_shared_pages_are_copied_first(policy: Policy) -> None:
    """Evicting from a forked cache leaves its twin as it was; heads that lose nothing stay
    shared, but for the page that a new entry goes into."""
    config = EngineConfig(kv_memory="4MiB", page_size=4)
    engine = Engine(tiny_model("llama"), policy, config)
    request = engine.add(random_prompt(5, 150), SamplingParams(max_tokens=40, ignore_eos=True))
    while len(request.output) < 2:
        engine.step()
    pool, table = engine.pool, request.table
    assert (table.ring is None) == isinstance(policy, Duo)
    twin = pool.fork(table)

    def keys() -> list[torch.Tensor]:
        return [
            pool.keys(twin, layer, heads)
            for layer in range(engine.runner.depth)
            for heads in pool.runs(twin, layer)
        ]

    before, lens = keys(), table.kept.copy()
    while len(request.output) < 39:
        engine.step()
    whole = table.kept - lens == 37
    assert whole.any() == (policy != Pyramid(**EVEN))
    for layer, head in zip(*whole.nonzero(), strict=True):
        full = int(lens[layer, head]) // pool.page_size
        assert (table.pages[layer, head, :full] == twin.pages[layer, head, :full]).all()
    engine.abort(request)
    assert all(found.equal(was) for found, was in zip(keys(), before, strict=True))
    engine.pool.release(twin)
