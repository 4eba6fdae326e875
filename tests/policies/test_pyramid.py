"""Pyramid: what its forecast, its budgets and its start reservation, on every kind of model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.policies import Pyramid, make_policy
from pyramidinfer.policies.by_head import ALL
from pyramidinfer.policies.profile import Calibrated, Fingerprint, Masks, Profile
from pyramidinfer.types import Layers
from tests.engine.build import build
from tests.tiny import random_prompt, tiny_model

SHARE = ((0.1, 0.9), (0.4, 0.2), (0.8, 0.3), (0.02, 0.05))
PROFILE = Profile(SHARE, (True,) * 4, "a text", (9,), 0.9, 0.2, "x", Fingerprint("k", (), ()))
FOUND = Calibrated(0, 0.5, 0.5, 1.0, 0.6, 0.01, 900, 20, 2)
LAYERS = Layers((True,) * 4, 2)
SMALL: dict[str, Any] = {
    "profile": PROFILE,
    "min_context": 8,
    "recent": 5,
    "window": 8,
    "kernel": 7,
}
WAYS: dict[str, dict[str, Any]] = {
    "need": {},
    "early": {"start_layer": 1, "propagate_ratio": 0.4},
    "start": {"start_layer": 1},
    "even": {"safeguard": 1.0},
    "sharp": {"sharpness": 4.0, "safeguard": 0.1},
    "calibrated": {"profile": replace(PROFILE, calibrated=FOUND)},
}
#: Profiles whose levels lie far apart, or that leave some heads nothing.
APART: dict[str, dict[str, Any]] = {
    "sharpest": {"sharpness": 8, "profile": replace(PROFILE, share=(*SHARE[:3], (1e-5, 0.0)))},
    "masks": {"profile": Masks(((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)))},
    "measured": {
        "profile": replace(PROFILE, share=((0.0, 0.9), (1e-4, 0.2), (0.8, 0.3), (0.02, 0.05))),
        "start_layer": 2,
        "propagate_ratio": 0.1,
    },
}


@cache
def model(family: str) -> Any:
    return tiny_model(family, torch.float64)


def engine(family: str = "llama", keep: float = 0.4, **options: Any) -> LLM:
    policy = Pyramid(**{**SMALL, "keep": keep, **options})
    return LLM(model(family), policy=policy, kv_memory="8MiB", page_size=4)


def limits(length: int = 1000, layers: Layers = LAYERS, **options: Any) -> list[tuple[int, ...]]:
    return list(Pyramid(**{**SMALL, "keep": 0.4, **options}).limits(length, layers))


def lengths(positions: Any) -> list[list[int]]:
    return [[len(head) for head in layer] for layer in positions]


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 1000, 5000])
@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("way", [*sorted(WAYS), "sharpest", "masks", "measured"])
def test_keep_is_the_mean_over_heads(way: str, keep: float, length: int) -> None:
    """Whole numbers lose less than an entry a head."""
    held = [
        min(n, length) for row in limits(length, keep=keep, **{**WAYS, **APART}[way]) for n in row
    ]
    assert keep * length - 1 < sum(held) / 8 <= keep * length + 1e-6


def test_budgets_go_by_need() -> None:
    """In proportion to its power, between the floor and the text."""
    found = limits(keep=0.3, sharpness=1.0, safeguard=0.5)
    level = found[1][0] / 0.4
    assert found[2][1] == pytest.approx(level * 0.3, abs=2)
    assert found[2][0] == pytest.approx(level * 0.8, abs=2)
    assert found[0][0] == found[3][0] == found[3][1] == 150, "the floor"
    sharper = limits(keep=0.3, sharpness=2.0, safeguard=0.5)
    assert sharper[0][1] > found[0][1] and sharper[1][0] < found[1][0]
    assert limits(keep=0.3, sharpness=0.0) == [(300, 300)] * 4


def test_a_head_that_may_hold_the_text_keeps_everything() -> None:
    """Also what is generated."""
    llm = engine(keep=0.5)
    found = limits(120, keep=0.5)
    whole = {(layer, head) for layer in range(4) for head in range(2) if found[layer][head] == ALL}
    assert whole == {(0, 1), (2, 0)}
    trace = llm.trace(random_prompt(1, 120), max_tokens=50)
    for layer in range(4):
        for head, positions in enumerate(trace.kept_positions[layer]):
            assert (len(positions) == 170) == ((layer, head) in whole)


def test_need_of_nothing_and_of_little_is_met_where_there_is_room() -> None:
    """However high the level must be for a sum that cannot be had."""
    bare = replace(PROFILE, share=((0.0, 0.9), (1e-4, 0.2), (0.8, 0.3), (0.02, 0.05)))
    found = limits(profile=bare, keep=0.85, safeguard=0.1)
    assert (found[0][0], found[1][0]) == (85, 0.85 * 8000 - 6 * 1000 - 85)
    assert [n for row in found for n in row].count(ALL) == 6
    found = limits(profile=bare, keep=0.9, safeguard=0.1)
    assert found[0][0] == 200 and [n for row in found for n in row].count(ALL) == 7
    idle = replace(PROFILE, share=((0.0, 0.9), (0.0, 0.0), (0.8, 0.3), (0.0, 0.0)))
    assert limits(profile=idle, keep=0.5) == [(200, ALL), (200, 200), (ALL, ALL), (200, 200)]


def test_layers_that_were_not_measured_keep_everything() -> None:
    half = replace(PROFILE, share=((0.0, 0.0), *SHARE[1:]), governed=(False, True, True, True))
    assert limits(500, profile=half)[0] == (ALL, ALL)
    trace = engine(profile=half, keep=0.3).trace(random_prompt(1, 100), max_tokens=20)
    assert lengths(trace.kept_positions)[0] == [120, 120]
    assert min(map(min, lengths(trace.kept_positions))) < 30


# --- what is reserved -------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("length", [1, 13, 211])
@pytest.mark.parametrize("new", [0, 45])
def test_forecast_bounds_what_happens(way: str, length: int, new: int) -> None:
    """What reaches a layer is known beforehand; a head holds its bound, one entry aside."""
    llm = engine(**WAYS[way])
    trace = llm.trace(random_prompt(2, length), max_tokens=new)
    forecast = llm.policy.forecast(length, new, LAYERS)
    assert trace.computed_by_layer == forecast.reach
    bound = torch.tensor(forecast.heads)
    assert bound.amax(1).tolist() == forecast.kept
    most = torch.tensor([lengths(trace.prefill_positions), *trace.kept_len_by_step]).amax(0)
    assert (most <= bound).all() and (most >= bound - 1).all()


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_limits_hold_at_every_step(way: str, keep: float) -> None:
    """For prompt and generated tokens alike; what always stays is there."""
    llm = engine(keep=keep, **WAYS[way])
    trace = llm.trace(random_prompt(3, 150), max_tokens=60)
    bound = torch.tensor(limits(150, keep=keep, **WAYS[way]))
    for row in [lengths(trace.prefill_positions), *trace.kept_len_by_step]:
        held = torch.tensor(row)
        assert (held <= bound).all()
        if bound.max() < ALL:
            assert held.float().mean() <= keep * 150
    for layer in trace.kept_positions:
        for head in layer:
            assert {*range(4), *range(205, 210)} <= set(head.tolist())


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_entries_are_dropped_stride_by_stride(keep: float) -> None:
    """A head that is over its limit makes room for the next few tokens at once."""
    for stride in (1, 4, 16):
        llm = engine(keep=keep, stride=stride, safeguard=1.0)
        rows = [row[0][0] for row in llm.trace(random_prompt(5, 200), 48).kept_len_by_step]
        budget = round(keep * 200)
        room = min(stride, budget // 4)
        assert set(rows) == set(range(budget + 1 - room, budget + 1))
        assert rows.count(budget + 1 - room) == -(-48 // room)


@pytest.mark.parametrize("options", [{}, {"recent": 2, "sinks": 0}, {"stride": 3}, {"recent": 64}])
def test_the_smallest_heads_make_room_as_others_do(options: dict[str, Any]) -> None:
    """What always stays does not take up the whole budget."""
    policy = Pyramid(**{"keep": 0.01, "profile": PROFILE, "min_context": 8, **options})
    llm = LLM(model("llama"), policy=policy, kv_memory="8MiB", page_size=4)
    trace = llm.trace(random_prompt(5, 200), 60)
    limit = policy.limits(200, LAYERS)[3][0]
    room = min(policy.stride, max(1, limit // 4))
    rows = [row[3][0] for row in trace.kept_len_by_step]
    assert set(rows) == set(range(limit + 1 - room, limit + 1))
    assert rows.count(limit + 1 - room) == -(-60 // room)


# --- what goes deeper -------------------------------------------------------------------------


def test_layers_of_little_need_get_few_tokens() -> None:
    """Layer 3 holds 0.07 of 2.77: as much goes there as its fullest head holds."""
    found = limits(200, keep=0.4)
    assert engine().trace(random_prompt(1, 200)).computed_by_layer == [200] * 3 + [max(found[3])]
    late = replace(PROFILE, share=(*SHARE[:3], (0.3, 0.05)))
    trace = engine(profile=late).trace(random_prompt(1, 200))
    assert trace.computed_by_layer == [200] * 4


def test_a_start_and_a_share_that_are_given() -> None:
    prompt = random_prompt(1, 200)
    given = {"start_layer": 0, "propagate_ratio": 0.35}
    assert engine(**given).trace(prompt).computed_by_layer[:2] == [200, 70]
    found = torch.tensor(limits(200, keep=0.5, **given))
    assert found[0].tolist() == [ALL, ALL] and found[1:].max() == 70, "what is left goes before"
    found = torch.tensor(limits(200, keep=0.6, **given))
    assert found[1:].max() == 93, "before it all is full, so more goes deeper"
    trace = engine(keep=0.6, **given).trace(prompt)
    assert trace.computed_by_layer == [200, 93, 93, 93]
    calibrated = replace(PROFILE, calibrated=FOUND)
    assert engine(profile=calibrated).trace(prompt).computed_by_layer[:2] == [200, 100]
    assert engine(profile=calibrated, **given).trace(prompt).computed_by_layer[:2] == [200, 70]
    assert engine(start_layer=3, keep=0.1).trace(prompt).computed_by_layer == [200] * 4


def test_queries_that_score_go_to_every_layer() -> None:
    """Also more of them than always stay."""
    llm = engine(keep=0.1, window=30, start_layer=0, propagate_ratio=0.01)
    trace = llm.trace(random_prompt(1, 200), max_tokens=20)
    assert trace.computed_by_layer == [200, 35, 35, 35]


# --- texts that are short ---------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("length", [1, 30, 80, 99])
def test_a_short_text_gets_what_a_longer_one_would(way: str, length: int) -> None:
    options = {**WAYS[way], "min_context": 100, "keep": 0.3}
    trace = engine(**options).trace(random_prompt(1, length), max_tokens=5)
    reach = engine(**options).trace(random_prompt(1, 100)).computed_by_layer
    assert trace.computed_by_layer == [min(length, each) for each in reach]
    for row, most, going in zip(
        lengths(trace.prefill_positions), limits(100, **options), reach, strict=True
    ):
        assert row == [min(length, limit, going) for limit in most]


def test_what_always_stays_sets_the_least() -> None:
    """Sinks, recent tokens and room for a few, however little is asked for."""
    trace = engine(keep=0.01, sinks=3, recent=11).trace(random_prompt(1, 200), max_tokens=20)
    assert lengths(trace.prefill_positions) == [[18, 18]] * 4
    assert max(max(map(max, row)) for row in trace.kept_len_by_step) == 18
    for layer in trace.kept_positions:
        for head in layer:
            assert {0, 1, 2, *range(209, 220)} <= set(head.tolist())


# --- further turns ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_further_turns_are_dealt_the_whole_text(way: str) -> None:
    llm = engine(**WAYS[way])
    params, turn = SamplingParams(max_tokens=12, ignore_eos=True), None
    for seed, length in enumerate((120, 3, 70, 9)):
        prompt = random_prompt(seed, length)
        if turn is None:
            turn = llm.engine.add(prompt, params, hold=True)
        else:
            turn = llm.engine.extend(turn, prompt, params, hold=True)
            turn.table.peak_bytes = 0  # what earlier turns held is not this one's
        while turn.finish_reason is None:
            llm.engine.step()
            llm.engine.pool.check()
        assert turn.kv is not None
        bound = torch.tensor(limits(len(turn.prompt), **WAYS[way]))
        assert turn.table.state["limits"].equal(bound)
        assert (torch.tensor(turn.kv.kept_len) <= bound).all()
        assert turn.kv.peak_bytes <= turn.cost.bytes
        new = length + (seed > 0)  # the last answer's last token goes in with the next turn
        assert turn.computed == llm.policy.forecast(new, 0, LAYERS).reach
    llm.engine.release(turn)
    llm.engine.check()


# --- budgets that are lowered -------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_lower_keep_lowers_limits(way: str) -> None:
    policy = Pyramid(**{**SMALL, "keep": 0.6, **WAYS[way]})
    now = torch.tensor(policy.limits(300, LAYERS))
    state = {**policy.start(LAYERS), "text": torch.tensor(300), "limits": now}
    assert policy.tightened(0.6, state, LAYERS) is None
    found = policy.tightened(0.3, state, LAYERS)
    assert found is not None and found[0] == replace(policy, keep=0.3)
    after = found[1]["limits"]
    assert after.equal(now.minimum(torch.tensor(found[0].limits(300, LAYERS))))
    assert after.clamp(max=300).float().mean() <= 90 and not after.equal(now)


# --- kinds of models --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["auto", "early"])
@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen2", "opt", "smollm3"])
def test_other_kinds_of_layers(family: str, way: str) -> None:
    """Sliding windows bound their layers alone; without rotary positions all is the same."""
    profile = PROFILE if family == "mistral" else "auto"  # no layer of it can be measured
    llm = engine(family, **{"profile": profile, **(WAYS[way] if way == "early" else {})})
    layers = llm.engine.runner.layers_for(150)
    forecast = llm.policy.forecast(120, 30, layers)
    trace = llm.trace(random_prompt(4, 120), max_tokens=30)
    windows = [shape.window for shape in llm.engine.runner.shapes]
    assert forecast.heads is not None
    for layer, governed in enumerate(layers.governed):
        ends = trace.kept_len_by_step[-1][layer]
        if governed:
            most = torch.tensor([row[layer] for row in trace.kept_len_by_step]).amax(0)
            assert (most <= torch.tensor(forecast.heads[layer])).all()
        else:
            window = windows[layer]
            assert window is not None and max(ends) <= window + llm.engine.pool.page_size
    assert trace.computed_by_layer == forecast.reach
    if way == "early":  # tokens are dropped after the first governed layer that may
        start = next((i for i in range(1, layers.count - 1) if layers.governed[i]), layers.count)
        assert trace.computed_by_layer[: start + 1] == [120] * min(start + 1, layers.count)
        assert all(count <= 48 for count in trace.computed_by_layer[start + 1 :])
    if any(layers.governed):
        kept = [
            n
            for row, is_ours in zip(trace.kept_len_by_step[-1], layers.governed, strict=True)
            for n in row
            if is_ours
        ]
        assert min(kept) < 60, "nothing was dropped"
    llm.engine.check()


def test_a_start_is_a_layer_that_scores() -> None:
    """Nothing is dropped after a layer with a sliding window, so the next one gets all tokens."""
    layers = Layers((False, True, False, True), 2)
    share = ((0.0, 0.0), (0.9, 0.2), (0.0, 0.0), (0.3, 0.1))
    profile = replace(PROFILE, share=share, governed=layers.governed)
    policy = Pyramid(keep=0.3, profile=profile, start_layer=2, propagate_ratio=0.1)
    assert policy.begin(layers) == 3
    assert [policy.going(layer, 2000, layers) for layer in range(3)] == [2000] * 3
    plain = Pyramid(keep=0.3, profile=profile, start_layer=3)
    assert policy.limits(2000, layers) == plain.limits(2000, layers)
    first = Pyramid(profile=profile, start_layer=0)
    assert first.begin(layers) == 1 and first.going(1, 2000, layers) == 2000
    assert first.rule.endswith("; nothing is dropped between layers"), "a window needs its tokens"
    early = replace(first, keep=0.3, propagate_ratio=0.25)
    assert early.rule.endswith("; after layer 1, at most 25% of the text goes deeper")
    ends = Layers((True, False, False, False), 2)
    assert Pyramid(profile=profile, start_layer=2).begin(ends) == 4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_kept_is_the_full_cache(family: str) -> None:
    """To the last bit, whatever else is asked for."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate((70, 15, 100))]
    params = SamplingParams(max_tokens=12, logprobs=120, ignore_eos=True)
    whole = build("full", family, dtype=torch.float32).generate(prompts, params)
    profile = PROFILE if family == "mistral" else "auto"
    policy = Pyramid(keep=1.0, min_context=8, profile=profile)
    llm = LLM(tiny_model(family), policy=policy, kv_memory="4MiB", page_size=4)
    for mine, theirs in zip(llm.generate(prompts, params), whole, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == theirs.logprobs
        assert mine.kv.kept_len == theirs.kv.kept_len
        assert mine.kv.bytes == theirs.kv.bytes
        assert mine.metrics.computed_share == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_side_by_side_is_as_alone(family: str) -> None:
    """Each request has its own budgets, whatever runs beside it."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate((90, 30, 140, 8))]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    options = {"profile": "auto", **WAYS["early"]}
    llm = engine(family, **options)
    together = llm.generate(prompts, params)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = engine(family, **options).generate([prompt], params)
        assert out.token_ids == alone.token_ids
        assert out.kv.kept_len == alone.kv.kept_len
        assert out.metrics.computed_share == alone.metrics.computed_share
    llm.engine.check()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": None}, "keep=None: give a share"),
        ({"start_layer": -1}, "start_layer=-1 must be a whole number of at least 0"),
        ({"start_layer": 1.0}, "start_layer=1.0"),
        ({"propagate_ratio": 1.5}, "propagate_ratio=1.5 must lie between 0 and 1"),
        ({"safeguard": -0.1}, "safeguard=-0.1 must lie between 0 and 1"),
        ({"sharpness": -1}, "sharpness=-1 must lie between 0 and 8"),
        ({"sharpness": 8.5}, "sharpness=8.5 must lie between 0 and 8"),
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"kernel": 2}, "kernel=2 must be an odd number"),
        ({"sinks": -1}, "sinks=-1 must be a whole number of at least 0"),
        ({"recent": 0}, "recent=0 must be a whole number of at least 1"),
        ({"min_context": 0}, "min_context=0"),
        ({"stride": 0}, "stride=0"),
        ({"profile": 3}, "profile=3 must be a path"),
        ({"budgets": "level"}, "no option 'budgets'"),
        ({"schedule": None}, "no option 'schedule'"),
    ],
)
def test_wrong_options_name_what_would_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**options)


def test_a_start_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="start_layer=4: the model has 4 layers, 0 to 3"):
        engine(start_layer=4)


def test_a_model_without_a_profile_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path))
    way_out = "needs a head profile.*pyramidinfer profile MODEL.*profile=FILE"
    for options in ({"policy": "pyramid", "profile": False}, {"policy": Pyramid(profile=None)}):
        with pytest.raises(ValueError, match=f"policy 'pyramid' {way_out}"):
            LLM(tiny_model("llama"), kv_memory="4MiB", **options)
    with pytest.raises(ValueError, match="profile has 4 layers with 2 KV heads, this model has"):
        LLM(tiny_model("opt"), policy=Pyramid(profile=PROFILE), kv_memory="4MiB")


@pytest.mark.parametrize("method", ["pyramid", "duo"])
def test_a_given_profile_must_be_of_these_weights(method: str, tmp_path: Path) -> None:
    """At the engine's start and in a request, from a file and as an object."""
    own = LLM(model("llama"), policy="full", kv_memory="8MiB")
    found, path = fingerprint(own.engine.runner), tmp_path / "heads.json"
    (size, *ways), *rest = found.vectors
    trained_on = replace(found, vectors=((1.1 * size, *ways), *rest))
    message = (
        "the profile belongs to other weights.*pyramidinfer profile MODEL.*or leave profile=FILE"
    )
    for mark in (trained_on, replace(found, key="other-1"), found):
        replace(PROFILE, fingerprint=mark).save(path)
        for profile in (str(path), Profile.load(path)):
            policy = make_policy(method, 0.4, profile=profile)
            if mark == found:
                LLM(model("llama"), policy=policy, kv_memory="8MiB")
                own.engine.make([1, 2], SamplingParams(), policy=policy)
                continue
            with pytest.raises(ValueError, match=message):
                LLM(model("llama"), policy=policy, kv_memory="8MiB")
            with pytest.raises(ValueError, match=message):
                own.engine.make([1, 2], SamplingParams(), policy=policy)
