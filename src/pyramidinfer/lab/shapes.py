"""Models of known shapes with random weights: speed and memory do not depend on the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyramidinfer.config import nearest, parse_device, parse_dtype

__all__ = ["SHAPES", "empty_shape", "make_model", "save_model", "shape_config"]

#: Configs, of the Llama family unless ``model_type`` names another (the small ones are for trial
#: runs of a bench).  ``max_position_embeddings`` is raised: random weights have no trained length.
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
    "llama2-13b": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500_000.0,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "rope_theta": 500_000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "llama3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "bench-200m": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 2816,
        "vocab_size": 512,
    },
    "toy-mha": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 512,
    },
    "toy-gqa": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 512,
    },
}
POSITIONS = 32768
STD = 0.02
#: Weights are read from one table of normal values, each tensor from another offset; its length is
#: a prime, so that rows of a matrix do not repeat.
TABLE = 16_777_213


def shape_config(shape: str, **changes: Any) -> Any:
    """The config of a shape; ``ValueError`` with the nearest name for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape!r} is unknown; {nearest(shape, SHAPES)}")
    usual = {
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(**{"model_type": "llama", **usual, **SHAPES[shape], **changes})


def empty_shape(shape: str, dtype: str | torch.dtype = "bfloat16", **changes: Any) -> Any:
    """The model without weights (on the meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape_config(shape, **changes), dtype=parse_dtype(dtype, torch.bfloat16)
        )


def make_model(
    shape: str,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A transformers model with seeded random weights, created in its dtype on its device.

    ``changes``: fields of the config.  The same weights on every device.
    """
    place, kind = parse_device(device), parse_dtype(dtype, torch.bfloat16)
    model = empty_shape(shape, kind, **changes).to_empty(device=place)
    config = model.config
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(place)
    _fill(model, seed)
    model.config._name_or_path = shape
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Fill matrices with small normal values, norms with ones, biases with zeros."""
    size = min(TABLE, max(each.numel() for each in model.parameters()) + 1)
    table = torch.empty(size).normal_(0.0, STD, generator=torch.Generator().manual_seed(seed))
    first = next(model.parameters())
    table = table.to(first.dtype).to(first.device)
    at = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        at = _copy_round(parameter.view(-1), table, at)


def _copy_round(target: Tensor, table: Tensor, at: int) -> int:
    """Fill ``target`` from the table cyclically; returns the offset for the next tensor."""
    done = 0
    while done < len(target):
        count = min(len(target) - done, len(table) - at)
        target[done : done + count] = table[at : at + count]
        done, at = done + count, (at + count) % len(table)
    return at


def save_model(model: Any, folder: Path) -> Path:
    """Write weights (safetensors), config and a tokenizer that other engines can load."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words += [f"w{index}" for index in range(len(words), model.config.vocab_size)]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder
