"""With ``policy="full"`` every family must say what the model itself says."""

from __future__ import annotations

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.families import FAMILIES
from tests.tiny import model_greedy, random_prompt, tiny_model

LENGTHS = (70, 5, 41, 1, 90)
NEW = 24


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("chunk", [1024, 13])
def test_greedy_tokens_equal_generate(family: str, chunk: int) -> None:
    """Ragged batch, requests joining midway, prompts in one or in several chunks."""
    model = tiny_model(family)
    assert len(set(getattr(model.config, "layer_types", None) or ["one"])) > 1 or (
        family not in ("gemma2", "gemma3_text", "qwen2")
    ), "the tiny model must hold every kind of layer"
    if family == "smollm3":
        assert len(set(model.config.no_rope_layers)) == 2
    llm = LLM(
        model,
        policy="full",
        kv_memory="8MiB",
        page_size=4,
        prefill_chunk=chunk,
        step_tokens=max(8, chunk),
    )
    params = SamplingParams(max_tokens=NEW)
    requests = []
    for seed, length in enumerate(LENGTHS):
        requests.append(llm.engine.add(random_prompt(seed, length), params))
        for _ in range(3):  # the next one joins while these are under way
            llm.engine.step()
    while not llm.engine.scheduler.idle:
        llm.engine.step()
    for request in requests:
        assert request.output == model_greedy(model, request.prompt, NEW), family
    llm.engine.check()


def test_model_object_stays_usable() -> None:
    model = tiny_model("llama")
    prompt = random_prompt(3, 20)
    before = model_greedy(model, prompt, 8)
    assert LLM(model, policy="full", kv_memory="1MiB").generate([prompt])[0].token_ids[:8] == before
    assert model.config._attn_implementation != "pyramidinfer"
    assert model_greedy(model, prompt, 8) == before


def test_unknown_family_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)).eval()
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported families: Llama"):
        LLM(model)


def test_unknown_attention_feature_is_refused() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    class Odd(type(attention)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            return forward(self, *args, sink_bias=torch.ones(1), **kwargs)

    attention.__class__ = Odd
    with pytest.raises(ValueError, match="sink_bias"):
        LLM(model, policy="full", kv_memory="1MiB").generate([[5, 6, 7]])
