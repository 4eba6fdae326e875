"""The model that all engines of a comparison load, and its prompts; both are made once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyramidinfer.config import nearest
from pyramidinfer.engine.english import english
from pyramidinfer.lab.bench.engines import Workload
from pyramidinfer.lab.shapes import SHAPES, make_model, save_model, shape_config
from pyramidinfer.models.catalog import CATALOG, find_model

__all__ = ["cache_memory", "is_real", "make_prompts", "shared_model"]

IN_PROGRESS = 96  # MiB
FIRST_WORD = 4  # token ids below it are special


def is_real(shape: str) -> bool:
    """Whether it names a model with trained weights; ``ValueError`` for an unknown name."""
    if shape not in SHAPES and shape not in CATALOG:
        raise ValueError(f"--shape {shape!r} is unknown; {nearest(shape, [*SHAPES, *CATALOG])}")
    return shape in CATALOG


def shared_model(shape: str, work: Path, seed: int, layers: int | None = None) -> Path:
    """A folder in ``work``: a fetched model, or random weights, in bfloat16; only the first
    ``layers`` of it if given."""
    real = is_real(shape)
    folder = work / "-".join([shape, *([] if layers is None else [str(layers)]), f"seed{seed}"])
    if real:
        folder = folder.with_name(folder.name.replace(f"seed{seed}", "bf16"))
    if not (folder / "tokenizer.json").is_file():  # written last
        changes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
        if real:
            _round(find_model(shape), folder, changes)
        else:
            save_model(make_model(shape, seed=seed, **changes), folder)
    return folder.resolve()


def _round(source: str, folder: Path, changes: dict[str, Any]) -> None:
    """A fetched model in bfloat16; weights dequantized from its file are in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **changes)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def cache_memory(folder: Path, workload: Workload) -> str:
    """Our ``kv_memory`` for a workload: the bytes of a full 16-bit cache, a quarter more, and the
    memory of prompts in progress."""
    config = AutoConfig.from_pretrained(folder)
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * 2 * config.num_hidden_layers * heads * size  # keys and values, bytes
    tokens = workload.requests * (workload.prompt_len + workload.new)
    return f"{math.ceil(1.25 * tokens * entry / 2**20) + IN_PROGRESS}MiB"


def make_prompts(shape: str, folder: Path, workload: Workload, seed: int) -> list[list[int]]:
    """Token ids: passages of real English for a real model, random ones for random weights."""
    draw = np.random.default_rng(seed)
    count, length = workload.requests, workload.prompt_len
    if not is_real(shape):
        vocabulary = shape_config(shape).vocab_size
        random: list[list[int]] = draw.integers(FIRST_WORD, vocabulary, (count, length)).tolist()
        return random
    ids = AutoTokenizer.from_pretrained(folder)(english())["input_ids"]
    if len(ids) < length:
        raise ValueError(f"--workloads: the text for real models has {len(ids)} tokens")
    starts = draw.integers(0, len(ids) - length + 1, count)
    return [list(ids[start : start + length]) for start in starts]
