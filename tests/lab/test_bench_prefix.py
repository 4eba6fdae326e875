"""``bench prefix``: what it measures, and how a page shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyramidinfer.lab.bench.prefix import WAYS, run_prefix
from pyramidinfer.lab.bench.prefix_page import BEGIN, END, PAGE, render_prefix
from pyramidinfer.lab.bench.scaling_plans import PrefixPlan
from pyramidinfer.models.loading import shipped_model

ROOT = Path(__file__).parents[2]


def test_a_small_run(tmp_path: Path) -> None:
    plan = PrefixPlan(
        model=str(shipped_model()),
        policies=("full", "snapkv:keep=.3"),
        system=64,
        question=8,
        output=4,
        chats=2,
        kv_memory="8MiB",
        repeats=1,
    )
    rows = run_prefix(plan, tmp_path / "prefix.json")["rows"]
    for row in rows:
        assert row["same_tokens"]
        assert set(row["first_token_seconds"]) == set(row["tokens_per_second"]) == set(WAYS)
    page = f"before\n{BEGIN}\n{END}\nbehind"
    entry = json.loads((tmp_path / "prefix.json").read_text())
    shown = render_prefix(page, entry)
    assert shown.startswith(f"before\n{BEGIN}\nCommit ") and shown.endswith(f"{END}\nbehind")
    assert shown.count("| snapkv:keep=.3 | shared |") == 1
    assert render_prefix(shown, entry) == shown
    assert BEGIN in (ROOT / PAGE).read_text()
    full, _ = rows
    assert full["peak_bytes"]["shared"] < full["peak_bytes"]["anew"]


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="--chats 0 must be"):
        PrefixPlan(chats=0)
    with pytest.raises(ValueError, match="--kv-memory 'lots' is not a size"):
        PrefixPlan(kv_memory="lots")


def test_the_page_shows_the_committed_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "prefix.json").read_text())
    page = (ROOT / PAGE).read_text()
    assert render_prefix(page, entry) == page
