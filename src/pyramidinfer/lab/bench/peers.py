"""Run one model with the same prompts on one engine after another.

``python -m pyramidinfer.lab.bench.peers``, or ``make bench-peers``.

Every engine runs in its own process, and peers in their own environments (``make peers``).  An
engine that is not installed, fails or takes too long gets a row with the reason.  Every row is
stored in the work folder as soon as it is measured, so that ``--resume`` continues an interrupted
run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pyramidinfer.lab.bench.engines import (
    ENGINES,
    Engine,
    Workload,
    chosen_engines,
    parse_bits,
    parse_workloads,
)
from pyramidinfer.lab.bench.peers_drive import (
    LIMIT,
    agreement,
    ask_driver,
    figures,
    first_agreement,
)
from pyramidinfer.lab.bench.peers_models import cache_memory, is_real, make_prompts, shared_model
from pyramidinfer.lab.bench.peers_table import equal_table, peers_table
from pyramidinfer.lab.bench.plots import draw_peers
from pyramidinfer.lab.record import commit, write_result
from pyramidinfer.lab.shapes import SHAPES
from pyramidinfer.models.catalog import CATALOG

__all__ = ["Comparison", "Folders", "main", "prepare", "run_peers"]

Row = dict[str, Any]
WIDTH = 150  # of the table
#: File in the work folder with the rows of a run, their tokens included.
ROWS = "rows.json"
JUDGE = "transformers 16/16"
#: If a smaller share of a 16-bit engine's answers on real weights begins with transformers' token,
#: the engine runs another model, because a conversion went wrong.
SAME_FIRST = 0.5


@dataclass(frozen=True)
class Comparison:
    """Plain values.  ``enough_seconds``: no further repeat after this much measured time."""

    workloads: dict[str, Workload]
    shape: str = "smollm2"
    threads: int = 2
    repeats: int = 3
    enough_seconds: float = 10.0
    seed: int = 0
    layers: int | None = None  # fewer, for a trial run

    def check(self) -> None:
        for name, value in (("threads", self.threads), ("repeats", self.repeats)):
            if value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        is_real(self.shape)

    @property
    def configuration(self) -> dict[str, Any]:
        return {**asdict(self), "workloads": {n: asdict(w) for n, w in self.workloads.items()}}


@dataclass(frozen=True)
class Folders:
    """work: of the model, its conversions and the rows;  environments, drivers: of the peers."""

    work: Path
    environments: Path = Path(".peers")
    drivers: Path = Path("benchmarks/peers")

    def ask(self, plan: Comparison, engine: Engine, job: Row, limit: float) -> Row:
        Path(job["work"]).mkdir(parents=True, exist_ok=True)
        return ask_driver(
            engine, job, plan.threads, self.environments, self.drivers, self.work, limit
        )


def prepare(plan: Comparison, engines: Iterable[Engine], folders: Folders) -> Path:
    """Make the model and every engine's conversion of it; returns the model's folder.

    A conversion that fails is only reported: its engine's rows then give the reason.
    """
    plan.check()
    folder = shared_model(plan.shape, folders.work, plan.seed, plan.layers)
    one = Workload(1, 1, 2)
    done: list[Row] = []
    for engine in engines:
        what = {key: engine.options.get(key) for key in ("weights", "type")}
        what["driver"] = engine.driver
        if not engine.converts or what in done:
            continue
        done.append(what)
        job = {**_job(plan, engine, folder, "", one), "prompts": [], "convert_only": True}
        said = folders.ask(plan, engine, job, LIMIT)
        if said["status"] != "ok":
            print(f"   {engine.name} is not converted: {said['reason']}", file=sys.stderr)
    return folder


def run_peers(
    plan: Comparison,
    engines: Iterable[Engine],
    out: Path,
    folders: Folders,
    *,
    limit: float = LIMIT,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure, write ``out`` after every engine, and return the result.

    limit : seconds for an engine on a workload, loading included;  resume : continue the run whose
        rows are in the work folder.
    """
    if limit <= 0:
        raise ValueError(f"--limit {limit:g} must be over 0 seconds")
    engines = list(engines)
    folder = prepare(plan, engines, folders)
    run, todo = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), dict(plan.workloads)
    rows: dict[tuple[str, str], Row] = {}
    if resume and (folders.work / ROWS).is_file():
        plan, run, rows = _interrupted(folders.work / ROWS, plan)
    for name, workload in todo.items():
        prompts = make_prompts(plan.shape, folder, workload, plan.seed)
        for engine in engines:
            if not engine.runs_on(name) or _is_done(rows.get((engine.name, name))):
                continue
            print(f"{name}: {engine.name} …", file=sys.stderr, flush=True)
            job = {**_job(plan, engine, folder, name, workload), "prompts": prompts}
            row = _row(engine, name, run, job)
            row |= _measured(folders.ask(plan, engine, job, limit), job)
            rows[engine.name, name] = row
            _report(row)
            _store(folders.work / ROWS, plan, run, rows)
            write_result(out, plan.configuration, _result(plan, rows, run))
    result = _result(plan, rows, run)
    write_result(out, plan.configuration, result)
    return result


