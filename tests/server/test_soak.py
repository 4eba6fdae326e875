"""The soak, short: many clients, some hanging up, and nothing wrong afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from pyramidinfer.lab.bench.serve_plan import SoakPlan
from pyramidinfer.lab.numbers_serving import SECTIONS
from pyramidinfer.lab.soak import run_soak


def test_a_short_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    plan = SoakPlan(clients=20, seconds=6.0, max_waiting=4, threads=1, judge_memory=False)
    result = run_soak(plan, out)
    assert result["breaches"] == []
    assert result["exit_code"] == 0
    assert set(result["statuses"]) <= {"0", "200", "429"}  # 0: left before an answer
    assert result["outcomes"]["completed"] > 0 and result["outcomes"]["left"] > 0
    assert result["after"]["pyramidinfer:pool_checks_total"] > 0
    assert result["memory"] is None  # too short to tell
    page = SECTIONS["soak"](json.loads(out.read_text()))
    assert "All checks passed." in page and "20 clients at once" in page
