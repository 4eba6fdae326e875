"""``bench kv-dtypes``: rows, what is compared with what, the page made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramidinfer.cli.app import app
from pyramidinfer.lab.bench import kv_dtypes
from pyramidinfer.lab.bench.kv_dtypes import KvDtypesPlan, run_kv_dtypes
from pyramidinfer.lab.bench.table import kv_dtypes_table
from pyramidinfer.lab.numbers_bench import kv_dtype_kernels


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> KvDtypesPlan:
    shapes = (kv_dtypes.Shape(4, 2, 16, "a small one"), kv_dtypes.Shape(2, 2, 64, "another"))
    monkeypatch.setattr(kv_dtypes, "SHAPES", shapes)
    return KvDtypesPlan(
        ("int8", "int4"),
        batches=(1, 2),
        contexts=(40,),
        repeats=2,
        storage=100_000,
        dtype="float32",
    )


def test_every_shape_batch_and_context_has_a_row(small: KvDtypesPlan, tmp_path: Path) -> None:
    out = tmp_path / "bits.json"
    result = run_kv_dtypes(small, out)
    kept = json.loads(out.read_text())
    assert kept["result"] == result and kept["configuration"]["kv_dtypes"] == ["int8", "int4"]
    heads = [(row["heads"], row["size"], row["batch"]) for row in result["rows"]]
    assert heads == [(4, 16, 1), (4, 16, 2), (2, 64, 1), (2, 64, 2)]
    for row in result["rows"]:
        assert set(row["seconds"]) == {"auto", "int8", "int4", "read"}
        assert set(row["speedup"]) == {"int8", "int4"}
        # As many layers as the storage has room for, every page of them read.
        page = 2 * row["size"] * 4 * small.page_size
        needed = row["batch"] * row["kv_heads"] * 3
        assert row["layers"] == -(-small.storage // (page * needed)) > 1
        middle = row["seconds"]["auto"]["median"] / row["seconds"]["int8"]["max"]
        assert row["speedup"]["int8"]["max"] >= middle
    assert len(kv_dtypes_table(result).rows) == 4
    page_of = kv_dtype_kernels(kept)
    assert page_of.count("| a small one |") == 2 and "| int8 | int4 |" in page_of


@pytest.mark.parametrize("name", ["auto", "int9"])
def test_wrong_names_are_refused(name: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["bench", "kv-dtypes", "--kv-dtypes", name, "--json", str(tmp_path / "out.json")]
    )
    assert ran.exit_code != 0 and name in ran.output and "int8" in ran.output
