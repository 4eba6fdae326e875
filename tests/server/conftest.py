"""One server for all tests that need no settings of their own, looked after by each module."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

from pyramidinfer import LLM
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Pyramid
from tests.server.live import Live, serving, tiny_llm
from tests.server.tabs import chromium, open_tab, server

__all__ = ["chromium", "open_tab", "server"]  # fixtures of the page's tests


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The shipped model; half of a text goes deeper than its middle."""
    torch.set_num_threads(1)
    policy = Pyramid(keep=0.45, min_context=64, start_layer=5, propagate_ratio=0.5)
    # float32: its products are our own on every CPU, so a request's bits do not depend on company
    return LLM(shipped_model(), policy, kv_memory="64MiB", dtype="float32")


@pytest.fixture(scope="session")
def shared(llm: LLM) -> Iterator[Live]:
    with serving(llm, max_tokens_limit=3000) as live:
        yield live


@pytest.fixture(scope="module")
def live(shared: Live) -> Iterator[Live]:
    """The shared server; after a module nothing of its requests is left."""
    yield shared
    shared.settle()


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.openai() as client:
        yield client


@pytest.fixture(scope="module")
def tiny() -> Iterator[Live]:
    """A tiny random model that can write JSON."""
    with serving(tiny_llm(), model_name="tiny") as live:
        yield live
