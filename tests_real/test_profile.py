"""The package's head profiles are found for the models that they are of, and hold on them."""

from __future__ import annotations

import pytest

from pyramidinfer import LLM
from pyramidinfer.engine import passages
from pyramidinfer.engine.profiling import look_up, profile_model, rank_correlation, shipped_folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_packages_profile_is_found(name: str, dtype: str) -> None:
    found = look_up(LLM(name, "full", dtype=dtype, kv_memory="64MiB").engine.shared.runner)
    assert found is not None and found.path.parent == shipped_folder()
    assert found.path.name.endswith(f"-{name}.json")


def test_a_short_measurement_ranks_heads_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(name, "full", dtype="float32", kv_memory="64MiB")
    found = look_up(llm.engine.shared.runner)
    assert found is not None
    monkeypatch.setattr(passages, "LENGTH", 300)
    short = profile_model(llm.engine.shared, progress=False)
    places = found.profile.ranked()
    mine, other = (
        [each.share[layer][head] for layer, head in places] for each in (found.profile, short)
    )
    assert short.agreement > 0.9 and rank_correlation(mine, other) > 0.9
    most = max(1, len(places) // 10)
    assert set(short.ranked()[:most]) <= set(places[: 2 * most])
