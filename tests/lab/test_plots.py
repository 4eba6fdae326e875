"""Pictures and records come out readable; recall is counted word for word."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pyramidinfer import LLM, PyramidInfer
from pyramidinfer.lab import real_plots
from pyramidinfer.lab.model_report import filler_perplexity, one_drop, recall
from pyramidinfer.lab.numbers import render
from pyramidinfer.lab.pictures import counted
from pyramidinfer.lab.plots import draw_curve, draw_pyramid, draw_training
from pyramidinfer.lab.quality_plots import draw_quality
from pyramidinfer.lab.recall import ANSWER, is_right, make_questions
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.ruler.pictures import draw_scores
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Full
from pyramidinfer.types import Layers


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_pictures(tmp_path: Path) -> None:
    question = make_questions(1, 1, 200)[0]
    trace = LLM(shipped_model(), policy=PyramidInfer(keep=0.5)).trace(question.prompt)
    words = ["<bos>", *question.prompt.split()]
    assert is_png(
        draw_pyramid(
            [("a", trace), ("b", trace)], words, question.needle, tmp_path / "sub" / "pyramid.png"
        )
    )
    assert is_png(
        draw_curve(
            [(1, 0.2), (2, 0.9)],
            tmp_path / "c.png",
            title="t",
            xlabel="x",
            ylabel="y",
            level=0.9,
            level_name="full",
        )
    )
    log = (Path(shipped_model()) / "training_log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if "stage" in row]
    assert is_png(draw_training(rows, tmp_path / "t.png"))


def figure_rows() -> list[dict[str, Any]]:
    names = ["full", *(f"pyramid:keep=.{n},start_layer=14,propagate_ratio=.2" for n in range(1, 9))]
    return [
        {
            "policy": name,
            "keep": 0.3,
            "kv_share": 0.1 * at + 0.1,
            "score": 0.1 * at,
            "score_ci": [0.0, 1.0],
            "perplexity": 2.0,
            "repetition": 0.1,
            "ratio": 1.5,
            "ratio_ci": [1.0, 2.0],
            "context": context,
            "samples": 8,
            "passages": 4,
            "recall": 0.5,
            "recall_ci": [0, 1],
            "kl": 0.1,
            "kl_ci": [0.01, 1],
            "agreement": 0.5,
            "kv_share_end": 0.5,
            "agreement_ci": [0, 1],
            "length": 2000,
            "protocol": protocol,
            "tasks": ["vt"],
        }
        for at, name in enumerate(names)
        for context in (1000, 3000)
        for protocol in ("inside", "after")
    ]


@pytest.mark.parametrize(
    "draw",
    [real_plots.draw_turns, real_plots.draw_text, real_plots.draw_long, draw_quality, draw_scores],
)
def test_pictures_say_n_and_their_labels_have_room(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Legends are inside the picture whatever the policies are called, and titles apart."""
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw(figure_rows(), tmp_path / "p.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    below = figure.legends[0].get_window_extent()
    assert below.x0 >= 0 and below.x1 <= figure.bbox.x1 and below.y0 >= 0
    titles = [axis._left_title for axis in figure.axes]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert any(re.search(r"n = [48]\b", title.get_text()) for title in titles)


def test_counts_that_differ() -> None:
    assert counted([{"samples": 20}, {"samples": 5}, {"samples": 10}]) == "n = 5 to 20"
    assert counted([{"samples": 5}, {"samples": 5}]) == "n = 5" and counted([{}]) == ""


def test_record_says_where_it_comes_from(tmp_path: Path) -> None:
    entry = json.loads(write_result(tmp_path / "r.json", {"a": 1}, {"b": 2}).read_text())
    assert entry["configuration"] == {"a": 1}
    assert entry["result"] == {"b": 2}
    assert entry["commit"]
    assert entry["machine"]["cores"] >= 1
    assert render({}).startswith("# Numbers")


def test_an_answer_is_right_word_for_word() -> None:
    question = make_questions(1, 1, 200)[0]
    llm = LLM(shipped_model(), policy="full")
    out = llm.generate(question.prompt, ANSWER)[0]
    right = replace(out, text=question.answer)
    assert is_right(right, question)
    assert not is_right(replace(out, text=question.answer.replace(" is ", " was ")), question)
    assert not is_right(replace(out, text=""), question)


def test_one_drop_keeps_a_tenth_from_there_on() -> None:
    layers = Layers((True,) * 12)
    reach = one_drop(4, 12, 0.1).forecast(1000, 1, layers).reach
    assert reach[:5] == [1000] * 5
    assert reach[5:] == [pytest.approx(100, abs=3)] * 7


def test_the_shipped_model_recalls_and_pruning_late_is_free() -> None:
    """A small sample of the committed measurement, which must still hold."""
    full = recall(shipped_model(), Full(), 600, 30)
    assert full["recall"] >= 0.9
    late = recall(shipped_model(), one_drop(5, 12, 0.1), 600, 30)
    assert late["recall"] >= full["recall"] - 0.1
    early = recall(shipped_model(), one_drop(0, 12, 0.1), 600, 30)
    assert early["recall"] < 0.5
    assert filler_perplexity(shipped_model(), 2, 300)["perplexity"] < 8
