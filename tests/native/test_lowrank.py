"""What adapters add to a linear's rows, in every instruction set, and that nobody else sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyramidinfer.models.adapters import Adapted, Adapter, Low, Part
from pyramidinfer.models.ops import ADD, GATED, PLAIN, KernelOps
from tests.native.isas import ISAS, backend, random

OPS = [
    pytest.param(isa, dtype, weights, id=f"{isa}-{dtype}-{weights}")
    for isa in ISAS
    for dtype in (torch.float32, torch.bfloat16)
    for weights in ("auto", "int4")
    if backend(isa).kernels.multiplies(dtype)
]
#: Rows, inputs, outputs of two linears side by side; ranks of three adapters in each of them.
SHAPES = [(1, 32, (48, 6)), (7, 70, (30, 130)), (45, 96, (129, 129))]
RANKS = [(3, 17), (0, 8), (20, 0)]
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


def parts_of(seed: int, depth: int, sizes: tuple[int, int], ranks: tuple[int, int]) -> list[Part]:
    found, at = [], 0
    for number, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        down, up = (random(seed + number, *n) * 0.3 for n in ((rank, depth), (size, rank)))
        if rank:
            found.append(Part(down, up, 0.5 + number, at))
        at += size
    return found


def expected(x: Tensor, whole: Tensor, group: list[int], many: list[list[Part]]) -> Tensor:
    out = x.double() @ whole.double().T
    for row, number in enumerate(group):
        for down, up, scale, at in many[number] if number >= 0 else ():
            found = up.to(x).double() @ (down.to(x).double() @ x[row].double())
            out[row, at : at + len(up)] += scale * found
    return out


@pytest.mark.parametrize("isa,dtype,weights", OPS)
def test_linears_with_adapters(isa: str, dtype: torch.dtype, weights: str) -> None:
    """Rows of several adapters and of none: side by side, with a residual, gated."""
    ops = KernelOps(backend(isa).kernels, dtype, weights)
    for rows, depth, sizes in SHAPES:
        if weights == "auto" and depth % ops.multiple:
            continue
        gated = sizes[0] == sizes[1]
        x, parts = (
            random(1, rows, depth, dtype=dtype),
            [random(2 + i, n, depth) * 0.2 for i, n in enumerate(sizes)],
        )
        many = [parts_of(10 * i, depth, sizes, ranks) for i, ranks in enumerate(RANKS)]
        group = [(5 * row) % 4 - 1 for row in range(rows)] if rows > 1 else [0]
        packed = ops.pack([each.to(dtype) for each in parts], [None, None], PLAIN)
        plain = ops.linear(x, packed, PLAIN)
        adapters = [Adapter(str(i), "", "", {}) for i in range(len(many))]
        adapted = Adapted.of((adapters[i] if i >= 0 else None, 1) for i in group)
        assert adapted is not None
        for adapter, mine in zip(adapters, many, strict=True):
            both = [ops.pack_low_rank(mine, packed, PLAIN), None]
            if gated:
                gates = ops.pack([each.to(dtype) for each in parts], [None, None], GATED)
                both[1] = ops.pack_low_rank(mine, gates, GATED)
            adapter.take(both)
        identity = torch.zeros(sum(sizes), depth)
        added = expected(x, identity, group, many)
        residual = random(6, rows, sum(sizes), dtype=dtype)
        for how, more in ((PLAIN, None), (ADD, residual)):
            got = ops.linear(x, packed, how, more, Low(adapted, 0))
            wanted = plain.double() + added + (0 if more is None else more.double())
            unit = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(got.double(), wanted, atol=NEAR[dtype] * unit, rtol=0)
            for row, number in enumerate(group):
                alone = Adapted.of([(adapters[number] if number >= 0 else None, 1)])
                low = None if alone is None else Low(alone, 0)
                one = slice(row, row + 1)
                mine = ops.linear(x[one], packed, how, None if more is None else more[one], low)
                assert mine.equal(got[one]), "its bits depend on other rows"
        if gated:
            got = ops.linear(x, gates, GATED, None, Low(adapted, 1))
            gate, up = (plain.double() + added).chunk(2, dim=1)
            wanted = torch.nn.functional.silu(gate) * up
            unit = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(got.double(), wanted, atol=NEAR[dtype] * unit, rtol=0)
