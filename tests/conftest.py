"""Shared builders: few threads, and a check of every pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyramidinfer.cache import Pool
from pyramidinfer.engine import engine, profiling
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.policies.profile import Profile


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Head profiles of tests' models are neither looked for nor left in the user's cache."""
    own = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            profiling,
            "profiles_folder",
            lambda: Path(os.environ.get("PYRAMIDINFER_CACHE") or own) / "profiles",
        )
        yield


@pytest.fixture(autouse=True, scope="session")
def heads_are_measured_once() -> Iterator[None]:
    """Profiles of models without a tokenizer are not stored, so every engine would measure its own:
    here engines of the same weights and dtype have one measurement."""
    known: dict[torch.dtype, list[Profile]] = {}
    ensure = engine.ensure_profile

    def once(shared: Shared) -> Profile:
        if shared.tokenizer is not None or profiling.look_up(shared.runner) is not None:
            return ensure(shared)
        mark, measured = fingerprint(shared.runner), known.setdefault(shared.runner.dtype, [])
        found = next((each for each in measured if each.fingerprint.matches(mark)), None)
        if found is None:
            found = ensure(shared)
            measured.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ensure_profile", once)
        yield


@pytest.fixture(autouse=True)
def checked_pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is freed in a test's pools turns into NaN, so that reading it shows, and every pool is
    checked when the test is over."""
    pools: list[Pool] = []
    build = Pool.__init__

    def init(self: Pool, *values: Any, **options: Any) -> None:
        build(self, *values, **{"poison": True, **options})
        pools.append(self)

    monkeypatch.setattr(Pool, "__init__", init)
    yield
    for pool in pools:
        pool.check()
