"""Every policy on every family gives the same on one rank and on several (float64)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.engine.build import policy_named
from tests.policies.test_golden import CASES, GOLDEN, official
from tests.scale.build import CONFIG, answers
from tests.scale.spawn import run_cases
from tests.scale.threads import split_engine
from tests.scale.worker import Case
from tests.tiny import of_layers, tiny_model

from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import load_model
from pyramidinfer.policies import POLICIES

#: Every layer of the tiny model slides, so there is no head profile to be had.
UNPROFILED = {"mistral": {"duo", "pyramid", "triattention"}}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_policy_on_every_family(family: str, size: int) -> None:
    policies = sorted(set(POLICIES) - UNPROFILED.get(family, set()))
    default = policy_named("full" if family in UNPROFILED else "pyramid")
    model = tiny_model(family, torch.float64)
    expected = answers(Engine(model, default, CONFIG), policies)
    with split_engine(model, default, CONFIG, size) as engine:
        found = answers(engine, policies)
        engine.check()
    for name in policies:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case: str, size: int) -> None:
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    loaded = load_model(GOLDEN / case, dtype="float64", device="cpu")
    with split_engine(loaded.model, official(golden["parameters"]), CONFIG, size) as engine:
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
    cases = [Case("llama", 4), Case("gemma2", 2, ["full", "pyramid", "h2o"])]
    for each in run_cases(cases, tmp_path, timeout=1500):
        assert not each["differences"], each["case"]
        assert each["sent"]["layers"] > 0
