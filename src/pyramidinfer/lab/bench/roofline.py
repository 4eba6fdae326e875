"""The work of a pass: floating point operations of a prefill, bytes of a decode step."""

from __future__ import annotations

from typing import Any

from pyramidinfer.codec import find_codec
from pyramidinfer.lab.bench.machine import Roof
from pyramidinfer.lab.bench.setting import Pass
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.weights import TABLE, coded_bytes

__all__ = ["decode_bytes", "prefill_flops", "roofline"]


def prefill_flops(runner: ModelRunner, computed: list[int]) -> float:
    """Operations of one prompt's prefill, with ``computed[layer]`` tokens in each layer, followed
    by those of each pass that read it again.

    Products with the layers' matrices, causal attention, and the head for the last token.
    """
    head = sum(each.numel() for each in runner.head.parameters() if each.ndim == 2)
    total, layers = 2.0 * float(head), _layers(runner)
    for at, tokens in enumerate(computed):
        shape, before = runner.shapes[at % len(layers)], 0 if at < len(layers) else computed[0]
        parameters = layers[at % len(layers)].parameters()
        matrices = float(sum(each.numel() for each in parameters if each.ndim == 2))
        window = shape.window or before + tokens
        alone = max(0, min(tokens, window - before))  # tokens that attend to all entries
        pairs = alone * (before + (alone + 1) / 2) + (tokens - alone) * window
        total += 2.0 * tokens * matrices
        total += 2.0 * shape.heads * (shape.key_dim + shape.value_dim) * pairs
    return total


def weight_bytes(runner: ModelRunner, weights: str = "auto") -> int:
    """Bytes of weights that a step reads for any batch: all except the embedding table."""
    return sum(
        coded_bytes(each, name) if each.ndim == 2 and weights != "auto" else each.nbytes
        for modules, name in ((_layers(runner), weights), ([runner.head], TABLE))
        for module in modules
        for each in module.parameters()
    )


def decode_bytes(
    runner: ModelRunner, entries: list[float], kv_dtype: str = "auto", weights: str = "auto"
) -> float:
    """Bytes that one decode step must read: weights once, keys and values of every entry.

    ``entries[layer]``: cached entries of all requests, stored in ``kv_dtype``.
    """
    codec, item = find_codec(kv_dtype), runner.dtype.itemsize

    def stored(size: int) -> int:
        return size * item if codec is None else codec.entry_bytes(size)

    cache = sum(
        count * shape.kv_heads * (stored(shape.key_dim) + stored(shape.value_dim))
        for shape, count in zip(runner.shapes, entries, strict=True)
    )
    return float(weight_bytes(runner, weights) + cache)


def roofline(
    runner: ModelRunner,
    run: Pass,
    prefill: float,
    step: float | None,
    roof: Roof,
    kv_dtype: str = "auto",
    weights: str = "auto",
) -> dict[str, Any]:
    """Shares of the machine's rates: matrix rate in prefill, read bandwidth in decode.

    ``prefill``, ``step``: measured seconds.  Decode steps that run together with prefill
    are not counted, so the matrix share is a lower bound.
    """
    flops = sum(prefill_flops(runner, computed) for computed in run.computed)
    entries = [(a + b) / 2 for a, b in zip(run.kept_prefill, run.kept_end, strict=True)]
    size = decode_bytes(runner, entries, kv_dtype, weights)
    return {
        "prefill_flops": flops,
        "share_of_matrix_rate": flops / prefill / roof.matrix,
        "decode_step_bytes": size,
        "share_of_read_bandwidth": None if step is None else size / step / roof.read,
    }


def _layers(runner: ModelRunner) -> list[Any]:
    return list(runner.body.layers)[: runner.depth]
