"""Norm, rotation and gating in Triton give torch's numbers, rounding included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pyramidinfer import SamplingParams
from pyramidinfer.attention import triton_kernels
from pyramidinfer.models.fused import FusedDecoder
from pyramidinfer.models.ops import GATED, Heads, TorchOps
from tests.engine.build import build
from tests.tiny import random_prompt

if not (torch.cuda.is_available() or triton_kernels.INTERPRETED):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
from pyramidinfer.models.triton_ops import TritonOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OURS, TORCH = TritonOps(), TorchOps()


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(DEVICE, dtype)


def same(got: Tensor, expected: Tensor) -> None:
    """Equal but where a sum taken in another order falls on the other side of a rounding.

    Triton's interpreter cuts bfloat16 off instead of rounding it; float16 shows where is rounded.
    """
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
    elif got.dtype == torch.bfloat16 and triton_kernels.INTERPRETED:
        torch.testing.assert_close(got, expected, atol=5e-2, rtol=3e-2)
    else:
        torch.testing.assert_close(got, expected, atol=4e-3, rtol=1.6e-2)
        assert int((got != expected).sum()) <= 0.01 * got.numel()


@dtypes
@pytest.mark.parametrize("size", [16, 96, 300])
def test_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = random(dtype, 5, 2 * size)[:, size:] * 3, random(dtype, size)
    same(OURS.norm(x, weight, 1e-2), TORCH.norm(x, weight, 1e-2))
    same(OURS.norm(x[:0], weight, 1e-2), x[:0])


@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_gate(dtype: torch.dtype, bias: bool) -> None:
    pair = [random(dtype, 1100, 20), random(dtype, 1100, 20) * 2]
    biases = [random(dtype, 1100), None] if bias else [None, None]
    x, weights = random(dtype, 3, 20), TORCH.pack(pair, biases, GATED)
    same(OURS.linear(x, weights, GATED), TORCH.linear(x, weights, GATED))


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size,rotated", [(16, 16), (80, 80), (24, 12), (8, 0)])
def test_rotate(dtype: torch.dtype, normed: bool, size: int, rotated: int) -> None:
    norms = (random(dtype, size), random(dtype, size) + 1) if normed else (None, None)
    heads = Heads(4, 2, size, rotated, *norms, 1e-3)
    angles = random(torch.float32, 3, rotated)
    cos, sin = (each.to(dtype).float() for each in (angles.cos(), angles.mul(1.3).sin()))
    got, expected = random(dtype, 3, 8, size), random(dtype, 3, 8, size)
    values = got[:, 6:].clone()
    OURS.rotate(got, heads, cos, sin)
    TORCH.rotate(expected, heads, cos, sin)
    same(got, expected)
    assert torch.equal(got[:, 6:], values), "values stay"


def noting(calls: list[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        calls.append(name)
        return real(*given)

    return call


def test_a_model_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a GPU: fixed buffers, attention and everything around it in Triton."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate((9, 5))]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    found = []
    for ops in (TorchOps, TritonOps):
        calls: list[str] = []
        for name in ("norm", "rotate", "linear"):
            real = getattr(ops, name)
            monkeypatch.setattr(ops, name, noting(calls, name, real))
        llm = build("full", "qwen3", torch.float32, backend="triton")
        decoder = llm.engine.runner.decoder
        assert isinstance(decoder, FusedDecoder)
        for each in (decoder, *decoder.layers.values()):
            each.ops = ops()
        found.append([each.token_ids for each in llm.generate(prompts, params)])
        assert {"norm", "rotate", "linear"} == set(calls)
    assert found[0] == found[1]
