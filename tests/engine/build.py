"""Engines for tests: tiny models, small pages, freed entries poisoned."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import Policy, make_policy
from pyramidinfer.policies.base import asks_for_profile
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


@cache
def bound_policy(name: str, family: str, dtype: torch.dtype) -> Policy:
    """The policy with what it asks for of a tiny model, whose heads are measured once for all."""
    policy = policy_named(name)
    if not asks_for_profile(policy):
        return policy
    return LLM(tiny_model(family, dtype), policy=policy, kv_memory="4MiB", page_size=4).policy


def build(
    name: str, family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any
) -> LLM:
    options = {"kv_memory": "4MiB", "page_size": 4, **options}
    return LLM(tiny_model(family, dtype), policy=bound_policy(name, family, dtype), **options)


@cache
def _engine_alone(name: str, family: str) -> LLM:
    return build(name, family)


def alone(name: str, family: str, prompt: list[int], params: SamplingParams) -> list[int]:
    """Tokens where nobody else is in the engine."""
    return _engine_alone(name, family).generate([prompt], params)[0].token_ids
