"""Codes and scales: how near what is read is to what was stored, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyramidinfer.cache import Copier, GroupSpec, Layout, Pool, Table
from pyramidinfer.cache.group import Group
from pyramidinfer.codec import CODECS, Codec, find_codec, rotate
from pyramidinfer.config import KV_DTYPES
from pyramidinfer.types import Keep

EACH = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
#: Head sizes of models, and the channels of them that share a scale.
GROUPS = {4: 4, 8: 8, 16: 16, 20: 4, 48: 16, 64: 64, 80: 16, 96: 32, 128: 64, 192: 64, 256: 64}
CPU = torch.device("cpu")


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps_off(codec: Codec, x: Tensor) -> Tensor:
    """``[..., groups, group]``: how far rotated numbers are from what is stored, in scales; of fp8
    less what the rounding of a number of its size may be."""
    codes, scales = codec.encode(x)
    wanted = rotate(x.double().unflatten(-1, (scales.shape[-1], -1)))
    off = (codec.rotated(codes, scales, torch.float64) - wanted).abs()
    step = scales.double()[..., None]
    if codec.is_float:
        off = off - wanted.abs() / 16  # three bits of mantissa: half of 2^-3
    return torch.where(step > 0, off / step, off)


@EACH
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from(sorted(GROUPS)),
    power=st.floats(-2, 4),
    spikes=st.booleans(),
)
def test_no_number_is_further_off_than_half_a_step(
    codec: Codec, seed: int, size: int, power: float, spikes: bool
) -> None:
    """... and the rounding of a float16 scale, by which the largest of a group may be cut off."""
    x = drawn(seed, 6, size, dtype=torch.float64) * 10**power
    if spikes:
        x[..., seed % size] *= 30
    cut = codec.middle * 2**-11
    assert float(steps_off(codec, x).max()) <= (2**-10 if codec.is_float else 0.5 + cut) + 1e-6


@EACH
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from(sorted(GROUPS)))
def test_what_is_read_is_near_what_was_stored(codec: Codec, seed: int, size: int) -> None:
    """By the length of a group: rotations change none."""
    x = drawn(seed, 5, size)
    found = codec.decode(*codec.encode(x), torch.float32)
    groups = (-1, codec.group(size))
    off = (found - x).unflatten(-1, groups).norm(dim=-1)
    # of the largest number: int8 half of 1/127.5, int4 half of 1/7.5, fp8 1/16 of each number
    share = {"int8": 0.5 / 127.5, "int4": 0.5 / 7.5, "fp8": 1 / 16}[codec.name]
    top = rotate(x.unflatten(-1, groups)).abs().amax(-1)
    assert bool((off <= 1.01 * share * top * codec.group(size) ** 0.5 + 1e-6).all())


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_comes_back_in_the_dtype_asked_for(codec: Codec, dtype: torch.dtype) -> None:
    x = drawn(1, 3, 2, 64, dtype=dtype)
    found = codec.decode(*codec.encode(x), dtype)
    assert found.dtype == dtype and found.shape == x.shape
    mean = float((found.double() - x.double()).norm() / x.double().norm())
    assert mean < {"int8": 0.01, "fp8": 0.03, "int4": 0.12}[codec.name]


@EACH
def test_rows_of_zeros_are_zeros(codec: Codec) -> None:
    x = drawn(2, 4, 128)
    x[1], x[2, 64:] = 0.0, 0.0
    codes, scales = codec.encode(x)
    found = codec.decode(codes, scales, torch.float32)
    assert not found[1].any() and not found[2, 64:].any() and found[3].any()
    assert not scales[1].any() and bool((scales[3] > 0).all())


@EACH
def test_a_row_does_not_depend_on_its_neighbours(codec: Codec) -> None:
    x = drawn(3, 5, 80)
    together = codec.encode(x)
    for row in range(5):
        alone = codec.encode(x[row])
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))


@EACH
def test_large_numbers_are_stored_up_to_the_range_of_a_scale(codec: Codec) -> None:
    """A float16 scale goes to 65504: a group holds rotated numbers of 65504 times the top code."""
    top = 448.0 if codec.is_float else codec.middle
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 5] = 8 * 65000 * top  # rotated, each is an eighth of it
    codes, scales = codec.encode(x)
    found = codec.decode(codes, scales, torch.float64)
    assert bool(torch.isfinite(found).all())
    assert float((found - x).abs().max()) < 0.01 * float(x.max())


@EACH
def test_small_numbers_are_stored_down_to_the_range_of_a_scale(codec: Codec) -> None:
    """Below it they are zero, never NaN."""
    for power in range(0, -16, -1):
        x = drawn(4, 3, 64) * 10.0**power
        found = codec.decode(*codec.encode(x), torch.float32)
        assert bool(torch.isfinite(found).all())
        assert float((found - x).abs().max()) <= 0.2 * float(x.abs().max()) + 1e-5


@EACH
def test_bytes_are_those_of_the_tensors(codec: Codec) -> None:
    for size, group in GROUPS.items():
        assert codec.group(size) == group
        codes, scales = codec.encode(drawn(5, 7, size))
        assert codes.dtype == torch.uint8 and codes.shape == (7, codec.code_bytes(size))
        assert scales.dtype == torch.float16 and scales.shape == (7, size // group)
        assert codes.nbytes + scales.nbytes == 7 * codec.entry_bytes(size)


@EACH
@pytest.mark.parametrize("scores", [False, True])
def test_a_page_takes_the_bytes_it_is_counted_with(codec: Codec, scores: bool) -> None:
    spec = GroupSpec((0,), 2, 96, 80, torch.bfloat16, codec)
    pages = 9
    group = Group(spec, pages, 16, CPU, scores, poison=False)
    held = sum(each[:pages].nbytes for each in group.tensors())
    assert held == pages * spec.page_bytes(16, scores)
    least = Layout.smallest([spec], 16, scores)
    assert least.layer_page_bytes.tolist() == [spec.page_bytes(16, scores)]
    per_entry = (96 + 80) * 2 + 4 + 4 * scores
    assert least.uncoded_page_bytes.tolist() == [16 * per_entry]


def test_entries_of_heads_of_64() -> None:
    """The bytes that docs/kv_dtype.md tells: keys, values and a position."""
    found = {}
    for name in KV_DTYPES:
        spec = GroupSpec((0,), 1, 64, 64, torch.bfloat16, find_codec(name))
        found[name] = spec.page_bytes(1, False)
    assert found == {"auto": 260, "int8": 136, "fp8": 136, "int4": 72}


def test_two_codes_share_a_byte() -> None:
    """Low bits: the first half of a group; high bits: the second half."""
    codec = CODECS["int4"]
    wanted = torch.arange(128) % 16
    low, high = wanted.view(2, 2, 32).unbind(1)
    codes = (low | high << 4).flatten().to(torch.uint8)
    scales = torch.tensor([1.0, 2.0], dtype=torch.float16)
    found = codec.rotated(codes, scales, torch.float32)
    assert torch.equal(found, (wanted.view(2, 64) - 7.5) * scales[:, None].float())
    # and the other way round: numbers that lie on the codes of a scale of 1
    rows = found[0].clone()
    x = rotate(rows)
    again, scale = codec.encode(x)
    assert scale.tolist() == [1.0] and torch.equal(again, codes[:32])


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_a_rotation_is_undone_by_itself(size: int) -> None:
    x = drawn(6, 3, size, dtype=torch.float64)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-12)
    matrix = rotate(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix, matrix.T) and torch.allclose(
        matrix @ matrix, torch.eye(size, dtype=torch.float64)
    )
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    y = drawn(7, 3, size, dtype=torch.float64)
    assert torch.allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1))


@EACH
def test_heads_that_cannot_be_cut_are_refused(codec: Codec) -> None:
    for size in (1, 2, 6, 27, 50):
        with pytest.raises(
            ValueError, match=f"{codec.name}.* multiples of 4; this model has {size}"
        ):
            codec.group(size)


@EACH
def test_entries_move_with_their_scales(codec: Codec) -> None:
    """Written in parts, evicted from, forked, exported and imported, cut back: of every entry the
    numbers are those that the codec gives of what was written."""
    spec = GroupSpec((0, 1), 2, 16, 8, torch.float32, codec)
    pool = Pool(Layout([spec], 60_000, 4), poison=True)
    keys, values, table = drawn(8, 22, 2, 16), drawn(9, 22, 2, 8), pool.new_table()
    for first, end in ((0, 13), (13, 22)):
        for layer in (0, 1):
            part, slots = slice(first, end), pool.append(table, layer, end - first)
            pool.write(layer, slots, keys[part], values[part], torch.arange(first, end))
        table.seen_len = end

    def check(table: Table, layer: int, stays: list[set[int]]) -> None:
        pool.check()
        for head, expected in enumerate(stays):
            found = pool.positions(table, layer)[head, : len(expected)].long()
            assert set(found.tolist()) == expected
            one = slice(head, head + 1)
            for read, wrote in ((pool.keys, keys), (pool.values, values)):
                wanted = codec.decode(*codec.encode(wrote[found, head]), torch.float32)
                assert torch.equal(read(table, layer, one)[0], wanted)

    every = [set(range(22))] * 2
    pool.keep(
        table, 0, Keep(torch.tensor([[21, 3, 9, 1, 20], [0, 14, 7, 0, 0]]), torch.tensor([5, 3]))
    )
    check(table, 0, [{1, 3, 9, 20, 21}, {0, 7, 14}])
    check(table, 1, every)
    twin = pool.fork(table)
    pool.keep(twin, 1, Keep(torch.tensor([[4, 5], [21, 0]])))
    check(twin, 1, [{4, 5}, {0, 21}])
    check(table, 1, every)
    pool.release(twin)
    exported = Copier(pool).export(table)
    pool.release(table)
    table = Copier(pool).import_(exported)
    check(table, 0, [{1, 3, 9, 20, 21}, {0, 7, 14}])
    check(table, 1, every)
    pool.truncate(table, 14)
    check(table, 0, [{1, 3, 9}, {0, 7}])
    check(table, 1, [set(range(14))] * 2)


@EACH
def test_freed_entries_are_poisoned(codec: Codec) -> None:
    spec = GroupSpec((0,), 2, 16, 8, torch.float32, codec)
    pool = Pool(Layout([spec], 60_000, 4), poison=True)
    table = pool.new_table()
    pool.write(0, pool.append(table, 0, 6), drawn(1, 6, 2, 16), drawn(2, 6, 2, 8), torch.arange(6))
    freed = table.pages[0, :, 1].tolist()
    pool.keep(table, 0, Keep(torch.tensor([[0, 1, 2], [0, 1, 2]])))
    group = pool.groups[0]
    for scales in (group.key_scales, group.value_scales):
        assert scales is not None and scales[freed].isnan().all()
        assert scales[table.pages[0, 0, 0], 3].isnan().all()
        assert not scales[table.pages[0, 0, 0], :3].isnan().any()


def test_an_unknown_name_is_refused() -> None:
    assert find_codec("auto") is None
    with pytest.raises(ValueError, match="'int3' is unknown; did you mean 'int8'"):
        find_codec("int3")
