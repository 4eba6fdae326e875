"""The curves of ``docs/choosing.md``: which rows become which points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.lab.choosing import Picture, draw_choosing, points
from tests.lab.test_numbers_default import grid, row

LATER = Picture("later", ("one", "two"), "after")


def asked(policy: str, task: str, scores: list[float], **changes: Any) -> dict[str, Any]:
    return row(policy, task, "after", scores, **changes)


def test_tasks_of_all_results_count_alike_and_tasks_beyond_full_do_not() -> None:
    one = [asked("full", "a", [1, 1]), asked("duo:keep=.5,spare=0", "a", [1, 0])]
    one += [asked("full", "hopeless", [0, 0]), asked("duo:keep=.5", "hopeless", [1, 1])]
    two = [asked("full", "b", [1, 0, 0, 1]), asked("duo:keep=.5", "b", [1, 1, 1, 1])]
    (point,) = points({"one": grid(one), "two": grid(two)}, LATER)
    assert (point.name, point.bytes, point.answers) == ("duo", 0.5, 6)
    assert point.score == pytest.approx((0.5 + 1.0) / (1.0 + 0.5))


def test_variants_full_caches_and_the_other_protocol_are_left_out() -> None:
    rows = [
        asked("full", "a", [1]),
        asked("full", "a", [1], kv_dtype="int8"),
        asked("pyramid:keep=.5,kernel=7", "a", [1]),
        asked("pyramid:keep=.5", "a", [1], kv_dtype="int8"),
        row("pyramid:keep=.5", "a", "inside", [1]),
    ]
    assert [each.name for each in points({"one": grid(rows)}, LATER)] == ["pyramid int8"]


def test_a_result_with_more_options_has_lines_of_its_own(tmp_path: Path) -> None:
    def chats(score: float) -> dict[str, Any]:
        shown = {"keep": 0.5, "kv_share": 0.5, "samples": 3, "score": score}
        full = {**shown, "policy": "full", "keep": 1.0, "kv_share": 1.0, "score": 0.8}
        return {"rows": [full, {**shown, "policy": "pyramid:keep=.5"}]}

    results = {"heads_turns": chats(0.4), "heads_turns_idle": chats(0.8)}
    (path,) = draw_choosing(results, tmp_path)
    assert path == tmp_path / "choosing_chats.png"
    assert path.stat().st_size > 1000
    picture = Picture(
        "chats", ("heads_turns", "heads_turns_idle"), options=(("heads_turns_idle", ":idle"),)
    )
    found = {each.name: each.score for each in points(results, picture)}
    assert found == {"pyramid": 0.5, "pyramid:idle": 1.0}
