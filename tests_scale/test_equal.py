"""Every policy on every family gives the same on one rank and on several (float64)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.build import policy_named
from tests.policies.test_golden import CASES, GOLDEN, official
from tests.scale.build import CONFIG, STAGES, TWO, Answer, answers
from tests.scale.spawn import run_cases
from tests.scale.threads import split_engine
from tests.scale.worker import Case
from tests.tiny import of_layers, tiny_config, tiny_model

from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import load_model
from pyramidinfer.policies import POLICIES, Policy

#: Every layer of the tiny model slides, so there is no head profile to be had.
UNPROFILED = {"mistral": {"duo", "pyramid", "triattention"}}
#: By number of stages, families of which a stage has no layer with keys that a policy could turn.
UNTURNED = {4: {"gemma2", "gemma3_text", "qwen2", "smollm3"}, 2: {"qwen2"}}


#: Ranks that split layers, and stages.
SPLITS = [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]


def layers_of(family: str, stages: int) -> list[int] | None:
    """Layers of each stage, unevenly where that can be."""
    depth = tiny_config(family).num_hidden_layers
    if stages == 1:
        return None
    if stages == 2:
        return STAGES.get(family, TWO)
    return [1] * (stages - 1) + [depth - stages + 1]


@cache
def on_one_rank(family: str) -> tuple[Any, Policy, dict[str, list[Answer]]]:
    """A tiny model, its engine's policy, and what one rank answers under every policy."""
    default = policy_named("full" if family in UNPROFILED else "pyramid")
    model = tiny_model(family, torch.float64)
    policies = sorted(set(POLICIES) - UNPROFILED.get(family, set()))
    return model, default, answers(Engine(model, default, CONFIG), policies)


@pytest.mark.parametrize("tensor, stages", SPLITS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_policy_on_every_family(family: str, tensor: int, stages: int) -> None:
    model, default, expected = on_one_rank(family)
    policies, layers = list(expected), layers_of(family, stages)
    if family in UNTURNED.get(stages, set()):
        policies.remove("streaming_llm")
    with split_engine(model, default, CONFIG, tensor, layers=layers) as engine:
        found = answers(engine, policies)
        engine.check()
    for name in policies:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("tensor, stages", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case: str, tensor: int, stages: int) -> None:
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    loaded = load_model(GOLDEN / case, dtype="float64", device="cpu")
    depth = loaded.model.config.num_hidden_layers
    layers = None if stages == 1 else [1] * (stages - 1) + [depth - stages + 1]
    policy = official(golden["parameters"])
    with split_engine(loaded.model, policy, CONFIG, tensor, layers=layers) as engine:
        found = trace(engine, golden["prompt"], len(golden["tokens"]), ())
    for mine, theirs in (
        (found.prefill_positions, golden["prefill_positions"]),
        (found.kept_positions, golden["final_positions"]),
    ):
        for positions, expected in zip(mine, theirs, strict=True):
            for head in positions:
                assert head.tolist() == expected
    assert found.token_ids == golden["tokens"]
    assert list(map(of_layers, found.kept_len_by_step)) == golden["kept_len_by_step"]
    expected_logits = torch.tensor(golden["final_logits"], dtype=torch.float64)
    torch.testing.assert_close(found.final_logits, expected_logits, atol=2e-4, rtol=0)


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    """The collectives of torch.distributed, also in bfloat16 (where only lengths must agree)."""
    few = ["full", "h2o", "kvzip", "pyramid", "streaming_llm"]
    cases = [Case("llama", 4), Case("gemma2", 2, ["full", "pyramid", "h2o"])]
    cases += [Case("llama", 1, stages=4), Case("llama", 2, few, stages=2)]
    cases += [Case("gemma2", 1, few, stages=2), Case("opt", 1, ["full", "snapkv"], stages=2)]
    for each in run_cases(cases, tmp_path, timeout=1500):
        assert not each["differences"], each["case"]
        assert each["sent"]["layers" if each["case"].tensor > 1 else "rows"] > 0
