"""Writing and reading what a codec stores in Triton, against torch: on a GPU, else interpreted."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidinfer.cache import GroupSpec, Layout, Pool
from pyramidinfer.cache.group import Group
from pyramidinfer.cache.mover import Mover, Slots
from pyramidinfer.codec import CODECS, Codec, rotate

pytest.importorskip("triton")

from pyramidinfer.cache import triton_compact
from pyramidinfer.cache.triton_compact import TritonMover

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_compact.INTERPRETED:
    assert os.environ.get("TRITON_INTERPRET") != "1", "set too late: Triton was imported before"
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

PAGE, HEADS = 4, 3
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
#: Key and value sizes: groups of 64, 16, 32 and 4 channels.
sizes = pytest.mark.parametrize("sizes", [(64, 128), (80, 16), (96, 12)], ids=str)


class Entries(NamedTuple):
    """New entries of tokens in scattered slots; keys and values are parts of one tensor."""

    slots: Slots
    keys: Tensor
    values: Tensor
    positions: Tensor


def group_of(codec: Codec, sizes: tuple[int, int], dtype: torch.dtype, scores: bool) -> Group:
    spec = GroupSpec((0,), HEADS, *sizes, dtype, codec)
    layout = Layout([spec], 40 * spec.page_bytes(PAGE, scores), PAGE, scores=scores)
    group = Pool(layout, DEVICE, poison=True).group(0)
    if group.scores is not None:
        group.scores.fill_(7.0)
    return group


def entries_of(count: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(count, HEADS, sum(sizes), generator=generator)
    both[0] = 0.0  # without a scale
    both[-1] *= 1e-6  # with one that float16 rounds coarsely
    both[-2, :, 1] = 300.0
    slot = torch.randperm(36 * PAGE, generator=generator)[: count * HEADS].view(count, HEADS)
    slots = Slots((slot // PAGE).to(DEVICE), (slot % PAGE).to(DEVICE))
    positions = torch.arange(count) * 5
    both = both.to(DEVICE, dtype)
    return Entries(slots, *both.split(sizes, dim=2), positions.to(DEVICE))


def numbers(group: Group, which: str) -> Tensor:
    """Rotated, as they are stored, in float64."""
    assert group.spec.codec is not None
    scales = getattr(group, f"{which}_scales")
    return group.spec.codec.rotated(getattr(group, f"{which}s"), scales, torch.float64)


def same(got: Group, expected: Group) -> None:
    """Codes and scales but for rare roundings: a scale one float16 next to it, and a code of the
    next number.  At most one in a hundred differs; in steps of a scale by one (fp8: by 32)."""
    assert torch.equal(got.positions, expected.positions)
    if expected.scores is not None:
        assert got.scores is not None and torch.equal(got.scores, expected.scores)
    for which in ("key", "value"):
        scales, theirs = (getattr(each, f"{which}_scales") for each in (got, expected))
        assert torch.equal(scales.isnan(), theirs.isnan()), "other entries were written to"
        torch.testing.assert_close(scales, theirs, rtol=2**-10, atol=2**-24, equal_nan=True)
        codes, right = (getattr(each, f"{which}s") for each in (got, expected))
        assert float((codes != right).double().mean()) < 0.01
        step = 32.0 if got.spec.codec is CODECS["fp8"] else 1.0
        apart = (numbers(got, which) - numbers(expected, which)).abs()
        limit = 1.2 * step * theirs.double()[..., None] + 1e-9
        assert bool((apart <= limit)[~theirs.isnan()].all())


@codecs
@sizes
@dtypes
@pytest.mark.parametrize("scores", [False, True])
def test_writes_what_torch_writes(
    codec: Codec, sizes: tuple[int, int], dtype: torch.dtype, scores: bool
) -> None:
    """In one program, and in several that the entries do not fill."""
    for count in (3, 19):
        got, expected = (group_of(codec, sizes, dtype, scores) for _ in range(2))
        made = entries_of(count, sizes, dtype)
        TritonMover().write(got, *made)
        Mover().write(expected, *made)
        same(got, expected)
        assert bool(got.keys.any()) and bool(got.values.any())


@pytest.mark.parametrize("factor", [1.0, 1.03, 0.97])
def test_every_number_of_fp8(factor: float) -> None:
    """The bits of torch's float8_e4m3fn, subnormal ones, too, and of what lies between them."""
    codec = CODECS["fp8"]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = F.pad(every[~every.isnan()] * factor, (0, 61)).clamp(-448, 448).view(5, 63)
    rotated = F.pad(every, (1, 0), value=448.0)  # so that the scale is 1
    keys = rotate(rotated)[:, None].expand(-1, HEADS, -1).contiguous().to(DEVICE)
    group = group_of(codec, (64, 64), torch.float32, False)
    slots, _, _, positions = entries_of(5, (64, 64), torch.float32)
    TritonMover().write(group, slots, keys, keys, positions)
    expected = rotated.to(torch.float8_e4m3fn).float()[:, None].expand(-1, HEADS, -1)
    assert group.key_scales is not None and bool((group.key_scales[slots] == 1).all())
    got = group.keys[slots].view(torch.float8_e4m3fn).float().cpu()
    assert torch.equal(got, expected)


