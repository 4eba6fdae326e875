"""A request's logits and tokens are the same bits whoever is served beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from tests.adapters import save_adapter
from tests.engine.build import policy_named
from tests.native.isas import backend
from tests.tiny import random_prompt, tiny_model

#: Those whose linears run in the kernels: torch's own products depend on how many rows there are.
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if backend("native").kernels.multiplies(dtype)
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((90, 3, 300, 41, 1))]
NEW = 20


@cache
def model(family: str, dtype: torch.dtype) -> Any:
    return tiny_model(family, dtype)


def engine(family: str, dtype: torch.dtype, name: str, **options: Any) -> Engine:
    options = {"kv_memory": "8MiB", "page_size": 4, **options}
    return Engine(model(family, dtype), policy_named(name), EngineConfig(**options), backend="cpu")


def logits_of(
    engine: Engine,
    prompts: list[list[int]],
    joining: int = 0,
    loras: list[str | None] | None = None,
) -> tuple[list[list[int]], list[Tensor]]:
    """Tokens and logits ``[NEW, vocab]`` of each; ``joining`` steps lie between two prompts."""
    assert engine.runner.decoder.is_fused
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    rows: dict[Request, list[Tensor]] = {}
    commit = engine.committer.commit

    def watched(plan: Any, stepped: Any, committed: Any) -> Any:
        begun = [request for request, work in plan.prefill if work.prefill.finished]
        for row, request in enumerate(plan.decode + begun):
            rows.setdefault(request, []).append(stepped.logits[row].clone())
        return commit(plan, stepped, committed)

    engine.committer.commit = watched  # type: ignore[method-assign]
    requests = []
    for prompt, lora in zip(prompts, loras or [None] * len(prompts), strict=True):
        requests.append(engine.make(prompt, params, lora=lora))
        engine.submit(requests[-1])
        for _ in range(joining):
            engine.step()
    while not engine.scheduler.idle:
        engine.step()
    engine.check()
    return [each.output for each in requests], [torch.stack(rows[each]) for each in requests]


def assert_same(found: Any, expected: Any) -> None:
    for tokens, logits, their_tokens, their_logits in zip(*found, *expected, strict=True):
        assert logits.shape == their_logits.shape == (NEW, logits.shape[1])
        assert tokens == their_tokens
        assert logits.equal(their_logits)


@dtypes
@pytest.mark.parametrize("name", ["full", "pyramid", "h2o", "snapkv", "pyramidinfer"])
def test_alone_and_in_a_crowd(dtype: torch.dtype, name: str) -> None:
    """At once, or joining midway: decode rows travel alone or beside chunks of prompts."""
    expected = logits_of(engine("llama", dtype, name), PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = logits_of(engine("llama", dtype, name), [prompt])
        assert_same(alone, ([expected[0][index]], [expected[1][index]]))
    joining = logits_of(engine("llama", dtype, name), PROMPTS, joining=4)
    assert_same(joining, expected)


@dtypes
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_with_other_chunks_and_threads(dtype: torch.dtype, family: str) -> None:
    expected = logits_of(engine(family, dtype, "full"), PROMPTS)
    for options in ({"prefill_chunk": 13, "step_tokens": 40}, {"prefill_chunk": 64}):
        found = logits_of(engine(family, dtype, "full", **options), PROMPTS, joining=3)
        assert_same(found, expected)
    try:
        torch.set_num_threads(3)
        assert_same(logits_of(engine(family, dtype, "full"), PROMPTS), expected)
    finally:
        torch.set_num_threads(1)


@dtypes
@pytest.mark.parametrize("name", ["pyramid", "pyramidinfer", "h2o"])
def test_dropping_with_more_threads(dtype: torch.dtype, name: str) -> None:
    expected = logits_of(engine("llama", dtype, name), PROMPTS)
    try:
        torch.set_num_threads(3)
        assert_same(logits_of(engine("llama", dtype, name), PROMPTS), expected)
    finally:
        torch.set_num_threads(1)


@dtypes
def test_pages_do_not_matter(dtype: torch.dtype) -> None:
    """Nor which pages of the pool entries happen to lie in."""
    expected = logits_of(engine("llama", dtype, "full"), PROMPTS)
    other = engine("llama", dtype, "full")
    logits_of(other, PROMPTS[::-1])  # leaves the free list in another order
    del other.committer.commit
    assert_same(logits_of(other, PROMPTS), expected)


@dtypes
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_beside_other_adapters(dtype: torch.dtype, weights: str, tmp_path: Path) -> None:
    """A request's adapter is its own; one without is served as if there were none."""
    loras = [None, "first", "second", "first", None]
    folders = {
        name: save_adapter(tmp_path / name, "llama", which)
        for which, name in enumerate(("first", "second"))
    }

    def with_adapters() -> Engine:
        return engine("llama", dtype, "full", lora_modules=folders, weights=weights)

    expected = logits_of(with_adapters(), PROMPTS, loras=loras)
    assert_same(logits_of(with_adapters(), PROMPTS, joining=4, loras=loras), expected)
    for index, lora in enumerate(loras):
        mine = ([expected[0][index]], [expected[1][index]])
        assert_same(logits_of(with_adapters(), PROMPTS[index : index + 1], loras=[lora]), mine)
        if lora is None:
            without = engine("llama", dtype, "full", weights=weights)
            assert_same(logits_of(without, PROMPTS[index : index + 1]), mine)
