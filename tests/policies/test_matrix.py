"""Every policy × every attention backend × every dtype, in both phases."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.attention import available_backends
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import POLICIES, make_policy
from tests.engine.build import SMALL, policy_named
from tests.tiny import random_prompt, tiny_model

DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((90, 3, 41, 17))]
#: Triton's kernels are interpreted without a GPU, which takes seconds a step: see
#: test_triton_serves_every_policy.
COMPILED = [name for name in available_backends() if name != "triton"]
BUDGETED = sorted(
    name
    for name in POLICIES
    if name != "full" and "keep" in {each.name for each in fields(POLICIES[name])}
)

OPTIONS = {
    "duo": SMALL["duo"],
    "kvzip": SMALL["kvzip"],
    "pyramid": {"min_context": 8, "recent": 4, "window": 8},
    "triattention": {"pin_prompt": False},
}


@cache
def model(dtype: str) -> Any:
    return tiny_model("llama", getattr(torch, dtype))


def engine(policy: Any, backend: str, dtype: str) -> Engine:
    config = EngineConfig(kv_memory="4MiB", page_size=4, prefill_chunk=32)
    return Engine(model(dtype), policy, config, backend=backend)


def serve(engine: Engine, prompts: list[list[int]], new: int) -> list[Request]:
    """Run prompts side by side; the pool is checked after every step."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while not engine.scheduler.idle:
        engine.step()
        engine.pool.check()
    engine.check()
    return requests


@pytest.mark.parametrize("new", [1, 8], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_ragged_batch_equals_each_alone(name: str, backend: str, dtype: str, new: int) -> None:
    """Lengths, bytes and work are the same in every dtype, tokens in float32 (in 16 bits, sums
    of other shapes may round to other tokens)."""
    policy = policy_named(name)
    together = serve(engine(policy, backend, dtype), PROMPTS, new)
    one_by_one = engine(policy, backend, dtype)
    for request in together:
        (alone,) = serve(one_by_one, [request.prompt], new)
        assert request.kv is not None and alone.kv is not None
        assert request.finish_reason == alone.finish_reason == "length"
        assert len(request.output) == new
        assert request.computed == alone.computed
        assert request.kv.kept_len == alone.kv.kept_len
        assert request.kv.bytes == alone.kv.bytes <= request.kv.full_bytes
        assert request.kv.peak_bytes <= request.cost.bytes
        if dtype == "float32":
            assert request.output == alone.output


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", BUDGETED)
def test_bytes_fall_with_keep(name: str, backend: str) -> None:
    """After prefill and after generation; at ``keep=1`` nothing of the prompt is dropped."""
    prompt = random_prompt(7, 200)
    for new in (1, 20):
        found = []
        for keep in (1.0, 0.7, 0.4):
            policy = make_policy(name, keep, **OPTIONS.get(name, {}))
            (request,) = serve(engine(policy, backend, "float32"), [prompt], new)
            assert request.kv is not None
            found.append(request.kv.bytes)
            if keep == 1 and new == 1:
                assert request.kv.bytes == request.kv.full_bytes
        assert found == sorted(found, reverse=True)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_the_forecast_says_is_computed(name: str) -> None:
    """``inspect`` shows it as a figure, not as a bound."""
    for keep in (0.4, 0.8) if name in BUDGETED else (None,):
        each = engine(make_policy(name, keep, **OPTIONS.get(name, {})), "reference", "float32")
        prompts = [random_prompt(8, length) for length in (60, 200)]
        for request in serve(each, prompts, 4):
            length = len(request.prompt)
            layers = each.runner.layers_for(length + 4)
            reach = each.policy.forecast(length, 4, layers).reach
            assert request.computed[: layers.count] == reach  # what is read again comes behind


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_triton_serves_every_policy(name: str) -> None:
    """The same tokens and lengths as the reference, two short prompts side by side."""
    found = []
    for backend in ("reference", "triton"):  # the first measures the heads, if it has to be
        requests = serve(engine(policy_named(name), backend, "float32"), PROMPTS[2:], 3)
        found.append(
            [(each.output, each.computed, each.kv and each.kv.kept_len) for each in requests]
        )
    assert found[0] == found[1]
