"""``bench weights``: a row for each way of storing weights, beside the model's own dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramidinfer.cli.app import app
from pyramidinfer.lab.bench.table import weights_table
from pyramidinfer.lab.bench.weights import WeightsPlan, run_weights
from pyramidinfer.lab.samples import Subject


def test_rows_tell_bytes_loss_and_times(tmp_path: Path) -> None:
    plan = WeightsPlan(
        Subject(kv_memory="32MiB"),
        samples=2,
        context=60,
        continuation=40,
        batches=(2,),
        prompt_len=20,
        output_len=6,
        repeats=2,
    )
    out = tmp_path / "weights.json"
    result = run_weights(plan, out)
    assert json.loads(out.read_text())["result"] == result
    own, eight, four = result["rows"]
    assert [row["weights"] for row in result["rows"]] == ["auto", "int8", "int4"]
    assert own["bytes"] > eight["bytes"] > four["bytes"]
    assert (own["kl"], own["ratio"]) == (0, 1)
    assert 0 < eight["kl"] < four["kl"]
    for row in result["rows"]:
        assert row["load_seconds"] > 0
        (speed,) = row["speed"]
        assert speed["batch"] == 2 and speed["step_seconds"]["min"] > 0
    assert len(weights_table(result).rows) == 3


@pytest.mark.parametrize("option,value", [("--weights", "int3"), ("--samples", "0")])
def test_what_cannot_be_measured(option: str, value: str, tmp_path: Path) -> None:
    words = ["bench", "weights", option, value, "--json", str(tmp_path / "out.json")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code != 0 and option in ran.output and value in ran.output
