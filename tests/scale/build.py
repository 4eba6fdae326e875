"""What tests of several ranks ask for."""

from __future__ import annotations

from typing import Any

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from tests.engine.build import policy_named
from tests.tiny import random_prompt

CONFIG = EngineConfig(kv_memory="8MiB", page_size=4, prefill_chunk=32, slot_scores=True)

#: Layers of two stages of a tiny model; each needs a layer whose keys can be rotated.
STAGES = {"gemma2": [2, 2], "gemma3_text": [3, 3], "smollm3": [2, 2]}
TWO, FOUR = [1, 3], [1, 1, 1, 1]

Answer = tuple[list[int], Any, ...]


def answers(
    engine: Engine, policies: list[str], lengths: tuple[int, ...] = (48, 3, 30), new: int = 8
) -> dict[str, list[Answer]]:
    """Each policy's tokens, kept entries, bytes and work for a ragged batch, the last of it
    sampled."""
    found = {}
    for name in policies:
        requests = []
        for seed, length in enumerate(lengths):
            heat = 0.8 if seed == len(lengths) - 1 else 0.0
            params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=heat, seed=5)
            prompt, policy = random_prompt(seed, length), policy_named(name)
            requests.append(engine.make(prompt, params, policy=policy, protect=[(1, 3)]))
        engine.run(requests)
        found[name] = [
            (each.output, each.kv and (each.kv.kept_len, each.kv.bytes), each.computed)
            for each in requests
        ]
    return found
