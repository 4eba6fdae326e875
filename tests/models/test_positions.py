"""Positions reach as far as a model's rotary scale stretches them, with transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.families import FAMILIES, find_family
from pyramidinfer.models.rotary import count_positions
from tests.tiny import model_greedy, random_prompt, tiny_config, tiny_model

OLD, FACTOR, NEW = 64, 4.0, 20
THETA = {"rope_theta": 10_000.0, "factor": FACTOR}
SCALES: dict[str, dict[str, Any]] = {
    "yarn": THETA | {"original_max_position_embeddings": OLD},
    "linear": THETA,
    "dynamic": THETA,
    "llama3": THETA
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": OLD},
}
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)


def scaled(family: str, kind: str) -> Any:
    scale = {"rope_type": kind} | SCALES[kind]
    return tiny_model(family, max_position_embeddings=OLD, rope_parameters=scale, eos_token_id=None)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("kind", sorted(SCALES))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tokens_beyond_the_old_length_equal_generate(family: str, kind: str, backend: str) -> None:
    """Short and long prompts side by side, in chunks; each gets what it gets alone."""
    llm = LLM(
        scaled(family, kind),
        policy="full",
        kv_memory="4MiB",
        backend=backend,
        prefill_chunk=37,
        step_tokens=41,
    )
    assert llm.engine.runner.max_positions == OLD * FACTOR
    prompts = [random_prompt(seed, length) for seed, length in enumerate((5, 60, 150, 64, 90))]
    for prompt, out in zip(prompts, llm.generate(prompts, PARAMS), strict=True):
        assert out.token_ids == model_greedy(scaled(family, kind), prompt, NEW), len(prompt)


@pytest.mark.parametrize("kind", sorted(SCALES))
def test_the_limit_is_the_new_length(kind: str) -> None:
    llm, most = LLM(scaled("llama", kind), policy="full", kv_memory="4MiB"), int(OLD * FACTOR)
    out = llm.generate([random_prompt(1, most - 3)], PARAMS)[0]
    assert len(out.token_ids) == 3
    with pytest.raises(ValueError, match=f"this model has {most} positions"):
        llm.generate([random_prompt(1, most)])


@pytest.mark.parametrize(
    ("family", "most", "scale", "expected"),
    [
        (
            "llama",
            131_072,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131_072,
        ),
        (
            "qwen2",
            32_768,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            131_072,
        ),
        (
            "qwen2",
            131_072,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            131_072,
        ),
        ("llama", 4096, {"rope_type": "linear", "factor": 2.5}, 10_240),
        ("llama", 4096, {"rope_type": "default"}, 4096),
        (
            "gemma3_text",
            131_072,
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            131_072,
        ),
        ("phi3", 512, None, 512),
    ],
)
def test_positions_of_known_models(
    family: str, most: int, scale: dict[str, Any] | None, expected: int
) -> None:
    changes = {} if scale is None else {"rope_parameters": {"rope_theta": 1e4} | scale}
    if family == "gemma3_text":
        changes["rope_parameters"].pop("rope_theta")
    config = tiny_config(family, max_position_embeddings=most, **changes)
    assert count_positions(find_family(config), config) == expected


def test_families_without_a_scale_keep_their_length() -> None:
    for family in FAMILIES:
        config = tiny_config(family)
        assert count_positions(FAMILIES[family], config) == config.max_position_embeddings


def test_streaming_does_not_turn_keys_of_dynamic_frequencies() -> None:
    """They were each rotated by frequencies of their own, so such a text has an end."""
    llm = LLM(scaled("llama", "dynamic"), policy="streaming_llm", keep=0.5, kv_memory="4MiB")
    out = llm.generate([random_prompt(1, 200)], SamplingParams(max_tokens=99, ignore_eos=True))[0]
    assert len(out.token_ids) == int(OLD * FACTOR) - 200
