"""Shared builders: tiny random models, engines whose freed pages are poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyramidinfer import LLM
from tests.tiny import tiny_model


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_llm() -> Iterator[Any]:
    """Build LLMs with poisoned pages; every pool is checked when the test is over."""
    made: list[LLM] = []

    def build(model: Any = "llama", **options: Any) -> LLM:
        options = {"kv_memory": "16MiB", "poison": True, "page_size": 4, **options}
        source = tiny_model(model) if isinstance(model, str) and "/" not in model else model
        llm = LLM(source, **options)
        made.append(llm)
        return llm

    yield build
    for llm in made:
        llm.engine.check()
