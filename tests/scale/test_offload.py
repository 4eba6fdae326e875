"""Caches in host memory on several ranks: each moves its part, and all decide alike."""

from __future__ import annotations

from dataclasses import replace

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
    """Conversations come and go between pool and host memory, with the tokens they have on one rank
    (each step compares the ranks: what they reserve, and who runs)."""
    model = tiny_model("llama", torch.float64)
    config = EngineConfig(
        kv_memory="200KiB",
        page_size=4,
        admission="overcommit",
        host_kv_memory="1MiB",
        reuse_share=0.1,
        slot_scores=True,
    )
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)

    def run(engine: Engine) -> tuple[list[list[int]], tuple[int, int]]:
        turns = []
        for seed in range(6):
            turns.append(engine.make(random_prompt(seed, 24), params, owner="ann"))
            engine.run([turns[-1]])
        gone = engine.caches("ann")[-1]
        assert gone.where == "host"
        engine.delete_cache("ann", gone.id)
        longer = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
        others = [engine.make(random_prompt(seed, 16), longer) for seed in range(20, 24)]
        again = [
            engine.make(each.text + random_prompt(40, 5), params, owner="ann") for each in turns[2:]
        ]
        engine.run([*again[:2], *others, *again[2:]])
        held = engine.conversations
        counts = (held.spills, held.loads)
        outputs = [each.output for each in (*turns, *again, *others)]
        held.clear()
        return outputs, counts

    expected, _ = run(Engine(model, policy_named(policy), config))
    config = replace(config, kv_memory="110KiB")  # of each
    with split_engine(model, policy_named(policy), config, tensor, layers=layers) as engine:
        found, (spills, loads) = run(engine)
        assert found == expected
        assert spills > 0 and loads > 0, "caches must move"
        with pytest.raises(ValueError, match="pinned on one rank only"):
            engine.pin_cache("ann", "any", 5)
