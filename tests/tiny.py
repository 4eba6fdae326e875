"""Tiny random models of every supported family, deep enough for each kind of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 120
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF = 4  # head_dim 8: half of it
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
}


def tiny_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**COMMON, **SPECIFIC[family], **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family, the same on every call."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    return model.to(dtype).eval()


def random_prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def model_greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """The model's own ``generate``, greedy, without the prompt; stops at its end token."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
        )
    return out[0, len(prompt) :].tolist()


def of_layers(heads_of_layers: Sequence[Sequence[int]]) -> list[int]:
    """One number a layer, where all of its heads have the same; else an error."""
    assert all(len(set(heads)) == 1 for heads in heads_of_layers), heads_of_layers
    return [heads[0] for heads in heads_of_layers]


def lengths_of(positions: Iterable[Sequence[torch.Tensor]]) -> list[int]:
    """How many entries a trace's layers have, in each of their heads."""
    return of_layers([[len(head) for head in layer] for layer in positions])
