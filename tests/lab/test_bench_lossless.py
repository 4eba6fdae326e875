"""``bench lossless``: the same answers in every row, rates as asked for, the page made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramidinfer.cli.app import app
from pyramidinfer.lab.bench.lossless import LosslessPlan, _rate_of, expected_speed, run_lossless
from pyramidinfer.lab.bench.plots import draw_lossless
from pyramidinfer.lab.bench.table import lossless_table
from pyramidinfer.lab.numbers_bench import lossless

PLAN = LosslessPlan(
    model=None,
    shape="toy-gqa",
    accept=0.7,
    drafts=("streaming_llm:keep=.1",),
    draft_tokens=("0", "3", "auto"),
    batches=(1, 2),
    contexts=(70, 400),
    output_len=80,
    repeats=1,
)


def test_every_context_batch_and_number_of_guesses_has_a_row(tmp_path: Path) -> None:
    out = tmp_path / "lossless.json"
    result = run_lossless(PLAN, out)  # which asserts that answers are the full cache's
    kept = json.loads(out.read_text())
    assert kept["result"] == result
    places = [(row["context"], row["batch"], row["draft_tokens"]) for row in result["rows"]]
    assert places == [(c, b, d) for c in (70, 400) for b in (1, 2) for d in ("0", "3", "auto")]
    for row in result["rows"]:
        assert row["simulated"]
        if row["draft_tokens"] == "0":
            assert row["drafted"] == 0 and row["rate"] == 0 and row["expected"] == 1
        if row["draft_tokens"] == "3":
            assert row["drafted"] > 60 and row["rate"] == pytest.approx(0.7, abs=0.2)
        if row["drafted"] and row["context"] == 400:
            assert 0.1 < row["read_share"] < 0.4
    caches = [row["cache_over_weights"] for row in result["rows"]]
    assert caches[3] == pytest.approx(2 * caches[0]) and caches[6] == pytest.approx(5 * caches[0])
    assert len(lossless_table(result).rows) == 12
    page = lossless(kept)
    assert "simulated" in page and page.count("| 400 |") == 6 and kept["command"] in page
    picture = draw_lossless(result, tmp_path / "lossless.png")
    assert picture.stat().st_size > 1000


def test_the_formula() -> None:
    """About 1.0 at K/W = .3, 1.3 at 1, 1.7 at 2, 2.8 at 9 (best count)."""
    for cache, speed in ((0.3, 1.0), (1, 1.3), (2, 1.7), (9, 2.8)):
        best = max(expected_speed(0.9, count, 0.05, cache) for count in range(9))
        assert best == pytest.approx(speed, rel=0.12)
    for rate, count in ((0.9, 3), (0.3, 5), (0.5, 1)):
        accepted = sum(rate**number for number in range(1, count + 1))
        assert _rate_of(accepted, count) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize(
    "options,words",
    [
        (["--shape", "toy-gqa"], "--accept None: set it with --shape"),
        (["--accept", ".5"], "--accept 0.5"),
        (["--shape", "toy-gqa", "--accept", "2"], "between 0 and 1"),
        (
            ["--shape", "toy-gqa", "--accept", ".5", "--check-prompts", "9"],
            "--check-prompts 9 needs --model",
        ),
        (["--draft-tokens", "9"], "--draft-tokens 9: write auto or 0 to 8"),
        (["--drafts", "h2o:keep=.1"], "cannot choose what drafts read"),
        (["--prompt-len", "200000"], "more than 131072 tokens in total"),
    ],
)
def test_what_cannot_be_run_is_refused(options: list[str], words: str, tmp_path: Path) -> None:
    target = ["--json", str(tmp_path / "out.json")]
    ran = CliRunner().invoke(app, ["bench", "lossless", *options, *target])
    assert ran.exit_code != 0 and words in " ".join(ran.output.split())
