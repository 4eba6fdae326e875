"""One model and the same prompts on one engine after another.

``python -m pyramidinfer.lab.bench.peers``, or ``make bench-peers``.

Every engine runs in its own process, and peers in their own environments (``make peers``).  An
engine that is not installed or fails gets a row that says so.  Rows record their run: ratios are
computed only within one run, even if ``--keep-rows`` leaves rows of an earlier run in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from pyramidinfer.lab.bench.engines import (
    ENGINES,
    Engine,
    Workload,
    chosen_engines,
    parse_workloads,
)
from pyramidinfer.lab.bench.peers_table import peers_table
from pyramidinfer.lab.bench.plots import draw_peers
from pyramidinfer.lab.bench.timing import spread
from pyramidinfer.lab.record import commit, write_result
from pyramidinfer.lab.shapes import SHAPES, make_model, save_model, shape_config

__all__ = ["Comparison", "ask_driver", "main", "run_peers"]

Row = dict[str, Any]
LIMIT = 1800  # time limit of an engine for one workload, seconds
WIDTH = 150  # of the table
FIRST_WORD = 4  # token ids below it are special


@dataclass(frozen=True)
class Comparison:
    """Plain values.  ``enough_seconds``: no further repeat after this much measured time."""

    workloads: dict[str, Workload]
    shape: str = "bench-200m"
    threads: int = 2
    repeats: int = 2
    enough_seconds: float = 40.0
    seed: int = 0
    layers: int | None = None  # fewer, for a trial run

    @property
    def configuration(self) -> dict[str, Any]:
        return {**asdict(self), "workloads": {n: asdict(w) for n, w in self.workloads.items()}}

    @property
    def changes(self) -> dict[str, Any]:
        return {} if self.layers is None else {"num_hidden_layers": self.layers}


def run_peers(
    plan: Comparison,
    engines: Iterable[Engine],
    out: Path,
    work: Path,
    *,
    environments: Path = Path(".peers"),
    drivers: Path = Path("benchmarks/peers"),
    keep: bool = False,
) -> dict[str, Any]:
    """Measure, write ``out`` after every engine, and return the result."""
    for name, value in (("threads", plan.threads), ("repeats", plan.repeats)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    folder = _model_folder(plan, work)
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    old = _old_rows(out, plan.configuration) if keep else []
    rows: list[Row] = []
    for name, workload in plan.workloads.items():
        prompts = _prompts(plan, workload)
        for engine in engines:
            print(f"{name}: {engine.name} …", file=sys.stderr, flush=True)
            job = {
                "model": str(folder),
                "work": str(folder / "converted"),
                "prompts": prompts,
                "max_new": workload.new,
                "threads": plan.threads,
                "dtype": engine.dtype,
                "repeats": plan.repeats,
                "enough_seconds": plan.enough_seconds,
                "options": engine.options_for(name, workload),
            }
            row = {
                "engine": engine.name,
                "workload": name,
                "run": run,
                "is_ours": engine.is_ours,
                "dtype": engine.dtype,
                "note": engine.note,
                "options": job["options"],
                "commit": commit(),
                "began": datetime.now(UTC).strftime("%H:%M:%SZ"),
                "load_before": psutil.getloadavg()[0],
            }
            row |= _run_engine(engine, job, plan.threads, environments, drivers, work)
            rows.append(row)
            _report(row)
            result = _result(rows, old, run)
            write_result(out, plan.configuration, result)
    return result


def _run_engine(
    engine: Engine, job: dict[str, Any], threads: int, environments: Path, drivers: Path, work: Path
) -> Row:
    """The result of one engine's process, or the reason why there is none."""
    Path(job["work"]).mkdir(parents=True, exist_ok=True)
    row = ask_driver(engine, job, threads, environments, drivers, work)
    if "said" not in row:
        return row
    try:
        return {"status": "ok", **_figures(row["said"], job)}
    except (ValueError, IndexError, KeyError) as error:
        return {"status": "failed", "reason": f"its driver's answer is no result: {error!r}"}


def ask_driver(
    engine: Engine, job: dict[str, Any], threads: int, environments: Path, drivers: Path, work: Path
) -> Row:
    """``status`` and the answer (``said``) of an engine's driver to a job, or the ``reason`` why
    there is none."""
    python = engine.python(environments)
    why = _why_missing(engine, python, environments)
    if why:
        return {"status": "not installed", "reason": why}
    path = work / "job.json"
    path.write_text(json.dumps(job))
    count = str(threads)
    setting = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [str(python), str(drivers / engine.driver), str(path)],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env={**os.environ, **setting},
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {LIMIT} seconds"}
    except OSError as error:
        return {"status": "failed", "reason": str(error)}
    if done.returncode:
        return {"status": "failed", "reason": _last_line(done.stderr) or f"code {done.returncode}"}
    try:
        return {"status": "ok", "said": json.loads(done.stdout.splitlines()[-1])}
    except (ValueError, IndexError) as error:
        return {"status": "failed", "reason": f"its driver's answer is no result: {error!r}"}


def _why_missing(engine: Engine, python: Path, environments: Path) -> str:
    if engine.environment is None:
        return ""
    failed = environments / engine.environment / "failed.txt"
    if failed.is_file():
        return " ".join(failed.read_text().split())[:400]
    return "" if python.exists() else f"{python.parent.parent} does not exist; run `make peers`"