@codecs
def test_no_entries_are_written(codec: Codec) -> None:
    got, expected = (group_of(codec, (64, 64), torch.float32, True) for _ in range(2))
    slots, *rest = entries_of(3, (64, 64), torch.float32)
    TritonMover().write(got, Slots(*(each[:0] for each in slots)), *(each[:0] for each in rest))
    same(got, expected)


@codecs
@sizes
@dtypes
@pytest.mark.parametrize("kept", [0, 1, 18])
def test_reads_what_torch_reads(
    codec: Codec, sizes: tuple[int, int], dtype: torch.dtype, kept: int
) -> None:
    """Entries of one head in pages anywhere, the last of them half full; the rest is NaN."""
    group = group_of(codec, sizes, dtype, False)
    pages = np.random.default_rng(3).permutation(36)[: HEADS * 6].reshape(HEADS, 6)
    entry = np.arange(kept)
    at = torch.from_numpy(pages[:, entry // PAGE].T.copy())
    offsets = torch.from_numpy(entry % PAGE)[:, None].expand(-1, HEADS)
    _, keys, values, _ = entries_of(18, sizes, dtype)
    keys, values = keys[:kept], values[:kept]
    slots = Slots(at.to(DEVICE), offsets.to(DEVICE))
    Mover().write(group, slots, keys, values, torch.arange(kept, device=DEVICE))
    near = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    for storage, scales in ((group.keys, group.key_scales), (group.values, group.value_scales)):
        assert scales is not None
        got, expected = (
            each.decode(group, storage, scales, pages, kept) for each in (TritonMover(), Mover())
        )
        assert got.dtype == expected.dtype == dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=near, atol=300 * 1e-6)


class Waits(TorchDispatchMode):
    """Raises where the host would have to know what is in a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


def test_writing_waits_for_nothing() -> None:
    group = group_of(CODECS["int4"], (64, 64), torch.float16, True)
    made = entries_of(3, (64, 64), torch.float16)
    with Waits():
        TritonMover().write(group, *made)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
@codecs
def test_a_graph_replays(codec: Codec) -> None:
    got, expected = (group_of(codec, (64, 80), torch.float16, True) for _ in range(2))
    made, other = (entries_of(19, (64, 80), torch.float16, seed) for seed in (0, 1))
    TritonMover().write(got, *made)  # compiled outside of the capture
    Mover().write(expected, *made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        TritonMover().write(got, *made)
    for mine, new in zip((*made.slots, *made[1:]), (*other.slots, *other[1:]), strict=True):
        mine.copy_(new)
    graph.replay()
    Mover().write(expected, *other)
    same(got, expected)
