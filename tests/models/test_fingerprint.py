"""Whose weights they are: the same in every precision, packed or not, and no other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.policies.profile import Fingerprint
from tests.tiny import SPECIFIC, tiny_config, tiny_model

FAMILIES = sorted(SPECIFIC)


def mark_of(model: Any, **options: Any) -> Fingerprint:
    return fingerprint(ModelRunner(model, "auto", **options))


def trained(family: str, seed: int = 1, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A tiny model whose norms are no ones, as in a trained one."""
    model = tiny_model(family, **sizes)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.2 * torch.randn(value.shape, generator=noise) * value.std().nan_to_num(1.0)
            if value.ndim == 1:
                value += 0.1 * torch.randn(value.shape, generator=noise)
    return model.to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_in_every_precision(family: str) -> None:
    mine = mark_of(trained(family))
    assert mine.vectors and mine.tables
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert mine.matches(mark_of(trained(family, dtype=dtype))), dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_do_not_match(family: str) -> None:
    mine = mark_of(trained(family))
    assert not mine.matches(mark_of(trained(family, seed=2)))
    for name, value in trained(family).named_parameters():
        if "norm" not in name or "weight" not in name:
            continue
        model = trained(family)
        other = model.get_parameter(name)
        with torch.no_grad():
            other += 0.05 * torch.randn(other.shape, generator=torch.Generator().manual_seed(5))
        assert not mine.matches(mark_of(model)), name
        assert value.shape == other.shape


def test_another_seed_without_any_training() -> None:
    """Norms are ones in both, so only the embeddings tell."""
    mine = mark_of(tiny_model("llama"))
    torch.manual_seed(8)
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    assert mine.key == mark_of(other).key and not mine.matches(mark_of(other))


def test_sizes_are_told_by_the_key() -> None:
    keys = [
        mark_of(tiny_model("llama", **sizes)).key
        for sizes in (
            {},
            {"vocab_size": 121},
            {"num_key_value_heads": 4},
            {"num_hidden_layers": 3},
            {"hidden_size": 64, "head_dim": 8},
            {"head_dim": 16},
        )
    ]
    keys += [mark_of(tiny_model(each)).key for each in ("mistral", "qwen2")]
    assert len(set(keys)) == len(keys)
    assert all(key.replace("-", "").replace("_", "").isalnum() for key in keys)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_embeddings_match(bits: int) -> None:
    """As a GGUF has them: blocks of 32 with a scale of their own; norms stay as they are."""
    mine = mark_of(trained("llama", hidden_size=128, head_dim=8))
    model = trained("llama", hidden_size=128, head_dim=8)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.data = quantized(module.weight.data, bits)
    assert mine.matches(mark_of(model))


def quantized(weight: Tensor, bits: int) -> Tensor:
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / scale).round() * scale).reshape(weight.shape)


def test_packing_changes_nothing(tmp_path: Path) -> None:
    """Weights that are packed are let go of; a model that is used as it is keeps them."""
    model = trained("llama")
    model.save_pretrained(tmp_path)
    runner = LLM(str(tmp_path), "full", dtype="float32", kv_memory="2MiB").engine.runner
    if runner.decoder.is_fused:  # where there are no kernels nothing is packed
        assert runner.body.layers[0].self_attn.k_proj.weight.numel() == 0
    assert fingerprint(runner).matches(mark_of(model))
