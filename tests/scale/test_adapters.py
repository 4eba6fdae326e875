"""Adapters on several ranks: each has its part of them, and a request's tokens are those of one
rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.engine import Engine
from tests.adapters import save_adapter
from tests.engine.build import policy_named
from tests.scale.build import CONFIG, FOUR, TWO
from tests.scale.threads import split_engine
from tests.tiny import random_prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def folders(place: Path, family: str) -> dict[str, str]:
    """Two adapters that together change every linear of the layers."""
    return {
        name: save_adapter(place / family / name, family, which)
        for which, name in enumerate(("first", "second"))
    }


def answers(engine: Engine) -> list[list[int]]:
    """Requests with either adapter and without one, in one batch, and a branch of one."""
    asked = [
        engine.make(random_prompt(length, length), PARAMS, lora=lora, hold=lora == "second")
        for lora in (None, "first", "second")
        for length in (30, 5)
    ]
    engine.run(asked)
    branch = engine.branch(asked[-1], random_prompt(7, 4), PARAMS)
    engine.run([branch])
    for each in asked[-2:]:
        engine.release(each)
    engine.check()
    return [each.output for each in (*asked, branch)]


SPLITS = [(4, None), (1, FOUR), (2, TWO)]


@pytest.mark.parametrize(
    "family, dtype, splits",
    [
        ("llama", torch.float64, SPLITS),  # with four ranks two share a KV head
        ("llama", torch.float32, [(2, TWO)]),  # packed, on the C++ kernels
        ("phi3", torch.float64, [(2, TWO)]),  # linears that are stored together
        ("gpt_neox", torch.float64, [(2, TWO)]),  # each head's queries, keys and values together
        ("opt", torch.float64, [(2, TWO)]),  # biases
    ],
)
def test_each_rank_adds_its_part(
    family: str, dtype: torch.dtype, splits: list[tuple[int, list[int] | None]], place: Path
) -> None:
    model = tiny_model(family, dtype)
    config = replace(CONFIG, lora_modules=folders(place, family))
    expected = answers(Engine(model, policy_named("snapkv"), config))
    assert len(set(map(tuple, expected[::2]))) >= 3, "adapters must matter"
    for tensor, layers in splits:
        with split_engine(model, policy_named("snapkv"), config, tensor, layers=layers) as engine:
            assert answers(engine) == expected, (tensor, layers)


def test_a_stage_without_parts_of_an_adapter(place: Path) -> None:
    """Only the first layer is adapted, which is on the first of two stages; on the C++ kernels."""
    only = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}
    folder = save_adapter(place / "only", "llama", 0, **only)
    model, config = tiny_model("llama"), replace(CONFIG, lora_modules={"first": folder})
    prompt, policy = random_prompt(3, 30), policy_named("snapkv")

    def answer(engine: Engine, lora: str | None) -> list[int]:
        asked = engine.make(prompt, PARAMS, lora=lora)
        engine.run([asked])
        return asked.output

    one = Engine(model, policy, config)
    expected = answer(one, "first")
    assert expected != answer(one, None), "the adapter must matter"
    with split_engine(model, policy, config, 1, layers=TWO) as engine:
        assert answer(engine, "first") == expected
