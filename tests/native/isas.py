"""Which instruction sets this CPU can run, and what a result may differ by."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from pyramidinfer.attention.cpu import CPUBackend
from pyramidinfer.native import NoCompilerError
from pyramidinfer.native.build import cpu_flags, find_compiler

__all__ = ["DTYPES", "EXACT", "ISAS", "ROUNDING", "backend", "close", "random"]

NEEDED = {
    "native": set(),
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
ISAS = [name for name, flags in NEEDED.items() if flags <= set(cpu_flags().split())]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Results that are float32 whatever the dtype, since products and sums are.
EXACT = 1e-5
#: Results in the dtype, as shares of the largest value that is weighted: one rounding of a weight
#: (where pairs of bf16 are multiplied) and one of the result.
ROUNDING = {torch.float32: EXACT, torch.bfloat16: 2**-8, torch.float16: 2**-10}

try:
    find_compiler()
except NoCompilerError as reason:
    pytest.skip(str(reason), allow_module_level=True)


@cache
def backend(isa: str) -> CPUBackend:
    """Built once, into the user's cache."""
    return CPUBackend(isa)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor | None, expected: Tensor | None, limit: float, what: str = "") -> None:
    """Within ``limit``, in units of the largest number expected (at least 1)."""
    assert got is not None and expected is not None
    assert got.shape == expected.shape
    unit = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        got.double(), expected.double(), atol=limit * unit, rtol=0, msg=lambda text: what + text
    )
