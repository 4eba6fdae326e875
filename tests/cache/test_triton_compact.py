"""Compaction in Triton against the pool's own: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from pyramidinfer.cache import GroupSpec, Layout, Pool
from pyramidinfer.cache.mover import plan_moves
from pyramidinfer.codec import find_codec
from pyramidinfer.types import Keep

pytest.importorskip("triton")

from pyramidinfer.cache import triton_compact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_compact.INTERPRETED:
    assert os.environ.get("TRITON_INTERPRET") != "1", "set too late: Triton was imported before"
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kv_dtype", ["auto", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(
    "length,kept", [(23, (9, 9, 9)), (23, (22, 3, 9)), (5, (1, 0, 5)), (8, (8, 8, 8))]
)
def test_moves_are_the_pools(
    length: int, kept: tuple[int, ...], scores: bool, dtype: torch.dtype, kv_dtype: str
) -> None:
    """The same tensors, bit by bit, as ``keep`` of a pool on the CPU leaves."""
    wide = 7 if kv_dtype == "auto" else 80
    spec = GroupSpec((0,), 3, 12, wide, dtype, find_codec(kv_dtype))
    pool = Pool(Layout([spec], 1 << 16, 4, scores=scores), poison=False)
    group = pool.group(0)
    group.free.reverse()  # pages from the far end
    table = pool.new_table(length)
    slots = pool.append(table, 0, length)
    keys, values = random(5, length, 3, 12, dtype=dtype), random(6, length, 3, wide, dtype=dtype)
    pool.write(0, slots, keys, values, torch.arange(length))
    if scores:
        pool.add_scores(table, 0, random(7, 3, length))
    keep = Keep(random(8, 3, length).argsort()[:, : max(kept)], torch.tensor(kept))
    moved = [each.to(DEVICE, copy=True) for each in group.tensors()]
    rows, whole = torch.from_numpy(table.pages[0].copy()), torch.full((3,), length)
    assert keep.indices is not None and keep.counts is not None
    moves = plan_moves(keep.indices, keep.counts, whole)
    moves = [each.to(DEVICE) for each in (rows, *moves)]
    triton_compact.move_entries(moved, *moves, page_size=4)
    pool.keep(table, 0, keep)
    for got, expected in zip(moved, group.tensors(), strict=True):
        assert torch.equal(got.cpu(), expected)
    assert len(moves[-1]) or min(kept) >= length - 1
