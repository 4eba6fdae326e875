"""What is told of a process's memory and of what is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pyramidinfer
from pyramidinfer.lab.bench.footprint import installed_bytes, memory_of
from pyramidinfer.lab.bench.plans import FootprintPlan
from pyramidinfer.lab.bench.table import footprint_table


def test_memory_of_this_process() -> None:
    found = memory_of(os.getpid())
    assert 0 < found["RssAnon"] <= found["VmRSS"] <= found["VmHWM"]


def test_packages_are_those_of_the_extras() -> None:
    plain, served = installed_bytes(()), installed_bytes(FootprintPlan().extras)
    assert {"torch", "transformers", "pyramidinfer"} <= plain.keys()
    assert {"fastapi", "matplotlib"} <= served.keys() - plain.keys()
    assert "pytest" not in served  # of the extra dev
    assert next(iter(served)) == "torch"
    assert served["pyramidinfer"] > Path(pyramidinfer.__file__).stat().st_size


def test_the_table_shows_both() -> None:
    row = {
        "weights": "auto",
        "weight_bytes": 2**22,
        "kv_memory": 2**25,
        "beside": 2**29,
        "resident_full": 2**30,
        "peak": 2**30,
        "pages_used": 0.95,
    }
    result = {"rows": [row], "installed": {"torch": 757_000_000}, "installed_bytes": 757_000_000}
    table = footprint_table(result)
    shown = [next(iter(each.cells)) for each in table.columns]
    assert shown == ["auto", "4", "32", "512", "1024", "1024", "95%"]
    assert table.caption == "installed: 757 MB (torch 757)"
