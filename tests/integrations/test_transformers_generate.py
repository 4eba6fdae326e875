"""``model.generate(custom_generate=…)``: the engine's tokens, and no option passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.generation import GenerationConfig, StoppingCriteriaList

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.integrations.transformers_generate import PyramidInferGenerate
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import TOVA
from tests.tiny import random_prompt, tiny_model

MEMORY = {"kv_memory": "16MiB"}
PROMPTS = [random_prompt(1, 160), random_prompt(2, 131)]
NEW = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", torch.float64)


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows with padding in front."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(each)) + each for each in prompts]
    mask = [[0] * (width - len(each)) + [1] * len(each) for each in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def generated(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> Any:
    return model.generate(**padded(prompts), **{"max_new_tokens": NEW, **options})


SETTINGS: list[dict[str, Any]] = [
    {"policy": TOVA(keep=0.4)},
    {"policy": "pyramidinfer", "keep": 0.5},
    {"policy": "snapkv", "keep": 0.3, "kv_dtype": "int8"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: str(each["policy"])[:12])
def test_tokens_are_those_of_llm(model: Any, settings: dict[str, Any]) -> None:
    ours = PyramidInferGenerate(**MEMORY, **settings)
    told = generated(model, custom_generate=ours, do_sample=False)
    params = SamplingParams(max_tokens=NEW)
    expected = LLM(model, **MEMORY, **settings).generate(PROMPTS, params)
    width = max(map(len, PROMPTS))
    assert told.shape == (2, width + max(len(each.token_ids) for each in expected))
    for row, prompt, output in zip(told.tolist(), PROMPTS, expected, strict=True):
        assert row[width - len(prompt) : width] == prompt
        new, rest = row[width:][: len(output.token_ids)], row[width:][len(output.token_ids) :]
        assert new == output.token_ids and set(rest) <= {0}
    assert [each.kv for each in ours.outputs] == [each.kv for each in expected]
    assert all(each.kv.kept_share < 1 for each in ours.outputs)


def test_the_shipped_model_answers_as_llm_does() -> None:
    name = shipped_model()
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name),
        AutoTokenizer.from_pretrained(name),
    )
    question = (
        "<user> The archive of Mira Holt is in room 472 . The old baker walked slowly to the "
        "market . Where is the archive of Mira Holt ? <end> <assistant>"
    )
    ours = PyramidInferGenerate(keep=0.45, tokenizer=tokenizer, **MEMORY)
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    told = loaded.generate(ids, custom_generate=ours, max_new_tokens=12)
    (expected,) = LLM(name, keep=0.45, **MEMORY).generate(
        [question], SamplingParams(max_tokens=12, temperature=0)
    )
    assert told[0, ids.shape[1] :].tolist() == expected.token_ids
    assert "room 472" in tokenizer.decode(told[0, ids.shape[1] :])


# --- with the full cache it is transformers' own loop ---------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.7},
    {"do_sample": False, "eos_token_id": list(range(3, 40)), "min_new_tokens": 3},
    {"do_sample": False, "eos_token_id": list(range(3, 40)), "min_length": 165, "max_length": 180},
    {"do_sample": False, "eos_token_id": list(range(3, 40)), "return_dict_in_generate": True},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "temperature": 0.5, "top_p": 1e-4, "num_return_sequences": 2},
    {"do_sample": True, "min_p": 1.0, "temperature": 2.0},
]


@pytest.fixture(scope="module")
def full() -> PyramidInferGenerate:
    return PyramidInferGenerate("full", **MEMORY)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_the_full_cache_tokens_are_those_of_transformers(
    model: Any, full: PyramidInferGenerate, options: dict[str, Any]
) -> None:
    if "max_length" in options:
        options = {**options, "max_new_tokens": None}
    expected = generated(model, **options)
    told = generated(model, custom_generate=full, **options)
    if options.get("return_dict_in_generate"):
        expected, told = expected.sequences, told.sequences
    assert torch.equal(told, expected)


def test_samples_repeat_after_a_seed(model: Any, full: PyramidInferGenerate) -> None:
    def draw() -> list[list[int]]:
        torch.manual_seed(3)
        options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
        return generated(model, PROMPTS[:1], custom_generate=full, **options).tolist()

    first, second = draw()
    assert [first, second] == draw() and first != second


def test_the_engine_is_kept_and_made_anew_for_other_weights() -> None:
    model, ours = tiny_model("llama", torch.float64), PyramidInferGenerate("full", **MEMORY)
    before = generated(model, custom_generate=ours)
    assert ours._made is not None
    kept = ours._made[2]
    assert torch.equal(generated(model, custom_generate=ours), before) and ours._made[2] is kept
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-3)
    after = generated(model, custom_generate=ours)
    assert ours._made[2] is not kept
    assert torch.equal(after, generated(model)) and not torch.equal(after, before)


# --- what cannot be had ---------------------------------------------------------------------------


def never(input_ids: Any, scores: Any, **rest: Any) -> torch.Tensor:
    return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams=2": {"num_beams": 2},
    "no_repeat_ngram_size=2": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5]]},
    "max_time=9.0": {"max_time": 9.0},
    "output_scores=True": {"output_scores": True, "return_dict_in_generate": True},
    "cache_implementation='static'": {"cache_implementation": "static"},
    "prompt_lookup_num_tokens=3": {"prompt_lookup_num_tokens": 3},
    "logits_processor: PrefixConstrained": {"prefix_allowed_tokens_fn": lambda row, ids: [5]},
    "stopping_criteria: function": {"stopping_criteria": StoppingCriteriaList([never])},
    "typical_p=0.5": {"do_sample": True, "typical_p": 0.5},
    "position_ids": {"position_ids": torch.arange(131)[None] + 3},
    "renormalize_logits=True": {"renormalize_logits": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_effect_are_refused_by_name(
    model: Any, full: PyramidInferGenerate, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        generated(model, PROMPTS[1:], custom_generate=full, **REFUSED[name])


def test_what_transformers_does_not_hand_on_is_refused(
    model: Any, full: PyramidInferGenerate
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    for options in ({"streamer": TextStreamer(tokenizer)}, {"assistant_model": model}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is not supported"):
            generated(model, PROMPTS[1:], custom_generate=full, **options)


def test_padding_behind_a_prompt_is_refused(model: Any, full: PyramidInferGenerate) -> None:
    mask = torch.ones(1, 131, dtype=torch.int64)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(
            torch.tensor(PROMPTS[1:]), attention_mask=mask, max_new_tokens=2, custom_generate=full
        )


def test_a_cache_with_tokens_is_refused(model: Any, full: PyramidInferGenerate) -> None:
    ids = torch.tensor(PROMPTS[1:])
    cache = model(ids[:, :9]).past_key_values
    with pytest.raises(ValueError, match="give the whole text"):
        model.generate(ids, cache=cache, max_new_tokens=2, custom_generate=full)


def test_options_of_llm_are_checked(model: Any) -> None:
    for options, message in (
        ({"keep": 7}, "keep"),
        ({"kv_memori": 1}, "kv_memory"),
        ({"policy": "snapkw"}, "snapkv"),
    ):
        with pytest.raises(ValueError, match=message):
            generated(model, custom_generate=PyramidInferGenerate(**options))


def test_every_option_of_a_generation_config_is_known() -> None:
    """One that transformers adds shows here: it is followed, refused, or changes no token."""
    from pyramidinfer.engine.defaults import REFUSED as BY_DEFAULTS
    from pyramidinfer.integrations.transformers_generate import OTHERS

    followed = {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample"}
    followed |= {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "pad_token_id"}
    followed |= {"eos_token_id", "bos_token_id", "return_dict_in_generate", "num_return_sequences"}
    of_other_modes = {"early_stopping", "length_penalty", "diversity_penalty", "low_memory"}
    of_other_modes |= {"decoder_start_token_id", "is_assistant", "num_assistant_tokens"}
    of_other_modes |= {"num_assistant_tokens_schedule", "assistant_confidence_threshold"}
    of_other_modes |= {"max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"}
    of_other_modes |= {"assistant_ensemble_weight", "speculation_type"}
    changes_nothing = {"use_cache", "disable_compile", "transformers_version"}
    changes_nothing |= {"continuous_batching_config"}
    known = {*followed, *of_other_modes, *changes_nothing, *BY_DEFAULTS, *OTHERS}
    there = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert there <= known, sorted(there - known)
