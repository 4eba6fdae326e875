"""Lossless requests whose caches are in host memory: the same answers from a smaller pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.cache import Exported, Staging
from pyramidinfer.cache.group import Group
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.checks import ContextLengthError
from pyramidinfer.engine.tracing import trace
from pyramidinfer.policies import Lossless, make_policy
from tests.engine.serving import alone, finish, queue, start, step
from tests.engine.test_lossless import SIZES, begin, drafted_by, outputs, run
from tests.tiny import random_prompt

GIVEN = {"offload_lossless": True, "host_kv_memory": "4MiB"}


def away(name: str = "snapkv", family: str = "llama", **options: Any) -> Engine:
    return begin(name, family, **{**GIVEN, **options})


@pytest.mark.parametrize(
    "name,family,steps",
    [
        ("snapkv", "llama", 0),
        ("pyramid", "opt", 3),
        ("streaming_llm", "gemma3_text", 8),
        ("pyramidinfer", "llama", 3),
        ("expected_attention", "llama", 3),
        ("fastkv", "gemma3_text", 3),
    ],
)
def test_the_full_cache_answers(name: str, family: str, steps: int) -> None:
    """In ragged batches that others join; nothing is held beyond what is reserved (``step``)."""
    engine, found = away(name, family, steps=steps), []
    for number, size in enumerate(SIZES[:3]):
        found.append(queue(engine, random_prompt(number, size[0]), size[1]))
        step(engine)
        step(engine)
    while not engine.scheduler.idle:
        step(engine)
        for each in (*engine.scheduler.prefilling, *engine.scheduler.running):
            assert each.table.away is not None
            assert each.table.away.bytes <= each.table.away.reserved
    engine.check()
    assert outputs(found) == [alone("full", family, i, *size) for i, size in enumerate(SIZES[:3])]
    for each in found:
        assert each.kv is not None
        assert each.kv.kept_share == 1 and each.kv.bytes + each.kv.host_bytes == each.kv.full_bytes
    assert found[0].kv is not None and found[0].kv.host_bytes > found[0].kv.full_bytes / 6
    assert engine.scheduler.host_bytes == 0
    assert bool(engine.drafter.drafted) == (steps > 0)


@pytest.mark.parametrize(
    "dtype,kv_dtype", [(torch.float32, "int8"), (torch.bfloat16, "auto")], ids=str
)
def test_to_the_last_bit(dtype: torch.dtype, kv_dtype: str) -> None:
    wanted = {"logprobs": 3, "temperature": 0.9, "seed": 4}
    expected = run(start("full", dtype=dtype, kv_dtype=kv_dtype), **wanted)
    found = run(away(dtype=dtype, kv_dtype=kv_dtype), **wanted)
    assert outputs(found) == outputs(expected)
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]


def test_in_a_pool_that_is_too_small_for_the_whole_cache() -> None:
    length, new = 300, 12
    policy = Lossless(make_policy("snapkv", 0.1))
    engine = away(steps=3)
    most = engine.make(random_prompt(0, length), SamplingParams(max_tokens=new), policy=policy).cost
    tight = start(policy, kv_memory=most.bytes + 4096, offload_lossless=True, host_kv_memory="4MiB")
    request = queue(tight, random_prompt(0, length), new)
    finish(tight)
    assert request.output == alone("full", "llama", 0, length, new)
    assert request.kv is not None and tight.pool.peak_bytes < request.kv.full_bytes
    with pytest.raises(ContextLengthError, match="raise kv_memory"):
        queue(start(policy, kv_memory=most.bytes + 4096), random_prompt(0, length), new)


def test_samples_and_others_in_the_same_step() -> None:
    """Samples share what is in host memory; prompts arrive in chunks; other policies run too."""
    answers = []
    for engine in (away(prefill_chunk=16, step_tokens=40), start("full")):
        first = queue(engine, random_prompt(0, 90), 20, samples=3, temperature=1.0, seed=3)
        other = queue(engine, random_prompt(1, 60), 20, make_policy("full"))
        finish(engine)
        answers.append(outputs([first, *first.samples, other]))
    assert answers[0] == answers[1]


def test_requests_wait_for_host_memory() -> None:
    each = away().make(random_prompt(0, 90), SamplingParams(max_tokens=9)).away
    assert each is not None
    engine = away(host_kv_memory=each.reserved + each.reserved // 2)
    mine = [queue(engine, random_prompt(i, 90), 9) for i in range(3)]
    together = 0
    while not engine.scheduler.idle:
        step(engine)
        together = max(together, engine.scheduler.in_flight)
        assert engine.scheduler.host_bytes <= engine.config.host_budget
    assert together == 1
    assert outputs(mine) == [alone("full", "llama", i, 90, 9) for i in range(3)]


@pytest.mark.parametrize("where", ["load", "__enter__"])
def test_a_step_that_raises_is_taken_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = away()
    mine, other = (queue(engine, random_prompt(i, 70), 30) for i in range(2))
    while len(mine.output) < 8:
        step(engine)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="once"):

        def fails(*_: Any) -> None:
            raise RuntimeError("once")

        patch.setattr(Staging, where, fails)
        engine.step()
    engine.pool.check()
    while len(mine.output) < 16:
        step(engine)
    engine.abort(mine)
    finish(engine)
    assert mine.output == alone("full", "llama", 0, 70, 30)[: len(mine.output)]
    assert other.output == alone("full", "llama", 1, 70, 30)


def test_a_prompt_in_progress_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = away(prefill_chunk=16, step_tokens=20)
    mine = queue(engine, random_prompt(0, 70), 9)
    while not (mine.cache and mine.table.away and mine.table.away.bytes):
        step(engine)
    assert mine.prefill is not None
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="once"):

        def fails(*_: Any) -> None:
            raise RuntimeError("once")

        patch.setattr(engine.runner, "forward", fails)
        engine.step()
    finish(engine)
    assert mine.output == alone("full", "llama", 0, 70, 9)


def test_what_it_does_not_go_with() -> None:
    engine = away()
    ask, params = random_prompt(0, 60), SamplingParams(max_tokens=5)
    for extra in ({"hold": True}, {"prefix": 20}):
        with pytest.raises(ValueError, match=r"=.*start the engine without offload_lossless"):
            engine.make(ask, params, **extra)
    assert engine.make(ask, params, owner="ann").owner is None
    small = away(host_kv_memory=64)
    with pytest.raises(ContextLengthError, match="host_kv_memory, which has 64"):
        small.make(ask, params)
    with pytest.raises(ValueError, match="nothing can be pinned with offload_lossless"):
        engine.pin_cache("ann", "x", 1.0)
    with pytest.raises(ValueError, match=r"a trace .*start the engine without offload_lossless"):
        trace(engine, ask, 2, ())
    given = {"offload_lossless": True, "host_kv_memory": "1MiB"}
    EngineConfig(**given, reuse_share=0.0)
    for options, words in [
        ({"offload_lossless": True}, "needs host_kv_memory"),
        ({**given, "admission": "overcommit"}, "admission='reserve' only"),
        ({**given, "tensor_parallel_size": 2}, "single rank"),
    ]:
        with pytest.raises(ValueError, match=words):
            EngineConfig(**options)


def test_the_same_engine_serves_requests_that_are_not_lossless() -> None:
    engine = away()
    kept = queue(engine, random_prompt(0, 60), 9, make_policy("full"), owner="ann")
    finish(engine)
    assert kept.away is None and engine.conversations.count == 1
    assert drafted_by("snapkv").guesses


def test_sliding_layers_stay_in_the_pool() -> None:
    """All of what they hold is reserved, whatever the policy would drop before it reaches them."""
    drafts = make_policy("fastkv", 0.05, window=2, propagate_ratio=0.05)
    engine = start(Lossless(drafts), "gemma3_text", **GIVEN)
    request = queue(engine, random_prompt(0, 90), 2)
    step(engine)
    most, sliding = request.cost.after_prefill, ~np.array(request.layers.governed)
    assert most is not None and most.entries is not None
    assert sliding.any() and (request.table.kept <= most.entries)[sliding].all()
    finish(engine)
    assert request.output == alone("full", "gemma3_text", 0, 90, 2)


def test_spare_pages_are_freed_if_not_all_can_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = away(steps=0)
    mine = [queue(engine, random_prompt(i, 70), 9) for i in range(2)]
    while not all(each.output for each in mine):
        step(engine)
    real, calls = Group.take, []

    def fails(group: Group, count: int) -> list[int]:
        calls.append(count)
        if len(calls) == 2:
            raise RuntimeError("once")
        return real(group, count)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="once"):
        patch.setattr(Group, "take", fails)
        engine.step()
    assert calls[0] > 0
    engine.pool.check()
    finish(engine)
    assert outputs(mine) == [alone("full", "llama", i, 70, 9) for i in range(2)]


def test_pinned_blocks_are_rounded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is allocated in powers of two, and every tensor of a layer is a block."""
    engine, total = away(), 0
    monkeypatch.setattr(engine.shared.copier, "_stream", object())
    asked = engine.make(random_prompt(0, 90), SamplingParams(max_tokens=9))
    for layer in range(engine.runner.depth):
        for each in engine.pool.group(layer).tensors():
            size, block = engine.runner.kv_heads * (90 // 4) * each[0].nbytes, 1
            while block < size:
                block *= 2
            total += block
    assert asked.away is not None and asked.away.reserved == total


@pytest.mark.parametrize("late", [False, True])
def test_conversations_make_room_in_both_places(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if one that leaves the pool for the host is still being copied (``late``)."""
    length, new = 90, 9
    asked = away().make(random_prompt(0, length), SamplingParams(max_tokens=new))
    assert asked.away is not None
    engine = away(kv_memory=asked.cost.bytes + 4096, host_kv_memory=asked.away.reserved + 64)
    kept = queue(engine, random_prompt(1, 40), 9, make_policy("full"), owner="ann")
    finish(engine)
    assert kept.finish_reason and engine.conversations.count == 1
    if late:
        queries = iter([False] * 6)
        monkeypatch.setattr(Exported, "is_here", property(lambda _: next(queries, True)))
        engine.conversations._drop()
    mine = queue(engine, random_prompt(0, length), new)
    for _ in range(200):
        if engine.scheduler.idle:
            break
        step(engine)
        assert engine.conversations.host.bytes + engine.scheduler.host_bytes <= (
            engine.config.host_budget
        )
    assert mine.output == alone("full", "llama", 0, length, new)
