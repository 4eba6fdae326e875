"""TriAttention's seams: centres that were measured, places far ahead, models of every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import TriAttention, make_policy
from pyramidinfer.policies.base import asks_for_profile
from pyramidinfer.policies.profile import Centres, Profile
from pyramidinfer.types import Best, Layers, Observation, View
from tests.policies.test_judges import KNOWS, NEEDED, centres
from tests.tiny import random_prompt, tiny_model

LAYERS = Layers((True,) * 4, 2)


def seen_by(keys: Tensor, turn: Tensor, lens: tuple[int, ...]) -> Observation:
    """A prompt's keys ``[kv_heads, n, key_dim]`` in layer 1, heads of these lengths."""
    size = keys.shape[1]
    positions = torch.arange(size).repeat(len(keys), 1)
    for head, length in enumerate(lens):
        positions[head, length:] = -1 - torch.arange(size - length)
        keys[head, length:] = 0
    state = make_policy("triattention").start(LAYERS)
    view = View("prefill", 1, LAYERS, size, size, lens, size, size, state)
    free = torch.zeros_like(positions) > 0
    return Observation(view, positions, free, keys=keys, rotation=turn, rule=Best(4, "own"))


def z_scores(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


def test_numbers_that_are_not_rotated_are_attended_to_by_their_mean() -> None:
    """Of 8 numbers the first 4 rotate; heads of 7 and 5 entries, two query heads each."""
    keys, turn = torch.randn(2, 7, 8).double(), torch.linalg.qr(torch.randn(8, 8).double())[0]
    found = centres(3, dim=8)
    found = Centres(found.mean, tuple(tuple(row[:2] for row in layer) for layer in found.sizes))
    policy = TriAttention(profile=replace(NEEDED, queries=found), pin_prompt=False)
    seen = seen_by(keys, turn, (7, 5))
    scores = policy.score(seen)
    for kv_head, length in enumerate((7, 5)):
        wanted = []
        for head in (2 * kv_head, 2 * kv_head + 1):
            mean = torch.tensor(found.mean[1][head]).double()
            each = []
            for key in keys[kv_head, :length]:
                overhead = sum(
                    (size - (mean[f] ** 2 + mean[f + 2] ** 2) ** 0.5)
                    * (key[f] ** 2 + key[f + 2] ** 2) ** 0.5
                    for f, size in enumerate(found.sizes[1][head])
                )
                each.append(float(mean @ turn @ key + overhead))
            wanted.append(z_scores(torch.tensor(each).double()))
        torch.testing.assert_close(scores[kv_head, :length], torch.stack(wanted).amax(0))
    assert policy.retain(seen, seen.view.state)[0].indices is not None


def test_without_rotary_positions_the_score_is_a_dot_product() -> None:
    """OPT's profile has no pairs, its vectors are left alone, and it is served."""
    llm = LLM(
        tiny_model("opt", torch.float64),
        policy=TriAttention(keep=0.5, buffer=4, pin_prompt=False),
        kv_memory="4MiB",
        page_size=4,
    )
    profile: Any = llm.policy.profile  # type: ignore[attr-defined]
    assert all(row == () for layer in profile.queries.sizes for row in layer)
    trace = llm.trace(random_prompt(1, 60), max_tokens=10)
    assert all(len(head) == 30 for layer in trace.prefill_positions for head in layer)
    mean, keys = profile.queries.mean, torch.randn(4, 20, 8).double()
    seen = seen_by(keys, torch.eye(8).double(), (20,) * 4)
    policy = TriAttention(profile=profile, pin_prompt=False)
    for head, row in enumerate(policy.score(seen)):
        wanted = z_scores(keys[head] @ torch.tensor(mean[1][head]).double())
        torch.testing.assert_close(row, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "smollm3", "phi3", "opt"])
def test_vectors_are_turned_to_places_far_ahead(family: str) -> None:
    """By the frequencies of the request's own text, however far: worked out by hand."""
    llm = LLM(tiny_model(family, torch.float64), policy="full", kv_memory="4MiB")
    runner = llm.engine.runner
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    request = llm.engine.add(random_prompt(1, 20), params, hold=True)
    while request.finish_reason is None:
        llm.engine.step()
    assert not request.is_long
    size = runner.shapes[0].key_dim
    like, vector = torch.empty(0, size).double(), torch.randn(size).double()
    ahead = (1, 7, 4000)
    for layer in range(runner.depth):
        turn = runner.streaming.mean_rotation(like, ahead, layer, request, 20)
        rotated = 2 * runner.streaming.pairs(like, layer)
        expected = {"gpt_neox": 4, "opt": 0}.get(family, size)
        if family == "smollm3" and layer % 2:  # every other layer has no positions
            expected = 0
        assert rotated == expected
        base = 10_000.0
        if family == "gemma3_text":
            base = 1e6 if runner.decoder.kinds[layer] == "full_attention" else 10_000.0
        if family == "smollm3":
            base = 2e6
        total = torch.zeros(size, dtype=torch.float64)
        for place in ahead:
            moved = vector.clone()
            for f in range(rotated // 2):
                pair = torch.complex(vector[f], vector[f + rotated // 2])
                angle = torch.tensor((19 + place) * base ** (-2 * f / max(rotated, 1))).double()
                pair = pair * torch.polar(torch.ones_like(angle), angle)
                moved[f], moved[f + rotated // 2] = pair.real, pair.imag
            total += moved / len(ahead)
        torch.testing.assert_close(vector @ turn, total, atol=2e-3, rtol=0)
    llm.engine.release(request)


def test_offsets_are_powers_of_two() -> None:
    assert TriAttention().offsets == tuple(2**power for power in range(17))
    assert TriAttention(offset_max=1).offsets == (1,)
    assert TriAttention(offset_max=100).offsets == (1, 2, 4, 8, 16, 32, 64)
    needs = TriAttention(keep=0.5, pin_prompt=False).needs(
        View("prefill", 0, LAYERS, 10, 10, (10, 10), 10, 10, TriAttention().start(LAYERS))
    )
    assert needs.keys and needs.ahead == TriAttention().offsets and needs.queries_from is None


def test_a_profile_without_centres_is_refused_with_the_way_out(tmp_path: Path) -> None:
    way_out = "centres of the model's queries.*make it again .pyramidinfer profile MODEL --force"
    old = NEEDED.save(tmp_path / "old.json")
    body = json.loads(old.read_text())
    del body["queries"]  # as such files were
    old.write_text(json.dumps(body))
    for profile in (NEEDED, str(old)):
        with pytest.raises(ValueError, match=way_out):
            LLM(tiny_model("llama"), policy=TriAttention(profile=profile), kv_memory="1MiB")
    with pytest.raises(ValueError, match="this model has none"):
        LLM(tiny_model("llama"), policy=TriAttention(profile=None), kv_memory="1MiB")
    other = replace(
        KNOWS["profile"], share=NEEDED.share[:3], governed=(True,) * 3, queries=centres(1, layers=3)
    )
    with pytest.raises(ValueError, match="has 3 layers with 2 KV heads, this model has 4 with 2"):
        LLM(tiny_model("llama"), policy=TriAttention(profile=other), kv_memory="1MiB")


def test_the_rule_says_what_was_measured() -> None:
    assert TriAttention().rule == ""
    policy = TriAttention(**KNOWS)
    assert policy.rule == "centres of the model's queries, as measured on a text"
    assert isinstance(policy.profile, Profile) and not asks_for_profile(policy)
    assert asks_for_profile(TriAttention())
