"""Fingerprint of a model's weights, from tensors that remain after packing.

Packed linears are freed (``models/fused.py``), so only norms, their biases and embeddings are used.
Further training changes norms or embeddings and thus the fingerprint; adapters (LoRA) that were
merged into linears only are not detected.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyramidinfer.policies.profile import Fingerprint

__all__ = ["fingerprint", "measure"]

#: Number of rows of an embedding that are used, evenly spread.
ROWS = 256
#: Number of directions for a vector, and for an embedding's rows.
VECTOR_WAYS, TABLE_WAYS = 2, 8


def fingerprint(runner: Any) -> Fingerprint:
    """The fingerprint of a ``ModelRunner``'s model, the same before and after its weights are
    packed or split."""
    vectors, tables = runner.ranks.fingerprint or measure(runner.body)
    return Fingerprint(_key(runner), tuple(vectors), tuple(tables))


def measure(body: nn.Module) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Measures of a whole model's vectors and tables."""
    vectors, tables = [], []
    for _, module in sorted(body.named_modules()):
        if isinstance(module, nn.Linear):
            continue
        if (rows := getattr(module, "rows", None)) is not None:  # rows of a GGUF file
            step = max(1, len(rows.addresses) // ROWS)
            at = torch.arange(len(rows.addresses))[::step][:ROWS]
            tables.append(_measured(rows.numbers(at), TABLE_WAYS))
            continue
        for _, tensor in sorted(module.named_parameters(recurse=False)):
            if tensor.ndim == 1:
                vectors.append(_measured(tensor, VECTOR_WAYS))
            elif tensor.ndim == 2:
                step = max(1, len(tensor) // ROWS)
                tables.append(_measured(tensor[::step][:ROWS], TABLE_WAYS))
    return vectors, tables


def _key(runner: Any) -> str:
    """The model's kind and a hash of its sizes; fit for a file's name."""
    sizes = [
        runner.hidden_size,
        runner.vocab_size,
        [[s.heads, s.kv_heads, s.key_dim, s.value_dim, s.window] for s in runner.shapes],
    ]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{runner.config.model_type}-{digest[:12]}"


def _measured(tensor: Tensor, ways: int) -> tuple[float, ...]:
    """Root mean square, and the tensor's projection on each direction, in float64.

    A direction is a row of signs.  Divided by the tensor's norm, the sum has a magnitude of about 1
    for any tensor, and a relative rounding error e of its numbers changes it by about e.
    """
    values = tensor.detach().to("cpu", torch.float64).flatten().numpy()
    length = float(np.sqrt((values * values).sum()))
    sums = [float((values * _signs(len(values), way)).sum()) for way in range(ways)]
    size = length / max(1, len(values)) ** 0.5
    return (float(f"{size:.6g}"), *(round(each / length if length else 0.0, 5) for each in sums))


def _signs(count: int, way: int) -> np.ndarray:
    """``[count]`` of 1 and -1: a bit of splitmix64 of each place, the same everywhere."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64((way + 1) * 0x632BE59BD9B4E019 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    bits = (mixed ^ (mixed >> np.uint64(31))) & np.uint64(1)
    return bits.astype(np.float64) * 2 - 1
