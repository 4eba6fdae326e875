"""Pyramid: what its forecast, its budgets and its start promise, on every kind of model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import Pyramid, Schedule
from pyramidinfer.types import Layers
from tests.engine.build import build
from tests.tiny import lengths_of, of_layers, random_prompt, tiny_model

SMALL: dict[str, Any] = {"min_context": 8, "window": 8, "schedule": None}
PLAN = Schedule(
    start_layer=1, propagate=0.4, shares=(0.1, 0.5, 1.0),
    loss=((0.9, 0.1, 0.0), (0.5, 0.05, 0.0), (0.2, 0.01, 0.0), (0.04, 0.0, 0.0)),
    heads="max", kernel=3, keep=0.4, kl=0.01,
)  # fmt: skip
FOUND, NEVER, FIXED = {"stable": 0.0}, {"stable": 1.0}, {"start_layer": 1}
WAYS: dict[str, dict[str, Any]] = {
    "found": FOUND,
    "never": NEVER,
    "fixed": FIXED,
    "schedule": {"schedule": PLAN},
    "curve": {**FOUND, "curve": "linear", "budgets": "cosine"},
}


@cache
def model(family: str) -> Any:
    return tiny_model(family, torch.float64)


def engine(family: str = "llama", keep: float = 0.4, **options: Any) -> LLM:
    policy = Pyramid(**{**SMALL, "keep": keep, **options})
    return LLM(model(family), policy=policy, kv_memory="8MiB", page_size=4, poison=True)


def share_of(lengths: list[int], text: int) -> float:
    return sum(lengths) / (len(lengths) * text)


# --- what is promised -------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("length", [1, 13, 211])
@pytest.mark.parametrize("new", [0, 45])
def test_forecast_bounds_what_happens(way: str, length: int, new: int) -> None:
    llm = engine(**WAYS[way])
    trace = llm.trace(random_prompt(2, length), max_tokens=new)
    forecast = llm.policy.forecast(length, new, Layers((True,) * 4))
    computed, kept = trace.computed_by_layer, lengths_of(trace.prefill_positions)
    for layer in range(4):
        assert computed[layer] <= forecast.reach[layer]
        most = max([kept[layer], *(max(row[layer]) for row in trace.kept_len_by_step)])
        assert most <= forecast.kept[layer]
    if way in ("fixed", "schedule"):  # nothing is left to find, so it is exact
        assert computed == forecast.reach
    if way == "found" and length > 100:
        assert computed[2:] < forecast.reach[2:]


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize(("keep", "budgets"), [(0.25, "rising"), (0.8, "level")])
def test_keep_is_not_exceeded_while_generating(way: str, keep: float, budgets: str) -> None:
    """Each layer holds its budget at every step, for prompt and generated tokens alike."""
    llm = engine(keep=keep, **{"budgets": budgets, **WAYS[way]})
    policy, layers = llm.policy, Layers((True,) * 4)
    assert isinstance(policy, Pyramid)
    trace = llm.trace(random_prompt(3, 150), max_tokens=60)
    budget = [policy.budget(layer, 150, layers) for layer in range(4)]
    later = map(of_layers, trace.kept_len_by_step)
    for lengths in [lengths_of(trace.prefill_positions), *later]:
        assert all(held <= most for held, most in zip(lengths, budget, strict=True))
        if min(budget) > policy.floor():  # what always stays is kept beyond it
            assert share_of(lengths, 150) <= keep + 0.5 / 150
    newest = set(range(150 + 60 - 8, 150 + 60))
    for head in trace.kept_positions[0]:
        assert newest | {0, 1, 2, 3} <= set(head.tolist()), "the window and the sinks stay"


@pytest.mark.parametrize("way", ["never", "fixed", "schedule"])
def test_what_deep_layers_cannot_hold_goes_to_the_others(way: str) -> None:
    """The mean is ``keep``, where the start is known beforehand as where nothing is dropped."""
    trace = engine(keep=0.5, **WAYS[way]).trace(random_prompt(3, 200))
    lengths = lengths_of(trace.prefill_positions)
    assert share_of(lengths, 200) == pytest.approx(0.5, abs=0.5 / 200)
    assert (len(set(lengths)) > 1) == (way != "never")


def test_a_start_that_is_found_leaves_deep_layers_with_less() -> None:
    trace = engine(keep=0.5, **FOUND).trace(random_prompt(3, 200))
    assert trace.computed_by_layer == [200, 200, 40, 40]
    assert lengths_of(trace.prefill_positions) == [100, 100, 40, 40]


def test_where_layers_never_agree_all_is_computed() -> None:
    llm = engine(keep=0.3, **NEVER)
    trace = llm.trace(random_prompt(3, 200), max_tokens=30)
    assert trace.computed_by_layer == [200] * 4
    assert lengths_of(trace.prefill_positions) == [60] * 4
    assert max(max(of_layers(row)) for row in trace.kept_len_by_step) == 60
    out = llm.generate([random_prompt(3, 200)], SamplingParams(max_tokens=2))[0]
    assert out.metrics.computed_share == 1


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_entries_are_dropped_stride_by_stride(keep: float) -> None:
    """A layer that is over its budget makes room for the next few tokens at once."""
    for stride in (1, 4, 16):
        llm = engine(keep=keep, stride=stride, **NEVER)
        rows = llm.trace(random_prompt(5, 200), 40).kept_len_by_step
        lengths = [of_layers(row)[0] for row in rows]
        budget = round(keep * 200)
        room = min(stride, max(1, budget // 16))
        assert set(lengths) == set(range(budget + 1 - room, budget + 1))
        assert lengths.count(budget + 1 - room) == -(-40 // room)


# --- texts that are short ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 40, 63, 64])
@pytest.mark.parametrize(
    "options",
    [
        FOUND,
        NEVER,
        {**FOUND, "budgets": "cosine"},
        {"start_layer": 0},
        {"start_layer": 1, "budgets": "rising"},
        {"schedule": PLAN},
    ],
)
def test_short_prompts_lose_nothing(length: int, options: dict[str, Any]) -> None:
    llm = LLM(model("llama"), policy=Pyramid(keep=0.1, **options), kv_memory="4MiB", poison=True)
    trace = llm.trace(random_prompt(1, length))
    assert trace.computed_by_layer == [length] * 4
    for positions in trace.prefill_positions:
        assert [head.tolist() for head in positions] == [list(range(length))] * 2


@pytest.mark.parametrize("length", [65, 100, 400])
def test_longer_ones_are_not_cut_below_it(length: int) -> None:
    """So many tokens go deeper, and so many are kept in the mean over layers."""
    for options in (FOUND, NEVER):
        policy = Pyramid(keep=0.01, propagate_ratio=0.01, **options)
        trace = LLM(model("llama"), policy=policy, kv_memory="8MiB").trace(random_prompt(1, length))
        whole = 2 if options is FOUND else 4
        assert trace.computed_by_layer == [length] * whole + [64] * (4 - whole)
        assert lengths_of(trace.prefill_positions) == [64] * 4


def test_what_always_stays_sets_the_least() -> None:
    """Sinks, window and one entry more, however little is asked for."""
    policy = Pyramid(keep=0.01, min_context=1, window=11, sinks=3, start_layer=0)
    llm = LLM(model("llama"), policy=policy, kv_memory="4MiB", poison=True)
    trace = llm.trace(random_prompt(1, 200), max_tokens=20)
    assert lengths_of(trace.prefill_positions) == [15] * 4
    assert max(max(of_layers(row)) for row in trace.kept_len_by_step) == 15
    for layer, positions in enumerate(trace.kept_positions):
        for head in positions:
            assert {0, 1, 2, *range(209, 220)} <= set(head.tolist()), layer


# --- further turns ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_further_turns_keep_a_share_of_the_whole_text(way: str) -> None:
    llm = engine(**WAYS[way])
    policy = llm.policy
    assert isinstance(policy, Pyramid)
    params, turn = SamplingParams(max_tokens=12, ignore_eos=True), None
    for seed, length in enumerate((120, 3, 70, 9)):
        prompt = random_prompt(seed, length)
        if turn is None:
            turn = llm.engine.add(prompt, params, hold=True)
        else:
            turn = llm.engine.extend(turn, prompt, params, hold=True)
            assert turn.sequence is not None
            turn.sequence.table.peak_bytes = 0  # what earlier turns held is not this one's
        while turn.finish_reason is None:
            llm.engine.step()
            llm.engine.pool.check()
        text, layers = len(turn.prompt), Layers((True,) * 4)
        assert turn.kv is not None
        for layer, kept in enumerate(of_layers(turn.kv.kept_len)):
            assert kept <= policy.budget(layer, text, layers)
        assert turn.kv.peak_bytes <= turn.cost.bytes
        new = length + (seed > 0)  # the last answer's last token goes in with the next turn
        assert turn.computed[0] == new
        dropped = way != "never" and length > 60
        assert (turn.computed[3] < new) == dropped
    llm.engine.release(turn)
    llm.engine.check()


# --- kinds of models --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["found", "never", "fixed"])
@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen2", "opt", "smollm3"])
def test_other_kinds_of_layers(family: str, way: str) -> None:
    """Sliding windows bound their layers alone; without rotary positions all is the same."""
    llm = engine(family, **WAYS[way])
    layers = llm.engine.adapter.layers_for(150)
    prompt, new = random_prompt(4, 120), 30
    forecast = llm.policy.forecast(120, new, layers)
    trace = llm.trace(prompt, max_tokens=new)
    windows = [shape.window for shape in llm.engine.adapter.shapes]
    ends = of_layers(trace.kept_len_by_step[-1])
    for layer, governed in enumerate(layers.governed):
        assert trace.computed_by_layer[layer] <= forecast.reach[layer]
        if governed:
            assert max(max(row[layer]) for row in trace.kept_len_by_step) <= forecast.kept[layer]
            assert ends[layer] < 120
        else:
            window = windows[layer]
            assert window is not None and ends[layer] <= window + llm.engine.pool.page_size
    first = trace.computed_by_layer.count(120)
    compared = [layer for layer in range(layers.count - 1) if layers.governed[layer]]
    if way == "fixed":
        assert first == 1 + next((i for i in compared if i >= 1), layers.count - 1)
    elif way == "found":  # two layers at least must be compared
        assert first == 1 + (compared[1] if len(compared) > 1 else layers.count - 1)
    else:
        assert first == layers.count
    llm.engine.check()


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "opt"])
def test_all_kept_and_all_computed_is_the_full_cache(family: str) -> None:
    prompts = [random_prompt(seed, length) for seed, length in enumerate((70, 15, 100))]
    params = SamplingParams(max_tokens=1, logprobs=120, ignore_eos=True)
    whole = build("full", family).generate(prompts, params)
    policy = {"keep": 1.0, "propagate_ratio": 1.0, **FOUND}
    for mine, theirs in zip(engine(family, **policy).generate(prompts, params), whole, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.kv.bytes == theirs.kv.bytes == theirs.kv.full_bytes
        assert mine.logprobs is not None and theirs.logprobs is not None
        assert mine.logprobs[0].top == pytest.approx(theirs.logprobs[0].top, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_side_by_side_is_as_alone(family: str) -> None:
    """Each request finds its own start, whatever runs beside it."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate((90, 30, 140, 8))]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    llm = engine(family, stable=0.2)
    together = llm.generate(prompts, params)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = engine(family, stable=0.2).generate([prompt], params)
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
        ({"budgets": "falling"}, "budgets='falling' is unknown.*level"),
        ({"curve": "constant"}, "curve='constant' is unknown.*step"),
        ({"stable": -0.1}, "stable=-0.1 must lie between 0 and 1"),
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"kernel": 2}, "kernel=2 must be odd"),
        ({"heads": "mx"}, "heads='mx' is unknown; did you mean 'max'"),
        ({"min_context": 0}, "min_context=0"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_wrong_options_name_what_would_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**options)


def test_a_start_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="start_layer=4: the model has 4 layers, 0 to 3"):
        engine(start_layer=4)
    trace = engine(start_layer=3, keep=0.5).trace(random_prompt(1, 100))
    assert trace.computed_by_layer == [100] * 4
