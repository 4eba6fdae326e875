"""Duo's heads: who keeps what, what is reserved, what does not suit it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import Duo, Full, SnapKV
from pyramidinfer.policies.by_head import ALL
from pyramidinfer.policies.profile import Fingerprint, Profile, load_heads
from pyramidinfer.types import Layers
from tests.engine.serving import finish, model, queue, start, step
from tests.tiny import random_prompt, tiny_model

SHARE = ((0.1, 0.9), (0.4, 0.2), (0.8, 0.3), (0.02, 0.05))
PROFILE = Profile(SHARE, (True,) * 4, "a text", (9,), 0.9, 0.2, "x", Fingerprint("k", (), ()))
LAYERS = Layers((True,) * 4, 2)
SMALL: dict[str, Any] = {"profile": PROFILE, "sinks": 2, "recent": 8, "min_context": 8}


def test_the_most_needed_heads_keep_everything() -> None:
    """At 1,010 tokens: 0.5 of them in the mean are 3.96 whole heads beside windows of 10."""
    limits = Duo(keep=0.5, **SMALL).limits(1010, LAYERS)
    whole = {(layer, head) for layer in range(4) for head in range(2) if limits[layer][head] == ALL}
    assert whole == {(0, 1), (2, 0), (1, 0)}
    assert limits[2][1] == 10 + int(0.5 * 1010 * 8 - 80 - 3 * 1000)
    assert sum(min(limit, 1010) for row in limits for limit in row) == int(0.5 * 1010 * 8)
    assert {limits[0][0], limits[1][1], *limits[3]} == {10}


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.77, 1.0])
def test_keep_is_the_mean_over_heads(keep: float) -> None:
    limits = Duo(keep=keep, **SMALL).limits(2000, LAYERS)
    held = sum(min(limit, 2000) for row in limits for limit in row) / (8 * 2000)
    assert held == pytest.approx(max(keep, 10 / 2000), abs=1e-3)
    assert keep < 1 or {limit for row in limits for limit in row} == {ALL}, (
        "nothing is dropped at 1"
    )


def test_deep_layers_that_hold_little_get_heads_last() -> None:
    """Layer 3 holds 0.07 of 2.77."""
    deep = replace(PROFILE, share=(*SHARE[:2], (0.3, 0.8), (0.95, 0.02)))
    for share, spare, last in ((PROFILE, 0.1, 2), (deep, 0.1, 3), (deep, 0.4, 2)):
        policy = Duo(keep=0.4, **{**SMALL, "profile": share}, spare=spare)
        assert policy.last(LAYERS) == last
        reach = policy.forecast(500, 10, LAYERS).reach
        assert reach == [500] * (last + 1) + [10] * (3 - last)


def test_layers_that_were_not_measured_keep_everything() -> None:
    """A window that a short text cannot outgrow governs nothing then; its heads are not dealt."""
    share = ((0.0, 0.0), *SHARE[1:])
    half = replace(PROFILE, share=share, governed=(False, True, True, True))
    policy = Duo(keep=0.3, **{**SMALL, "profile": half})
    assert policy.limits(500, LAYERS)[0] == (ALL, ALL)
    llm = LLM(model("llama"), policy=policy, kv_memory="4MiB", page_size=4)
    kept = llm.trace(random_prompt(1, 100)).prefill_positions
    assert [len(head) for head in kept[0]] == [100, 100]
    assert min(len(head) for layer in kept[1:] for head in layer) == 10


def test_forecast_is_what_every_head_holds() -> None:
    policy = Duo(keep=0.4, **SMALL, stride=4)
    llm = LLM(model("llama"), policy=policy, kv_memory="4MiB", page_size=4)
    forecast = policy.forecast(200, 50, LAYERS)
    trace = llm.trace(random_prompt(1, 200), max_tokens=50)
    assert trace.computed_by_layer == forecast.reach
    assert forecast.heads is not None
    most = torch.tensor(trace.kept_len_by_step).amax(0)
    bound = torch.tensor(forecast.heads)
    assert (most <= bound).all() and (most >= bound - 1).all()
    assert len(set(most.flatten().tolist())) >= 3, "heads are not equally long"


@pytest.mark.parametrize(
    "policy",
    [
        Duo(keep=0.4, **SMALL, stride=4),
        SnapKV(keep=0.4, window=4, adaptive=True),
    ],
    ids=["duo", "adaptive"],
)
@pytest.mark.parametrize("admission", ["reserve", "overcommit"])
def test_unequal_heads_stay_within_what_is_reserved(policy: Any, admission: str) -> None:
    """Requests side by side with a full one, and swapped: every step is checked, and tokens are
    those of each alone."""
    engine = start(policy, admission=admission)
    plans = [(policy, 60, 30), (Full(), 40, 30), (policy, 90, 20), (policy, 33, 40)]
    requests = [
        queue(engine, random_prompt(seed, length), new, each)
        for seed, (each, length, new) in enumerate(plans)
    ]
    steps = 0
    while not engine.scheduler.idle:
        step(engine)
        steps += 1
        if admission == "overcommit" and steps in (8, 20):
            engine.scheduler._preempt()  # the youngest goes to host memory, and comes back
    assert engine.scheduler.counts.resumed == (2 if admission == "overcommit" else 0)
    for request, (each, _, _) in zip(requests, plans, strict=True):
        alone = start(each)
        one = queue(alone, request.prompt, request.max_new, each)
        finish(alone)
        assert request.output == one.output
        assert request.kv is not None and one.kv is not None
        assert request.kv.kept_len == one.kv.kept_len
        assert (len({n for row in one.kv.kept_len for n in row}) > 1) == (each is policy)


def test_a_question_that_comes_later_finds_long_heads() -> None:
    """Prefix, fork, and truncation leave heads of their own lengths."""
    policy = Duo(keep=0.4, **SMALL)
    llm = LLM(model("llama"), "full", kv_memory="4MiB", page_size=4)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with llm.prefill(random_prompt(1, 120), policy) as held:
        before = held.kv.kept_len
        assert len({n for row in before for n in row}) >= 3
        first, second = (
            llm.generate([random_prompt(seed, 20)], params, prefix=held)[0] for seed in (2, 3)
        )
        assert held.kv.kept_len == before and first.token_ids != second.token_ids
        assert max(map(max, first.kv.kept_len)) == 120 + 20 + 4
    request = llm.engine.make(random_prompt(1, 120), params, policy=policy, hold=True)
    llm.engine.submit(request)
    finish(llm.engine)
    llm.engine.truncate(request, 60)
    kept = request.table.kept
    assert kept.max() == 60 and kept.min() == 2, "a streaming head has its first tokens left"
    llm.engine.release(request)


def test_a_model_it_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="profile has 4 layers with 2 KV heads, this model has"):
        LLM(tiny_model("opt"), policy=Duo(profile=PROFILE), kv_memory="4MiB")
    with pytest.raises(ValueError, match="needs a head profile"):
        LLM(tiny_model("llama"), policy=Duo(profile=None), kv_memory="4MiB")
    with pytest.raises(ValueError, match="cannot be read"):
        Duo(profile=str(tmp_path / "none.json"))


def test_nothing_is_measured_where_that_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="needs a head profile"):
        LLM(tiny_model("llama"), policy="duo", kv_memory="4MiB", profile=False)
    assert LLM(tiny_model("llama"), policy="duo", kv_memory="4MiB").policy != Duo()
    # that of random tokens was not stored
    with pytest.raises(ValueError, match="needs a head profile"):
        LLM(tiny_model("llama"), policy="duo", kv_memory="4MiB", profile=False)


def test_masks_of_duo_attention(tmp_path: Path) -> None:
    """Rows are layers, columns KV heads; numbers beyond 0 and 1 are cut."""
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.1\t0.9\n0.4\t-0.2\n1.8\t0.3\n0.02\t0.05\n")
    policy = Duo(keep=0.5, **{**SMALL, "profile": str(path)})
    assert load_heads(path).share == ((0.1, 0.9), (0.4, 0.0), (1.0, 0.3), (0.02, 0.05))
    limits = policy.limits(1010, LAYERS)
    assert [limits[2][0], limits[0][1], limits[1][0]] == [ALL] * 3
    LLM(tiny_model("llama"), policy=policy, kv_memory="4MiB")
    for text in ("0.1\tx\n", "0.1 0.2\n0.3\n", "\n", "0.1\tnan\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not hold DuoAttention masks"):
            Duo(profile=str(path))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": None},
        {"keep": 0},
        {"recent": 0},
        {"spare": 2},
        {"stride": 0},
        {"profile": 3},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Duo(**options)
