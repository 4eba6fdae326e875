"""Engines for tests: tiny models, small pages, freed entries poisoned."""

from __future__ import annotations

from typing import Any

import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import Policy, make_policy
from tests.tiny import tiny_model

SMALL: dict[str, dict[str, Any]] = {
    "chunkkv": {"window": 8},
    "kvzip": {"min_text": 8, "question": (5, 6, 7), "chunk_length": 40},
    "pyramidinfer": {"min_context": 4, "gen_chunk": 4},
    "rkv": {"window": 4, "buffer": 4},
    "triattention": {"buffer": 4, "pin_prompt": False},
    "duo": {"sinks": 2, "recent": 8, "min_context": 8, "stride": 4},
    "pyramid": {
        "recent": 4,
        "min_context": 8,
        "window": 8,
        "kernel": 7,
        "start_layer": 1,
        "propagate_ratio": 0.4,
    },
}


def policy_named(name: str) -> Policy:
    if name == "full":
        return make_policy(name)
    return make_policy(name, 0.5, **SMALL.get(name, {}))


def build(
    name: str, family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any
) -> LLM:
    options = {"kv_memory": "4MiB", "page_size": 4, **options}
    return LLM(tiny_model(family, dtype), policy=policy_named(name), **options)


def alone(name: str, family: str, prompt: list[int], params: SamplingParams) -> list[int]:
    return build(name, family).generate([prompt], params)[0].token_ids
