"""R-KV's redundancy, by hand; its blocks; what a buffer reservations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import RKV, Policy, make_policy, rkv
from pyramidinfer.policies.rkv import redundancy
from pyramidinfer.types import Best, Layers, View
from tests.policies.test_judges import KNOWS
from tests.tiny import random_prompt, tiny_model

LAYERS = Layers((True, False, True), 2)


def by_hand(keys: Tensor, order: list[int], threshold: float) -> Tensor:
    """One head's; ``order``: the entries' positions."""
    ones = [key / key.norm() for key in keys]
    total = [0.0] * len(ones)
    for j, mine in enumerate(ones):
        row = {i: float(mine @ other) for i, other in enumerate(ones) if i != j}
        twins = [i for i, cosine in row.items() if cosine > threshold]
        newest = max(twins, key=lambda i: order[i], default=None)
        for i, cosine in row.items():
            total[i] += 0.0 if i == newest else cosine
    return torch.softmax(torch.tensor(total).double() / len(ones), 0)


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.95])
def test_redundancy_by_hand(block: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries in no order, as a cache has them; the second head is shorter by three."""
    monkeypatch.setattr(rkv, "BLOCK", block)
    keys = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(1)).double()
    keys[0, 3] = keys[0, 9] * 2  # the same direction
    positions = torch.stack([torch.randperm(13), torch.randperm(13) + 40])
    keys[1, 10:], positions[1, 10:] = 0.0, torch.tensor([-1, -2, -3])
    found = redundancy(keys, positions, threshold)
    for head, length in enumerate((13, 10)):
        wanted = by_hand(keys[head, :length], positions[head].tolist(), threshold)
        torch.testing.assert_close(found[head, :length], wanted)
        assert not found[head, length:].any()


def test_of_many_alike_the_newer_is_punished_less() -> None:
    """Everything is said three times: the last time counts for nothing, the first for most."""
    keys = torch.eye(6)[None].repeat(1, 3, 1)
    first, second, third = redundancy(keys, torch.arange(18)[None], 0.5)[0].split(6)
    assert (first > second).all() and (second > third).all()
    third, second, first = redundancy(keys, 17 - torch.arange(18)[None], 0.5)[0].split(6)
    assert (first > second).all() and (second > third).all()
    twice = redundancy(keys[:, :12], torch.arange(12)[None], 0.5)
    torch.testing.assert_close(twice, torch.full((1, 12), 1 / 12))  # each is the other's newest


def buffered(name: str, **options: object) -> Policy:
    more = KNOWS if name == "triattention" else {}
    return make_policy(name, 0.5, **more, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rkv", "triattention"])
def test_what_a_buffer_promises(name: str) -> None:
    """The budget and the buffer, less where fewer tokens are generated; layers with a window and
    texts below the budget keep all."""
    policy = buffered(name)
    assert policy.forecast(1000, 500, LAYERS).kept == [628, 1500, 628]
    assert policy.forecast(1000, 20, LAYERS).kept == [520, 1020, 520]
    assert policy.forecast(1000, 0, LAYERS).kept == [500, 1000, 500]
    short = make_policy(name, capacity=300, **(KNOWS if name == "triattention" else {}))
    assert short.forecast(100, 20, LAYERS).kept == [120] * 3
    assert short.forecast(100, 900, LAYERS).kept == [428, 1000, 428]


@pytest.mark.parametrize("name", ["rkv", "triattention"])
def test_what_is_reserved_is_reached_and_never_passed(name: str) -> None:
    policy = buffered(name, buffer=11)
    llm = LLM(tiny_model("llama"), policy=policy, kv_memory="4MiB", page_size=1)
    request = llm.engine.make(random_prompt(1, 60), SamplingParams(max_tokens=40, ignore_eos=True))
    llm.engine.submit(request)
    most = 0
    while request.finish_reason is None:
        llm.engine.step()
        if request.cache is not None:
            most = max(most, int(request.table.kept.max()))
    assert most == 30 + 11 - 1  # the one more that is written is gone by the end of the step
    assert policy.forecast(60, 40, llm.engine.runner.layers_for(100)).kept == [41] * 4


def test_a_lowered_budget_is_met_at_once() -> None:
    policy = RKV(keep=0.8, window=4)
    layers = Layers((True,) * 2, 2)
    state = policy.start(layers)
    for layer in range(2):
        view = View("prefill", layer, layers, 100, 100, (80, 80), 100, 100, state)
        state = policy.prefilled(view)
    kept = np.full((2, 2), 90)
    assert (policy.ceiling(kept, state, layers) + policy.slack == 80 + 127).all()
    found = policy.tightened(0.6, state, layers)
    assert found is not None
    lower, state = found
    assert (lower.ceiling(kept, state, layers) == 60).all()
    view = View("decode", 0, layers, 100, 1, (90, 90), 90, 110, state)
    rule = lower.needs(view).retain
    assert isinstance(rule, Best) and rule.count == 60
    assert lower.needs(View("decode", 0, layers, 100, 1, (60, 60), 90, 110, state)).retain is None


@pytest.mark.parametrize("buffer", [1, 100])
def test_between_two_steps_layers_are_cut_back_at_once(buffer: int) -> None:
    policy = RKV(keep=0.8, window=4, buffer=buffer)
    llm = LLM(tiny_model("llama"), policy=policy, kv_memory="4MiB", page_size=4)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    request = llm.engine.add(random_prompt(1, 60), params)
    while len(request.output) < 20:
        llm.engine.step()
    table = request.table
    assert (table.kept > 48).all() == (buffer > 1)
    found = policy.tightened(0.6, table.state, request.layers)
    assert found is not None
    request.policy, table.state = found
    llm.engine.runner.evict_now(llm.engine.pool, request)
    assert (table.kept == 36).all()
    llm.engine.abort(request)


def test_a_short_further_turn_scores_with_its_own_queries_first() -> None:
    """The mean is over the queries that there are, one more with every token."""
    policy = RKV(keep=0.5, window=8, buffer=1)
    llm = LLM(tiny_model("llama"), policy=policy, kv_memory="4MiB", page_size=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    request = llm.engine.add(random_prompt(1, 60), params, hold=True)
    for turn in range(2):
        while request.finish_reason is None:
            llm.engine.step()
        if turn == 0:
            request = llm.engine.extend(request, [5, 6], params, hold=True)
    assert request.kv is not None
    assert {length for layer in request.kv.kept_len for length in layer} == {37}
    llm.engine.release(request)
