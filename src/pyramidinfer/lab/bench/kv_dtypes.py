"""``bench kv-dtypes``: decode attention over entries of 16, 8 and 4 bits, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.attention.base import Pages
from pyramidinfer.codec import find_codec
from pyramidinfer.config import parse_device, parse_dtype
from pyramidinfer.lab.bench.kernels import all_heads_alike
from pyramidinfer.lab.bench.machine import plain_read
from pyramidinfer.lab.bench.plans import KvDtypesPlan
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.bench.timing import ratios, side_by_side, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.device import choose_device

__all__ = ["SHAPES", "KvDtypesPlan", "coded", "run_kv_dtypes"]


class Shape(NamedTuple):
    """Query heads, KV heads and head size, of a model or freely chosen."""

    heads: int
    kv_heads: int
    size: int
    model: str


SHAPES = (
    Shape(16, 16, 64, "full heads of 64"),
    Shape(32, 32, 128, "full heads of 128 (Llama-2-7B)"),
    Shape(9, 3, 64, "SmolLM2-135M"),
    Shape(32, 8, 128, "Llama-3-8B"),
)


def run_kv_dtypes(plan: KvDtypesPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result: one row per shape, batch and context."""
    plan.check()
    device, dtype = parse_device(plan.device), parse_dtype(plan.dtype, None)
    backend = choose_device(plan.backend, device, dtype).attention
    rows: list[dict[str, Any]] = []
    total = len(SHAPES) * len(plan.batches) * len(plan.contexts)
    with progress("kv dtypes", total) as done, torch.inference_mode():
        for shape in SHAPES:
            for batch in plan.batches:
                for context in plan.contexts:
                    rows.append(_row(plan, shape, batch, context, device, dtype, backend))
                    done(f"{shape.model} {batch} {context}")
    result = {"backend": backend.name, "rows": rows}
    write_result(out, asdict(plan), result)
    return result


def _row(
    plan: KvDtypesPlan,
    shape: Shape,
    batch: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: Any,
) -> dict[str, Any]:
    page, heads = plan.page_size, (shape.heads, shape.kv_heads)
    entry = 2 * shape.size * dtype.itemsize
    needed = batch * shape.kv_heads * -(-context // page)
    # Whole layers, so that only pages are read that decode reads as well.
    pages = needed * max(1, -(-plan.storage // (entry * page * needed)))
    keys, values = (torch.randn(pages, page, shape.size, device=device).to(dtype) for _ in "kv")
    positions = torch.zeros(pages, page, dtype=torch.int32, device=device)
    storages = {"auto": Pages(keys, values, positions)}
    for name in plan.kv_dtypes:
        storages[name] = coded(storages["auto"], name)
    works: dict[str, Any] = {}
    for name, storage in storages.items():
        run = all_heads_alike(backend, heads, storage, batch, context, keys)
        works[name] = lambda _, run=run: run()
    works["read"] = lambda _: (plain_read(keys), plain_read(values))
    seconds = side_by_side(works, device, plan.repeats, plan.warmup)
    layers = pages // needed
    return {
        **shape._asdict(),
        "batch": batch,
        "context": context,
        "layers": layers,
        "seconds": {name: spread([x / layers for x in each]) for name, each in seconds.items()},
        "share_of_read": ratios(seconds["read"], seconds["auto"]),
        "speedup": {name: ratios(seconds["auto"], seconds[name]) for name in plan.kv_dtypes},
    }


def coded(plain: Pages, name: str) -> Pages:
    """The same entries, stored by the codec ``name`` (not ``auto``, which has none)."""
    codec = find_codec(name)
    assert codec is not None

    def encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
        parts = [codec.encode(part) for part in torch.split(numbers, 4096)]
        codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        return codes, scales

    keys, key_scales = encode(plain.keys)
    values, value_scales = encode(plain.values)
    return Pages(keys, values, plain.positions, key_scales, value_scales, codec)