def _job(
    plan: Comparison, engine: Engine, folder: Path, name: str, workload: Workload
) -> dict[str, Any]:
    return {
        "model": str(folder),
        "work": str(folder / "converted"),
        "max_new": workload.new,
        "threads": plan.threads,
        "dtype": engine.dtype,
        "repeats": plan.repeats,
        "enough_seconds": plan.enough_seconds,
        "options": engine.options_for(name, workload, cache_memory(folder, workload)),
    }


def _row(engine: Engine, workload: str, run: str, job: dict[str, Any]) -> Row:
    return {
        "engine": engine.name,
        "workload": workload,
        "run": run,
        "is_ours": engine.is_ours,
        "weights": engine.weights,
        "cache": engine.cache,
        "whole": engine.whole,
        "dtype": engine.dtype,
        "note": engine.note,
        "options": job["options"],
        "commit": commit(),
        "began": datetime.now(UTC).strftime("%H:%M:%SZ"),
        "load_before": psutil.getloadavg()[0],
    }


def _measured(row: Row, job: dict[str, Any]) -> Row:
    """A driver's answer as the row's figures."""
    if "said" not in row:
        return row
    try:
        return {"status": "ok", **figures(row["said"], job)}
    except (ValueError, IndexError, KeyError) as error:
        return {"status": "failed", "reason": f"its driver's answer is no result: {error!r}"}


def _result(plan: Comparison, rows: dict[tuple[str, str], Row], run: str) -> dict[str, Any]:
    """All rows without their tokens, in the engines' order; each with its agreement with
    transformers."""
    order = {engine.name: at for at, engine in enumerate(ENGINES)}
    loads = list(plan.workloads)

    def place(row: Row) -> tuple[int, int]:
        return loads.index(row["workload"]), order.get(row["engine"], len(order))

    found = []
    for row in sorted(rows.values(), key=place):
        shown = {key: value for key, value in row.items() if key != "tokens"}
        judge = rows.get((JUDGE, row["workload"]), {}).get("tokens")
        if judge is not None and row["status"] == "ok":
            shown["agreement"] = agreement(row["tokens"], judge)
            first = first_agreement(row["tokens"], judge)
            exact = row["whole"] and row["weights"] == row["cache"] == 16
            if is_real(plan.shape) and exact and first < SAME_FIRST:
                reason = f"only {first:.0%} of its answers begin with transformers' token"
                shown |= {"status": "failed", "reason": f"{reason}: it runs another model"}
        found.append(shown)
    return {"run": run, "rows": found}


def _is_done(row: Row | None) -> bool:
    return row is not None and row["status"] == "ok" and row["commit"] == commit()


