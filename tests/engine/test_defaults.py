"""Sampling as a model's makers mean it: what generation_config.json says is used, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.defaults import sampling_defaults
from tests.server.live import byte_tokenizer, serving, tiny_llm
from tests.tiny import tiny_model


def found(**keys: Any) -> dict[str, Any]:
    return sampling_defaults(GenerationConfig(**keys), "some/model")


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {
                "temperature": 0.7,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.05,
                "max_new_tokens": 7,
            },
            {
                "temperature": 0.7,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.05,
                "max_tokens": 7,
            },
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        (
            {
                "max_length": 4096,
                "pad_token_id": 0,
                "num_beams": 1,
                "length_penalty": 2.0,
                "suppress_tokens": [],
                "use_cache": False,
                "typical_p": 1.0,
                "min_length": 0,
            },
            {},
        ),
    ],
)
def test_what_the_makers_say(keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found(**keys) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("num_beams", 4),
        ("suppress_tokens", [5]),
        ("typical_p", 0.9),
        ("min_new_tokens", 2),
        ("stop_strings", ["x"]),
        ("guidance_scale", 1.5),
        ("top_p", 2.0),
        ("max_new_tokens", 0),
    ],
)
def test_what_cannot_be_had_is_named(key: str, value: Any) -> None:
    config = GenerationConfig()
    setattr(config, key, value)  # whatever transformers itself thinks of it
    name = "max_tokens" if key == "max_new_tokens" else key
    with pytest.raises(ValueError, match=f"'some/model': {name}=.*--generation-config none"):
        sampling_defaults(config, "some/model")


def model_with(**keys: Any) -> Any:
    model = tiny_model("llama")
    for key, value in keys.items():
        setattr(model.generation_config, key, value)
    return model


def llm_with(**keys: Any) -> LLM:
    llm = tiny_llm()
    llm._generation_config = model_with(**keys).generation_config
    return llm


def test_the_library_uses_them_where_nothing_is_said() -> None:
    llm = llm_with(do_sample=True, temperature=1.5, max_new_tokens=9, repetition_penalty=1.2)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams(temperature=1.5, max_tokens=9, repetition_penalty=1.2)
    prompt = list(range(5, 40))
    assert len(llm.generate([prompt])[0].token_ids) == 9
    assert len([*llm.stream(prompt)][-1].token_ids) == 9
    told = SamplingParams(max_tokens=4, ignore_eos=True)
    assert len(llm.generate([prompt], told)[0].token_ids) == 4
    assert tiny_llm().get_default_sampling_params() == SamplingParams()


def test_a_key_that_cannot_be_had_stops_only_who_asks_for_defaults() -> None:
    llm = llm_with(no_repeat_ngram_size=3)
    for ask in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match="no_repeat_ngram_size=3 .* give SamplingParams"):
            ask([5, 6, 7])  # type: ignore[operator]
    assert llm.generate([5, 6, 7], SamplingParams(max_tokens=2))[0].finish_reason


def test_a_generation_config_that_cannot_be_read(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    for text in ('{"temperature": ', "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match="generation_config.json' is not a readable gener"):
            LLM(tmp_path, "full", kv_memory="4MiB")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    llm = LLM(tmp_path, "full", kv_memory="4MiB", tokenizer=byte_tokenizer())
    assert llm.sampling_defaults == {"temperature": 0.5}


def test_the_server_fills_what_a_request_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7}
    llm, made = llm_with(**keys), []
    make = llm.engine.make
    monkeypatch.setattr(
        llm.engine,
        "make",
        lambda prompt, params, **rest: made.append(params) or make(prompt, params, **rest),
    )  # type: ignore[func-returns-value]
    ask: dict[str, Any] = {"prompt": "Who ?", "ignore_eos": True}
    with serving(llm, model_name="tiny") as live:
        usage = live.http.post("/v1/completions", json=ask).json()["usage"]
        assert usage["completion_tokens"] == 7
        off = {"temperature": 0, "top_p": 1, "top_k": -1, "max_tokens": 3}
        assert live.http.post("/v1/completions", json={**ask, **off}).is_success
        assert live.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Who ?"}], "top_p": 0.5},
        ).is_success
    with serving(llm, model_name="tiny", default_max_tokens=5, max_tokens_limit=6) as live:
        assert live.http.post("/v1/completions", json=ask).is_success
    with serving(llm, model_name="tiny", max_tokens_limit=4) as live:
        assert live.http.post("/v1/completions", json=ask).is_success
    with serving(llm, model_name="tiny", generation_config="none", max_tokens_limit=300) as live:
        assert live.http.post("/v1/completions", json=ask).is_success
    taken = [(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in made]
    assert taken == [
        (0.6, 0.9, 20, 7),
        (0, 1, 0, 3),
        (0.6, 0.5, 20, 7),
        (0.6, 0.9, 20, 5),
        (0.6, 0.9, 20, 4),
        (1.0, 1.0, 0, 256),
    ]


def test_a_server_begins_only_with_defaults_that_can_be_had() -> None:
    llm = llm_with(suppress_tokens=[5])
    with pytest.raises(ValueError, match=r"suppress_tokens=\[5\] is not supported"), serving(llm):
        pass
    with serving(llm, model_name="tiny", generation_config="none") as live:
        assert live.complete("Who ?").is_success
