"""Bad options of every policy: one ``ValueError`` with the value and what would do instead."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.policies import (
    H2O,
    TOVA,
    FastKV,
    PyramidInfer,
    PyramidKV,
    Scissorhands,
    SnapKV,
    StreamingLLM,
    make_policy,
)
from pyramidinfer.policies.registry import POLICIES
from tests.tiny import tiny_model

#: What no option of any policy can be.
NEVER = ["bogus", [], {}, float("nan"), -1, -0.5, float("-inf"), object()]
#: Beyond that, what an option with such a default cannot be.
NOT_WHOLE = [1.5, 3.0, True, None, "8"]
NOT_A_SHARE = [1.001, 2, float("inf"), True, None, "0.5"]
SHARES = {
    "keep",
    "recent_ratio",
    "heavy_ratio",
    "prefill_decay",
    "gen_decay",
    "gen_keep",
    "budget_ratio",
    "drop",
    "rise",
    "propagate_ratio",
    "retain_ratio",
    "safeguard",
    "mix",
    "threshold",
}
OPTIONS = [(name, each) for name in sorted(POLICIES) for each in fields(POLICIES[name])]
IDS = [f"{name}-{each.name}" for name, each in OPTIONS]


def refused(name: str, option: str, value: Any) -> str:
    """The message with which a value is refused."""
    with pytest.raises(ValueError) as found:
        POLICIES[name](**{option: value})
    return str(found.value)


def wrong_values(option: Field[Any]) -> list[Any]:
    wrong = list(NEVER)
    if type(option.default) is int:
        wrong += NOT_WHOLE
    if option.name in SHARES:
        wrong += [value for value in NOT_A_SHARE if value is not None or option.default is not None]
    return wrong


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=IDS)
def test_wrong_values_are_shown(name: str, option: Field[Any]) -> None:
    """Wrong types, not-a-number, negative numbers, shares above 1: the message names the option
    and shows the value."""
    assert option.default is not MISSING, "every option has a default"
    for value in wrong_values(option):
        message = refused(name, option.name, value)
        assert option.name in message
        assert str(value) in message or repr(value) in message


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=IDS)
def test_misspelt_options_name_the_nearest(name: str, option: Field[Any]) -> None:
    """By the class and by name."""
    wrong = f"{option.name}_"
    message = rf"no option '{wrong}'; did you mean '{option.name}'"
    with pytest.raises(ValueError, match=message):
        POLICIES[name](**{wrong: 1})
    with pytest.raises(ValueError, match=message):
        make_policy(name, **{wrong: 1})


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_misspelt_policies_name_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown policy '{name}e'; did you mean '{name}'"):
        make_policy(f"{name}e")
    with pytest.raises(ValueError, match=", ".join(sorted(POLICIES))):
        make_policy("something else")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_defaults_are_accepted(name: str) -> None:
    """Given one by one, and all together, they are the policy itself."""
    policy = POLICIES[name]()
    assert make_policy(name) == policy
    for option in fields(policy):
        assert POLICIES[name](**{option.name: option.default}) == policy
    assert POLICIES[name](**{each.name: each.default for each in fields(policy)}) == policy


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (StreamingLLM, {"sinks": -1}, "sinks=-1 must be a whole number of at least 0"),
        (StreamingLLM, {"window": 0}, "window=0 must be a whole number of at least 1"),
        (H2O, {"heavy_ratio": 1.5}, "heavy_ratio=1.5 must lie between 0 and 1"),
        (H2O, {"keep": 0}, "keep=0 must be above 0 and at most 1"),
        (Scissorhands, {"window": 0}, "window=0 must be a whole number of at least 1"),
        (Scissorhands, {"recent": 0}, "recent=0 must be a whole number of at least 1"),
        (Scissorhands, {"rise": 1.2}, "rise=1.2 must lie between 0 and 1"),
        (SnapKV, {"kernel": 4}, "kernel=4 must be an odd number"),
        (SnapKV, {"kernel": 0}, "kernel=0 must be a whole number of at least 1"),
        (SnapKV, {"pooling": "avg"}, "pooling='avg' is unknown; .*max, mean"),
        (SnapKV, {"pooling": "maxx"}, "pooling='maxx' is unknown; did you mean 'max'"),
        (SnapKV, {"capacity": 0}, "capacity=0 must be a whole number of at least 1"),
        (PyramidKV, {"beta": 0.9}, "beta=0.9 must be at least 1"),
        (PyramidKV, {"window": 0}, "window=0 must be a whole number of at least 1"),
        (TOVA, {"capacity": 0}, "capacity=0 must be a whole number of at least 1"),
        (FastKV, {"layer": 1.0}, "layer=1.0 must be a whole number of at least 0"),
        (FastKV, {"retain_ratio": -0.1}, "retain_ratio=-0.1 must lie between 0 and 1"),
        (PyramidInfer, {"gen_chunk": 0}, "gen_chunk=0 must be a whole number of at least 1"),
    ],
)
def test_the_allowed_range_is_named(policy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**options)


def test_a_layer_beyond_the_model_is_refused() -> None:
    """Where only the model can tell."""
    with pytest.raises(ValueError, match=re.escape("layer=4: the model has 4 layers, 0 to 3")):
        LLM(tiny_model("llama"), policy=FastKV(layer=4), kv_memory="1MiB")
    LLM(tiny_model("llama"), policy=FastKV(layer=3), kv_memory="1MiB")


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), "half", True])
def test_keep_beside_a_name_or_an_object(name: str, keep: Any) -> None:
    """``make_policy`` refuses what the policy itself refuses, with the value."""
    for policy in (name, POLICIES[name]()):
        with pytest.raises(ValueError, match=f"keep={keep!r} must be above 0 and at most 1"):
            make_policy(policy, keep)