def _store(path: Path, plan: Comparison, run: str, rows: dict[tuple[str, str], Row]) -> None:
    entry = {"configuration": plan.configuration, "run": run, "rows": list(rows.values())}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(entry))
    part.replace(path)


def _interrupted(
    path: Path, plan: Comparison
) -> tuple[Comparison, str, dict[tuple[str, str], Row]]:
    """An interrupted run: its plan with the workloads of ``plan`` added, its time, and its rows;
    ``ValueError`` if it had other settings."""
    entry = json.loads(path.read_text("utf-8"))
    then, now = entry["configuration"], plan.configuration
    loads = {**then["workloads"], **now["workloads"]}
    same = all(now["workloads"].get(name, each) == each for name, each in then["workloads"].items())
    if not same or {**then, "workloads": loads} != {**now, "workloads": loads}:
        raise ValueError(f"{path} was measured with other settings; omit --resume to start anew")
    both = replace(plan, workloads={n: Workload(**each) for n, each in sorted(loads.items())})
    rows = {(row["engine"], row["workload"]): row for row in entry["rows"]}
    return both, entry["run"], rows


def _report(row: Row) -> None:
    said = row.get("reason", "")
    if row["status"] == "ok":
        said = f"{row['output_tokens_per_second']:.1f} output tokens/s"
    print(f"   {row['status']}: {said}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = _parser().parse_args(arguments)
    if given.list:
        print("\n".join(each.name for each in ENGINES))
        return
    start = time.monotonic()
    try:
        plan = Comparison(
            parse_workloads(given.workloads),
            given.shape,
            given.threads,
            given.repeats,
            given.enough_seconds,
            layers=given.layers,
        )
        engines = chosen_engines(given.only.split(";"), parse_bits(given.bits))
        folders = Folders(given.work / plan.shape, given.environments)
        if given.prepare:
            print(prepare(plan, engines, folders))
            return
        result = run_peers(
            plan, engines, given.json, folders, limit=given.limit, resume=given.resume
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; --resume continues after the rows measured so far", file=sys.stderr)
        sys.exit(130)
    configuration = json.loads(given.json.read_text("utf-8"))["configuration"]
    for table in (peers_table(configuration, result), equal_table(result)):
        Console(width=WIDTH).print(table)
    draw_peers(configuration, result, given.picture)
    print(f"{given.json}\n{given.picture}\n{time.monotonic() - start:.0f} seconds")


def _parser() -> argparse.ArgumentParser:
    usual = Comparison({})
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.bench.peers", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--only", default="", help="engines (or name beginnings), separated by semicolons")
    add("--bits", default="", help="only engines with these bits of weights/cache, such as 8/8,4/8")
    add("--workloads", default="A,B,C", help="A, B, C, or NAME=REQUESTSxPROMPT+NEW")
    add(
        "--shape",
        default=usual.shape,
        help=f"a fetched model ({', '.join(CATALOG)}) or random weights ({', '.join(SHAPES)})",
    )
    add("--layers", type=int, default=None, help="fewer layers, for a trial run")
    add("--threads", type=int, default=usual.threads)
    add("--repeats", type=int, default=usual.repeats)
    add(
        "--enough-seconds",
        type=float,
        default=usual.enough_seconds,
        help="no further repeat after this time",
    )
    add("--limit", type=float, default=LIMIT, help="seconds for an engine on a workload")
    add("--json", type=Path, default=Path("benchmarks/results/peers.json"))
    add("--picture", type=Path, default=Path("docs/images/peers.png"))
    add("--work", type=Path, default=Path("out/peers"), help="models and converted models")
    add("--environments", type=Path, default=Path(".peers"))
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--prepare", action="store_true", help="only make and convert the model")
    add("--list", action="store_true", help="only list the engines")
    return parser


if __name__ == "__main__":
    main()
