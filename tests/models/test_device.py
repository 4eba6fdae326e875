"""What works where a model is, is chosen in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pyramidinfer
from pyramidinfer.cache.mover import Mover
from pyramidinfer.cache.native import KernelMover
from pyramidinfer.models import device as choosing
from pyramidinfer.models.device import choose_device
from pyramidinfer.models.ops import KernelOps, TorchOps
from tests.native.isas import DTYPES, backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_on_the_kernels(dtype: torch.dtype) -> None:
    found = choose_device("cpu", CPU, dtype)
    kernels = backend("native").kernels
    assert type(found.mover) is KernelMover and found.mover.kernels is kernels
    assert isinstance(found.ops, KernelOps) == kernels.multiplies(dtype)
    assert found.attention.name == "cpu" and not found.replays


def test_in_plain_torch() -> None:
    found = choose_device("reference", CPU, torch.float32)
    assert type(found.mover) is Mover and found.mover.kernels is None
    assert found.ops is None and found.attention.name == "reference" and not found.replays
    assert type(choose_device("reference", GPU, torch.float32).ops) is TorchOps


def test_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    made = choose_device("triton", CPU, torch.float32)
    assert type(made.mover) is Mover and type(made.ops) is TorchOps and made.replays
    monkeypatch.setattr(choosing, "select_backend", lambda *given: made.attention)
    found = choose_device("triton", GPU, torch.bfloat16)
    names = type(found.mover).__name__, type(found.ops).__name__
    assert names == ("TritonMover", "TritonOps") and found.replays


def test_nobody_else_asks_what_the_backend_is() -> None:
    asks = re.compile(r"""name (==|!=|in) ["'(]+(cpu|triton|reference)|find_spec\("triton""")
    root = Path(pyramidinfer.__file__).parent
    parts = ("attention", "cache", "models", "engine", "policies")
    files = [path for part in parts for path in (root / part).rglob("*.py")]
    found = {path.name for path in files if asks.search(path.read_text())}
    assert found == {"device.py", "select.py"}
