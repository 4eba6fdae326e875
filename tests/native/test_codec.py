"""Entries of few bits in the C++ kernels: written, read and attended to as codec.py says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyramidinfer.attention.base import Pages, Scale
from pyramidinfer.cache import GroupSpec, Pool
from pyramidinfer.cache import Layout as PoolLayout
from pyramidinfer.cache.mover import Mover
from pyramidinfer.cache.native import KernelMover
from pyramidinfer.codec import CODECS, Codec
from pyramidinfer.types import Keep
from tests.native.isas import DTYPES, backend, random
from tests.native.test_attention import LAYOUTS, REFERENCE, SCALES, Layout, isas, paged

#: The largest part by which attention may differ from the reference's over the same codes: where
#: queries and weights are rounded to bf16, and to a byte (integer products with 4 bits).
LOOSE = {torch.float32: 0.02, torch.bfloat16: 0.02, torch.float16: 0.02}
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WHOLE = [layout for layout in LAYOUTS if layout.value_dim % 4 == 0]


def coded(pages: Pages, codec: Codec) -> Pages:
    """The same entries by a codec; what is NaN has scales that are."""
    keys, key_scales = codec.encode(pages.keys.float())
    values, value_scales = codec.encode(pages.values.float())
    return Pages(keys, values, pages.positions, key_scales, value_scales, codec)


def apart(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape and not got.isnan().any()
    return float((got.double() - exact.double()).abs().max() / exact.abs().max())


@isas
@codecs
@dtypes
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("layout", [WHOLE[0], WHOLE[1], WHOLE[4], WHOLE[5], WHOLE[6], WHOLE[11]])
def test_decode(isa: str, codec: Codec, dtype: torch.dtype, scale: Scale, layout: Layout) -> None:
    """Ragged requests and heads over pages whose unused entries are NaN."""
    plan, queries, plain = paged(layout, [1, 333, 37, 256], dtype)
    pages, cpu = coded(plain, codec), backend(isa)
    got = cpu.run(plan, 0, queries, pages, scale, probs=True)
    exact = REFERENCE.run(plan, 0, queries.double(), pages, scale, probs=True)
    assert got.out.dtype == dtype and got.lse is not None and got.probs is not None
    assert exact.lse is not None and exact.probs is not None
    is_float = not (codec.bits == 4 or dtype == torch.bfloat16)
    bound = 0.001 if is_float else LOOSE[dtype]
    assert apart(got.out, exact.out) < bound
    assert float((got.lse - exact.lse).abs().max()) < 4 * bound
    assert float((got.probs - exact.probs).abs().max()) < bound * layout.heads / layout.kv_heads


@isas
@codecs
def test_numbers_that_are_none_show(isa: str, codec: Codec) -> None:
    """NaN in a query, a key or a value comes out as NaN."""
    plan, queries, plain = paged(LAYOUTS[1], [20, 20], torch.float32)
    pages, cpu, scale = coded(plain, codec), backend(isa), SCALES["plain"]
    slot = int(plan.tables[0, 0, 0, 0]), 3
    assert not cpu.run(plan, 0, queries, pages, scale).out.isnan().any()
    for where in ("query", "key_scales", "value_scales"):
        worse = queries.clone()
        if where == "query":
            worse[0, 0, 5] = torch.nan
        else:
            scales = getattr(pages, where).clone()
            scales[slot] = torch.nan
            pages = pages._replace(**{where: scales})
        out = cpu.run(plan, 0, worse, pages, scale).out
        assert out[0, 0].isnan().all() and not out[1].isnan().any(), where
        pages = coded(plain, codec)


def pool_pair(codec: Codec, dtype: torch.dtype, size: int) -> list[Pool]:
    spec = GroupSpec((0,), 2, size, 2 * size, dtype, codec)
    return [
        Pool(PoolLayout([spec], 200_000, 4), mover=mover, poison=True)
        for mover in (KernelMover(backend("native").kernels), Mover())
    ]


@codecs
@dtypes
@pytest.mark.parametrize("size", [4, 16, 64, 80, 128])
def test_written_as_in_torch(codec: Codec, dtype: torch.dtype, size: int) -> None:
    """Codes are torch's but for a rounding here and there, and what is read back is as near."""
    pools = pool_pair(codec, dtype, size)
    tables = [pool.new_table() for pool in pools]
    keys, values = random(1, 50, 2, size, dtype=dtype), random(2, 50, 2, 2 * size, dtype=dtype)
    keys[7], values[9] = 0, 0
    for pool, table in zip(pools, tables, strict=True):
        pool.write(0, pool.append(table, 0, 50), keys, values, torch.arange(50))
    codes, expected = (pool.group(0) for pool in pools)
    for mine, other in zip(codes.tensors(), expected.tensors(), strict=True):
        differs = mine.nan_to_num() != other.nan_to_num()
        assert float(differs.float().mean()) < 0.002
    for read, of in ((Pool.keys, keys), (Pool.values, values)):
        mine, other = (read(*pair, 0) for pair in zip(pools, tables, strict=True))
        assert mine.dtype == dtype
        assert float((mine - other).float().abs().mean() / of.float().abs().mean()) < 0.005
        lost = float((mine.transpose(0, 1) - of).float().norm() / of.float().norm())
        assert lost < {"int8": 0.012, "fp8": 0.04, "int4": 0.15}[codec.name]
        assert not mine[:, 7 if of is keys else 9].any()


@codecs
def test_scales_move_with_their_codes(codec: Codec) -> None:
    pools = pool_pair(codec, torch.float32, 64)
    keys, values = random(1, 50, 2, 64), random(2, 50, 2, 128)
    stays = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(2)])
    for pool in pools:
        table = pool.new_table()
        pool.write(0, pool.append(table, 0, 50), keys, values, torch.arange(50))
        before = pool.keys(table, 0), pool.values(table, 0)
        pool.keep(table, 0, Keep(stays))
        places = pool.positions(table, 0)
        assert places.sort().values.equal(stays)
        for was, now in zip(before, (pool.keys(table, 0), pool.values(table, 0)), strict=True):
            assert now.equal(was.gather(1, places[..., None].expand_as(now)))
        pool.check()
