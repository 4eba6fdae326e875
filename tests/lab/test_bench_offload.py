"""``bench offload``: what it counts, and what the page shows of the committed result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyramidinfer.lab.bench.offload import WAYS, OffloadPlan, run_offload
from pyramidinfer.lab.bench.offload_page import PAGE, render_offload
from pyramidinfer.models.loading import shipped_model

ROOT = Path(__file__).parents[2]


def test_a_small_run(tmp_path: Path) -> None:
    plan = OffloadPlan(
        model=str(shipped_model()),
        policies=("full", "snapkv:keep=.3"),
        tokens=100,
        kv_memory="2MiB",
        host="1MiB",
        disk="2MiB",
        prompt=80,
        turn=8,
        repeats=1,
    )
    rows = run_offload(plan, tmp_path / "offload.json")["rows"]
    full, compressed = rows
    for place in WAYS[:3]:
        assert full["held"][place] >= 1
        assert compressed["held"][place] > full["held"][place]
    for row in rows:
        assert row["same_tokens"]
        assert set(row["first_token_seconds"]) == set(WAYS)
        assert set(row["bytes"]) == {"device", "host", "disk"}


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="--repeats 0 must be"):
        OffloadPlan(repeats=0)
    with pytest.raises(ValueError, match="--host 'lots' is not a size"):
        OffloadPlan(host="lots")


def test_the_page_shows_the_committed_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "offload.json").read_text())
    page = (ROOT / PAGE).read_text()
    assert render_offload(page, entry) == page
    full, *others = entry["result"]["rows"]
    assert full["policy"] == "full" and others
    for row in entry["result"]["rows"]:
        assert row["same_tokens"]
    for row in others:
        assert sum(row["held"].values()) > 2 * sum(full["held"].values())
