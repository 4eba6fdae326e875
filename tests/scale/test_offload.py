"""Caches in host memory on several ranks: each moves its part, and all decide alike."""

from __future__ import annotations

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from tests.engine.build import policy_named
from tests.scale.build import TWO
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_model


@pytest.mark.parametrize("tensor, layers", [(2, None), (1, TWO)])
@pytest.mark.parametrize("policy", ["full", "h2o", "streaming_llm"])
def test_ranks_move_the_same_caches(tensor: int, layers: list[int] | None, policy: str) -> None:
    """Conversations come and go between pool and host memory, beside requests that are preempted;
    tokens and counts are those of one rank (each step compares the ranks)."""
    model = tiny_model("llama", torch.float64)
    config = EngineConfig(
        kv_memory="200KiB",
        page_size=4,
        admission="overcommit",
        host_kv_memory="160KiB",
        slot_scores=True,
    )
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)

    def run(engine: Engine) -> list[object]:
        turns = []
        for seed in range(6):
            turns.append(engine.make(random_prompt(seed, 24), params, owner="ann"))
            engine.run([turns[-1]])
        gone = next(each for each in engine.caches("ann") if each.where == "host")
        engine.delete_cache("ann", gone.id)
        longer = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
        others = [engine.make(random_prompt(seed, 16), longer) for seed in range(20, 24)]
        again = [
            engine.make(each.text + random_prompt(40, 5), params, owner="ann") for each in turns[2:]
        ]
        engine.run([*again[:2], *others, *again[2:]])
        held = engine.conversations
        counts = [held.spills, held.loads, held.dropped, held.reused_tokens, held.host.bytes]
        outputs = [each.output for each in (*turns, *again, *others)]
        held.clear()
        return [outputs, counts, engine.scheduler.counts.swapped]

    expected = run(Engine(model, policy_named(policy), config))
    with split_engine(model, policy_named(policy), config, tensor, layers=layers) as engine:
        found = run(engine)
        assert found == expected
        assert found[1][0] > 0 and found[1][1] > 0, "caches must move"  # type: ignore[index]
        with pytest.raises(ValueError, match="pinned on one rank only"):
            engine.pin_cache("ann", "any", 5)