def _figures(said: Row, job: dict[str, Any]) -> Row:
    """Rates of a run; a step's time is the time after the first tokens, divided evenly."""
    new, count = job["max_new"], len(job["prompts"])
    totals, firsts = said["total_seconds"], said["prefill_seconds"]
    made = [len(each) for each in said["tokens"]]
    if made != [new] * count or said["output_tokens"] != new * count:
        raise ValueError(f"it generated {made} tokens instead of {count} x {new}")
    total, first = float(np.median(totals)), float(np.median(firsts))
    prompt = sum(len(each) for each in job["prompts"])
    return {
        "seconds": spread(totals),
        "prefill_seconds": spread(firsts),
        "repeats": len(totals),
        "step_seconds": (total - first) / (new - 1),
        "output_tokens_per_second": new * count / total,
        "all_tokens_per_second": (prompt + new * count) / total,
        "prefill_in_own_run": said["prefill_in_own_run"],
        "load_seconds": said["load_seconds"],
        "peak_rss_bytes": said["peak_rss_bytes"],
        "versions": said["versions"],
        "notes": said["notes"],
        "tokens": said["tokens"],
    }


def _result(rows: list[Row], old: list[Row], run: str) -> dict[str, Any]:
    """All rows without their tokens; each with its agreement with transformers in this run."""
    measured = {(row["engine"], row["workload"]) for row in rows}
    judges = {
        row["workload"]: row["tokens"]
        for row in rows
        if row["engine"] == "transformers" and row["status"] == "ok"
    }
    found = []
    for row in rows:
        shown = {key: value for key, value in row.items() if key != "tokens"}
        judge = judges.get(row["workload"])
        if judge is not None and row["status"] == "ok":
            shown["agreement"] = _agreement(row["tokens"], judge)
        found.append(shown)
    kept = [row for row in old if (row["engine"], row["workload"]) not in measured]
    return {"run": run, "rows": [*found, *kept]}


def _agreement(mine: list[list[int]], judge: list[list[int]]) -> float:
    """Share of equal tokens at the same positions."""
    pairs = [a == b for x, y in zip(mine, judge, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def _old_rows(out: Path, configuration: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run with the same settings; ``ValueError`` for other settings."""
    if not out.is_file():
        return []
    entry = json.loads(out.read_text("utf-8"))
    now, then = dict(configuration), dict(entry["configuration"])
    now.pop("workloads"), then.pop("workloads")
    if now != then:
        raise ValueError(f"{out} was measured with other settings; omit --keep-rows")
    return [row for row in entry["result"]["rows"] if row["workload"] in configuration["workloads"]]


def _model_folder(plan: Comparison, work: Path) -> Path:
    """The model that all engines load, created once (bfloat16)."""
    if plan.shape not in SHAPES:
        shape_config(plan.shape)
    name = plan.shape if plan.layers is None else f"{plan.shape}-{plan.layers}"
    folder = work / f"{name}-seed{plan.seed}"
    if not (folder / "tokenizer.json").is_file():  # written last
        save_model(make_model(plan.shape, seed=plan.seed, **plan.changes), folder)
    return folder.resolve()


def _prompts(plan: Comparison, workload: Workload) -> list[list[int]]:
    draw = np.random.default_rng(plan.seed)
    vocabulary = shape_config(plan.shape).vocab_size
    size = (workload.requests, workload.prompt_len)
    found: list[list[int]] = draw.integers(FIRST_WORD, vocabulary, size).tolist()
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""


def _report(row: Row) -> None:
    said = row.get("reason", "")
    if row["status"] == "ok":
        said = f"{row['output_tokens_per_second']:.1f} output tokens/s"
    print(f"   {row['status']}: {said}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.bench.peers", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--only", default="", help="engines (or name beginnings), separated by semicolons")
    add("--workloads", default="A,B", help="A, B, or NAME=REQUESTSxPROMPT+NEW")
    add("--shape", default="bench-200m", help=f"one of {', '.join(SHAPES)}")
    add("--layers", type=int, default=None, help="fewer layers, for a trial run")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=2)
    add("--enough-seconds", type=float, default=40.0, help="no further repeat after so many")
    add("--json", type=Path, default=Path("benchmarks/results/peers.json"))
    add("--picture", type=Path, default=Path("docs/images/peers.png"))
    add("--work", type=Path, default=Path("out/peers"), help="models and converted models")
    add("--environments", type=Path, default=Path(".peers"))
    add(
        "--keep-rows",
        action="store_true",
        help="leave earlier runs' rows in the file",
    )
    add("--list", action="store_true", help="name the engines and stop")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(each.name for each in ENGINES))
        return
    try:
        plan = Comparison(
            parse_workloads(given.workloads),
            given.shape,
            given.threads,
            given.repeats,
            given.enough_seconds,
            layers=given.layers,
        )
        engines = chosen_engines(given.only.split(";"))
        start = time.monotonic()
        result = run_peers(
            plan,
            engines,
            given.json,
            given.work,
            keep=given.keep_rows,
            environments=given.environments,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the file has all rows measured so far", file=sys.stderr)
        sys.exit(130)
    Console(width=WIDTH).print(peers_table(plan.configuration, result))
    draw_peers(plan.configuration, result, given.picture)
    print(f"{given.json}\n{given.picture}\n{time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
