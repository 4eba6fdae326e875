"""The backend that docs/add_a_backend.md begins with is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention import test_reference

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_backend.md"


@pytest.mark.parametrize("scale", test_reference.SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_guides_backend(scale: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    made: dict[str, Any] = {}
    exec(code, made)
    backend = made["OneByOneBackend"]()
    monkeypatch.setattr(test_reference, "select_backend", {backend.name: backend}.__getitem__)
    test_reference.test_decode_over_ragged_pages(backend.name, scale, dtype)
