"""How a study runs: cells of a grid, rows written as they are measured, a file that can be resumed.

A study is a list of cells (plain dicts).  Each cell's rows are appended to ``F.json.partial`` at
once; an interrupted study that is started again with the same settings skips finished cells.  At
the end, all rows go into ``F.json`` with commit, machine and configuration.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyramidinfer.lab.record import command, commit, machine

__all__ = ["Row", "Store", "run_cells"]

Row = dict[str, Any]
Cell = dict[str, Any]


class Store:
    """Rows of one study on disk.

    ``ValueError`` if the partial file belongs to other settings.
    """

    def __init__(self, path: Path, study: str, configuration: dict[str, Any]) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.head = {"study": study, "configuration": json.loads(json.dumps(configuration))}
        self.rows: dict[str, list[Row]] = {}
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file for the result")
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists():
            self._reuse()

    def _reuse(self) -> None:
        """Read the partial file of an earlier run; a file without rows does not count."""
        lines = self.partial.read_text().splitlines()
        try:
            head = json.loads(lines[0]) if lines else None
        except json.JSONDecodeError:
            head = None
        if head is None or len(lines) < 2:
            self.partial.unlink()
            return
        if head != self.head:
            raise ValueError(
                f"{self.partial} was begun with other settings; go on with those, write to another "
                f"file, or delete it"
            )
        whole = 0
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run
                break
            self.rows[_key(entry["cell"])] = entry["rows"]
            whole += 1
        self.partial.write_text("".join(line + "\n" for line in lines[: whole + 1]))

    def has(self, cell: Cell) -> bool:
        return _key(cell) in self.rows

    def add(self, cell: Cell, rows: list[Row]) -> None:
        """Append a cell's rows to the partial file."""
        rows = json.loads(json.dumps(rows))
        self.rows[_key(cell)] = rows
        if not self.partial.exists():
            self.partial.write_text(json.dumps(self.head) + "\n")
        with self.partial.open("a") as file:
            file.write(json.dumps({"cell": cell, "rows": rows}) + "\n")

    def rows_of(self, cells: list[Cell]) -> list[Row]:
        """The rows of finished cells, in the order of the cells."""
        return [row for cell in cells for row in self.rows[_key(cell)]]

    def finish(self, cells: list[Cell]) -> list[Row]:
        """Write the result, in the order of the cells, and return its rows."""
        rows = self.rows_of(cells)
        meta = {"command": command(), "commit": commit(), "machine": machine(), **self.head}
        body = ",\n".join(json.dumps(row) for row in rows)
        self.path.write_text(f'{{"meta": {json.dumps(meta, indent=1)},\n"rows": [\n{body}\n]}}\n')
        self.partial.unlink(missing_ok=True)
        return rows


def run_cells(
    study: str,
    configuration: dict[str, Any],
    cells: list[Cell],
    work: Callable[[Cell], list[Row]],
    out: Path,
    workers: int = 1,
    then: Callable[[list[Row]], list[Cell]] | None = None,
) -> list[Row]:
    """Work on every unfinished cell with a progress bar; returns all rows.

    ``workers`` above 1: that many processes with one thread each; ``work`` must be picklable.
    ``then``: further cells, which depend on the rows of ``cells``.
    Ctrl-C leaves the finished cells on disk and raises ``KeyboardInterrupt``.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    store = Store(out, study, configuration)
    _work_on(store, study, cells, work, workers)
    if then is not None:
        more = then(store.rows_of(cells))
        _work_on(store, study, more, work, workers)
        cells = cells + more
    return store.finish(cells)


def _work_on(
    store: Store, study: str, cells: list[Cell], work: Callable[[Cell], list[Row]], workers: int
) -> None:
    left = [cell for cell in cells if not store.has(cell)]
    bar = Progress(
        TextColumn(study),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
    )
    done = len(cells) - len(left)
    try:
        with bar, _results(left, work, workers) as results:
            task = bar.add_task(study, total=len(cells), completed=done, now="")
            for cell, rows in results:
                store.add(cell, rows)
                done += 1
                bar.update(task, advance=1, now=_short(cell))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{done} of {len(cells)} done; the same command goes on from there"
        ) from None


@contextmanager
def _results(
    cells: list[Cell], work: Callable[[Cell], list[Row]], workers: int
) -> Iterator[Iterator[tuple[Cell, list[Row]]]]:
    if workers == 1:
        yield ((cell, work(cell)) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {executor.submit(work, cell): cell for cell in cells}
        yield ((futures[done], done.result()) for done in as_completed(futures))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in list((getattr(executor, "_processes", None) or {}).values()):
            process.terminate()


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _short(cell: Cell) -> str:
    return " ".join(str(value) for value in cell.values())
