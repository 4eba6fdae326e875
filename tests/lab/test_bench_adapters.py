"""``bench adapters``: a row for each number of adapters, beside the model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramidinfer.cli.app import app
from pyramidinfer.lab.bench.adapters import run_adapters
from pyramidinfer.lab.bench.plans import AdaptersPlan, Setting
from pyramidinfer.lab.bench.table import adapters_table


def test_rows_tell_what_adapters_cost(tmp_path: Path) -> None:
    setting = Setting(shape="toy-gqa", policies=("full",), repeats=2)
    plan = AdaptersPlan(setting, (1, 3), rank=4, batch=3, prompt_len=8, output_len=4)
    out = tmp_path / "adapters.json"
    result = run_adapters(plan, out)
    assert json.loads(out.read_text())["result"] == result
    assert [row["adapters"] for row in result["rows"]] == [0, 1, 3]
    assert result["rows"][0]["step_ratio"]["median"] == 1
    assert all(row["step_seconds"]["min"] > 0 for row in result["rows"])
    assert len(adapters_table(result).rows) == 3


@pytest.mark.parametrize("option,value", [("--rank", "0"), ("--adapters", "0")])
def test_what_cannot_be_measured(option: str, value: str, tmp_path: Path) -> None:
    words = ["bench", "adapters", option, value, "--json", str(tmp_path / "out.json")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code != 0 and option in ran.output and value in ran.output
