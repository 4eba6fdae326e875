"""How a study runs: rows as they come, a file that can be gone on with, workers."""

from __future__ import annotations

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.study import Row, Store, run_cells

CELLS: list[dict[str, Any]] = [
    {"policy": name, "keep": keep} for name in ("full", "snapkv", "tova") for keep in (1.0, 0.5)
]
SETTINGS = {"samples": 3, "keeps": (1.0, 0.5), "text": None}


def square(cell: dict[str, Any]) -> list[Row]:
    """A cell's two rows."""
    return [{**cell, "part": part, "value": len(cell["policy"]) * cell["keep"]} for part in (0, 1)]


def square_in_a_process(cell: dict[str, Any]) -> list[Row]:
    return [{**row, "process": os.getpid()} for row in square(cell)]


def counted(done: list[dict[str, Any]], stop_at: int | None, cell: dict[str, Any]) -> list[Row]:
    """``square``, with a note of what was asked for; Ctrl-C at one of them."""
    if len(done) == stop_at:
        raise KeyboardInterrupt
    done.append(cell)
    return square(cell)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def test_rows_come_in_the_order_of_the_cells(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "folder" / "study.json"
    rows = run_cells("squares", SETTINGS, CELLS, square, out)
    assert rows == [row for cell in CELLS for row in square(cell)]
    written = json.loads(out.read_text())
    assert written["rows"] == rows
    meta = written["meta"]
    assert meta["study"] == "squares"
    assert meta["configuration"] == {**SETTINGS, "keeps": [1.0, 0.5]}
    assert meta["commit"] and meta["machine"]["python"]
    assert len(out.read_text().splitlines()) > len(rows), "a row is a line of its own"
    assert not partial_of(out).exists()


def test_a_finished_study_begins_anew(tmp_path: Path) -> None:
    out, done = tmp_path / "study.json", []
    for _ in range(2):
        run_cells("squares", SETTINGS, CELLS, partial(counted, done, None), out)
    assert len(done) == 2 * len(CELLS)


@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_an_interrupted_study_goes_on(tmp_path: Path, stop_at: int) -> None:
    out = tmp_path / "study.json"
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_cells("squares", SETTINGS, CELLS, partial(counted, [], stop_at), out)
    assert str(stopped.value) == f"{stop_at} of 6 done; the same command goes on from there"
    assert not out.exists()
    rest: list[dict[str, Any]] = []
    rows = run_cells("squares", SETTINGS, CELLS, partial(counted, rest, None), out)
    assert rest == CELLS[stop_at:]
    assert rows == [row for cell in CELLS for row in square(cell)]


def test_a_second_interruption_counts_what_was_done_before(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    for stop_at, done in ((2, 2), (3, 5)):
        with pytest.raises(KeyboardInterrupt, match=f"^{done} of 6 done"):
            run_cells("squares", SETTINGS, CELLS, partial(counted, [], stop_at), out)


@pytest.mark.parametrize("left", [1, 30, -1])
def test_a_half_written_line_is_measured_again(tmp_path: Path, left: int) -> None:
    """A run that was killed while it wrote; ``left`` characters of its last line are there."""
    out = tmp_path / "study.json"
    with pytest.raises(KeyboardInterrupt):
        run_cells("squares", SETTINGS, CELLS, partial(counted, [], 3), out)
    lines = partial_of(out).read_text().splitlines()
    assert len(lines) == 4
    partial_of(out).write_text("\n".join([*lines[:3], lines[3][:left]]))
    rest: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):  # what is added joins no half line
        run_cells("squares", SETTINGS, CELLS, partial(counted, rest, 2), out)
    assert rest == CELLS[2:4]
    assert len(partial_of(out).read_text().splitlines()) == 5
    rows = run_cells("squares", SETTINGS, CELLS, partial(counted, rest, None), out)
    assert rest == CELLS[2:]
    assert rows == [row for cell in CELLS for row in square(cell)]


@pytest.mark.parametrize(
    ("study", "settings"),
    [("cubes", SETTINGS), ("squares", {**SETTINGS, "samples": 4}), ("squares", {})],
)
def test_other_settings_are_refused(tmp_path: Path, study: str, settings: dict[str, Any]) -> None:
    out = tmp_path / "study.json"
    with pytest.raises(KeyboardInterrupt):
        run_cells("squares", SETTINGS, CELLS, partial(counted, [], 2), out)
    before = partial_of(out).read_text()
    message = "study.json.partial was begun with other settings; go on with those, write to another"
    with pytest.raises(ValueError, match=message) as found:
        run_cells(study, settings, CELLS, square, out)
    assert "\n" not in str(found.value)
    assert partial_of(out).read_text() == before, "nothing is lost"
    assert run_cells("squares", SETTINGS, CELLS, square, out)


def test_an_error_leaves_what_is_done(tmp_path: Path) -> None:
    def fails(cell: dict[str, Any]) -> list[Row]:
        if cell == CELLS[2]:
            raise ValueError("this cell cannot be measured")
        return square(cell)

    out = tmp_path / "study.json"
    with pytest.raises(ValueError, match="cannot be measured"):
        run_cells("squares", SETTINGS, CELLS, fails, out)
    rest: list[dict[str, Any]] = []
    run_cells("squares", SETTINGS, CELLS, partial(counted, rest, None), out)
    assert rest == CELLS[2:]


def test_a_store_tells_cells_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.json", "squares", SETTINGS)
    store.add({"a": 1, "b": 2.0}, [{"found": (1, 2)}])
    assert store.has({"b": 2.0, "a": 1})
    assert not store.has({"a": 1, "b": 2.5})
    again = Store(tmp_path / "study.json", "squares", SETTINGS)
    assert again.rows == store.rows
    assert again.finish([{"a": 1, "b": 2.0}]) == [{"found": [1, 2]}]


def test_workers_give_the_same_rows(tmp_path: Path) -> None:
    """Two processes, whose rows come back in any order."""
    alone = run_cells("squares", SETTINGS, CELLS, square, tmp_path / "one.json")
    shared = run_cells("squares", SETTINGS, CELLS, square_in_a_process, tmp_path / "two.json", 2)
    processes = {row.pop("process") for row in shared}
    assert os.getpid() not in processes
    assert shared == alone
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert first["rows"] == [
        {k: v for k, v in row.items() if k != "process"} for row in second["rows"]
    ]


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=f"--workers {workers} must be at least 1"):
        run_cells("squares", SETTINGS, CELLS, square, tmp_path / "study.json", workers)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            ["/bin/pyramidinfer", "study", "icr", "--text", "a b"],
            "pyramidinfer study icr --text 'a b'",
        ),
        (["x/__main__.py", "bench", "memory"], "pyramidinfer bench memory"),
        (
            ["pyramidinfer", "bench", "serve", "--api-key", "k"],
            "pyramidinfer bench serve --api-key …",
        ),
        (["pyramidinfer", "bench", "serve", "--api-key=k"], "pyramidinfer bench serve --api-key=…"),
    ],
)
def test_a_result_records_its_command(
    words: list[str], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    run_cells("s", {}, [{"n": 1}], lambda cell: [cell], tmp_path / "s.json")
    assert shlex.split(json.loads((tmp_path / "s.json").read_text())["meta"]["command"]) == (
        shlex.split(shown)
    )
    written = write_result(tmp_path / "r.json", {}, {})
    assert json.loads(written.read_text())["command"]
