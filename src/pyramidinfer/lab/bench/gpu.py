"""``make bench-gpu``: the paper's workload and longer ones on a GPU, in under ten minutes.

Random weights in the shapes of LLaMA-2-13B and Llama-3-8B.  Engines run one after
another; transformers' ``generate`` comes first, because our engines consume its weights.  The file
is written after every run, so that no measurement is lost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pyramidinfer.attention import select_backend
from pyramidinfer.attention.base import Pages
from pyramidinfer.config import parse_device, parse_dtype
from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.generate import bytes_per_request, time_generate
from pyramidinfer.lab.bench.gpu_plan import Attention, GPUPlan, Run, bars, real_plan, toy_plan
from pyramidinfer.lab.bench.kernels import decode_work
from pyramidinfer.lab.bench.kv_dtypes import coded
from pyramidinfer.lab.bench.machine import Roof, measure_roof
from pyramidinfer.lab.bench.roofline import roofline
from pyramidinfer.lab.bench.setting import Rig, Setting, run_pass
from pyramidinfer.lab.bench.table import percent, ranged
from pyramidinfer.lab.bench.throughput import figures, forget
from pyramidinfer.lab.bench.timing import PeakMemory, side_by_side, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import quiet_transformers
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["Bench", "main", "run_bench"]

#: Share of a device's memory for weights, caches and everything else.
MEMORY_SHARE = 0.92
#: If the largest batch was too large: number of tries, and the factor of the batch for each try.
TRIES, STEP_DOWN = 4, 0.88
PAGE = 16


class Weights:
    """One shape's weights in memory at a time: a transformers model, or packed for our engines."""

    def __init__(self, plan: GPUPlan) -> None:
        self.plan = plan
        self.rig: Rig | None = None
        self.model: Any = None

    def of(self, shape: str) -> Rig:
        """The shape's sizes and prompts; releases other weights."""
        if self.rig is None or self.rig.setting.shape != shape:
            self.drop()
            plan = self.plan
            self.rig = Rig(
                Setting(
                    shape=shape,
                    keep=plan.keep,
                    dtype=plan.dtype,
                    device=plan.device,
                    backend=plan.backend,
                    seed=plan.seed,
                )
            )
        return self.rig

    def as_model(self, shape: str) -> Any:
        rig = self.of(shape)
        if self.model is None:
            vars(rig).pop("shared", None)
            forget(rig.device)
            self.model = rig.load()
        return self.model

    def as_packed(self, shape: str) -> ModelRunner:
        rig = self.of(shape)
        if self.model is not None:
            model, self.model = self.model, None
            vars(rig)["shared"] = rig.pack(model)
        return rig.shared

    def drop(self) -> None:
        self.rig = self.model = None
        forget(parse_device(self.plan.device))


class Bench:
    """All runs of one plan; each run is added to ``result``."""

    def __init__(self, plan: GPUPlan, out: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.plan, self.out, self.now = plan, out, now
        self.device = parse_device(plan.device)
        self.dtype = parse_dtype(plan.dtype, torch.bfloat16)
        self.weights = Weights(plan)
        self.began = now()
        self.roof: Roof | None = None
        self.result: dict[str, Any] = {
            "gpu": _gpu(self.device),
            "is_toy": self.device.type != "cuda",
            "roof": None,
            "rows": [],
            "attention": [],
            "not_run": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure as much as the time allows."""
        self.result["roof"] = self._try("roof", 0.0, self._roof)
        for each in self.plan.attention:
            head = each._asdict()
            row = self._try(f"decode attention {tuple(each)}", 0.0, partial(self._attend, each))
            if row is not None:
                self.result["attention"].append({**head, **row})
        for run in self.plan.runs:
            cell = run.cell
            head = {
                "cell": cell.name,
                "engine": run.engine,
                "shape": cell.shape,
                "batch": cell.batch,
                "prompt_len": cell.prompt_len,
                "output_len": cell.output_len,
            }
            row = self._try(f"{cell.name}: {run.engine}", run.guess, partial(self._measure, run))
            if row is not None:
                self.result["rows"].append({**head, **row})
            self._write()
        self.weights.drop()
        return self._write()

    @property
    def elapsed(self) -> float:
        return self.now() - self.began

    def _try(
        self, name: str, guess: float, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The result of ``work``, or the reason for its failure; None if no time is left for it."""
        if self.elapsed + guess > self.plan.budget_seconds:
            self.result["not_run"].append(name)
            return None
        print(f"{self.elapsed:6.1f} s  {name}", file=sys.stderr, flush=True)
        forget(self.device)  # the last engine's pool
        try:
            return work()
        except torch.OutOfMemoryError as error:
            failed = f"out of memory: {error}"
        except (RuntimeError, ValueError) as error:
            failed = f"{type(error).__name__}: {error}"
        return {"error": failed.splitlines()[0][:300]}

    def _write(self) -> dict[str, Any]:
        self.result["seconds"] = self.elapsed
        self.result["bars"] = bars(self.result)
        write_result(self.out, asdict(self.plan), self.result)
        return self.result

    # --- one run ------------------------------------------------------------------------------

    def _measure(self, run: Run) -> dict[str, Any]:
        if run.cell.batch is not None:
            return self._once(run, run.cell.batch, 1.0)
        share = 1.0
        for left in reversed(range(TRIES)):  # as many as fit, and fewer if that was too many
            try:
                return {**self._once(run, None, share), "is_largest": True, "share": share}
            except torch.OutOfMemoryError:
                if not left:
                    raise
            forget(self.device)
            share *= STEP_DOWN
        raise AssertionError("the last try returns or raises")

    def _once(self, run: Run, batch: int | None, share: float) -> dict[str, Any]:
        return (self._ours if run.is_ours else self._theirs)(run, batch, share)

    def _theirs(self, run: Run, batch: int | None, share: float) -> dict[str, Any]:
        cell = run.cell
        model, rig = self.weights.as_model(cell.shape), self.weights.of(cell.shape)
        if batch is None:
            one = bytes_per_request(
                model.config, self.dtype.itemsize, cell.prompt_len, cell.output_len
            )
            batch = max(1, min(self.plan.most, int(share * self._left(rig)) // one))
        memory = PeakMemory(self.device)
        prompts = rig.prompts(batch, cell.prompt_len)
        found = time_generate(model, run.engine, prompts, cell.output_len, 1)
        return {"batch": batch, **found, "peak_bytes": memory.bytes}

    def _ours(self, run: Run, batch: int | None, share: float) -> dict[str, Any]:
        cell = run.cell
        runner, rig = self.weights.as_packed(cell.shape), self.weights.of(cell.shape)
        memory = PeakMemory(self.device)
        sizes = cell.prompt_len, cell.output_len
        if batch is None:
            kv_memory = str(int(share * (self._left(rig) - self.plan.reserve)))
            rig.setting = replace(rig.setting, kv_memory=kv_memory)
            engine = rig.engine(run.engine, self.plan.most, *sizes)
            batch = min(self.plan.most, _decoding_fits(engine, *sizes))
        else:
            rig.setting = replace(rig.setting, kv_memory="auto")
            engine = rig.engine(run.engine, batch, *sizes)
        prompts = rig.prompts(batch, cell.prompt_len)
        run_pass(engine, prompts, cell.output_len)  # captures the graphs for replay
        passes = [run_pass(engine, prompts, cell.output_len) for _ in range(self.plan.repeats)]
        found = figures(passes)
        if self.roof is not None:
            step = found["step_seconds"]
            found["roofline"] = roofline(
                rig.runner,
                passes[-1],
                found["prefill_seconds"]["median"],
                step and step["median"],
                self.roof,
            )
        graphs = runner.graphs(engine.pool) if runner.steps_on_buffers else None
        return {
            "batch": batch,
            "options": repr(engine.policy),
            "kv_memory": engine.pool.budget,
            **found,
            "peak_bytes": memory.bytes,
            "backend": runner.backend.name,
            "graphs": 0 if graphs is None else graphs.captured,
        }

    def _left(self, rig: Rig) -> int:
        """Bytes for everything except the weights."""
        total = self.plan.memory
        if total is None:
            total = int(MEMORY_SHARE * torch.cuda.get_device_properties(self.device).total_memory)
        return int(total - rig.parameters * self.dtype.itemsize)

    # --- the machine, and attention alone -----------------------------------------------------

    def _roof(self) -> dict[str, Any]:
        size = 2**20 if self.result["is_toy"] else None
        self.roof = measure_roof(self.dtype, self.device, size=size)
        return self.roof.figures()

    @torch.inference_mode()
    def _attend(self, each: Attention) -> dict[str, Any]:
        """Seconds of one layer's decode attention in one graph, with other entries every time."""
        backend = select_backend(self.plan.backend, self.device)
        page_bytes = 2 * each.kv_heads * PAGE * each.size * self.dtype.itemsize
        needed = each.batch * -(-each.context // PAGE)
        pages = max(needed, self.plan.storage // page_bytes)
        shape = (pages * each.kv_heads, PAGE, each.size)
        keys, values = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        positions = torch.zeros(shape[:2], dtype=torch.int32, device=self.device)
        heads = each.heads, each.kv_heads
        storage = Pages(keys, values, positions)
        if each.kv_dtype != "auto":
            storage = coded(storage, each.kv_dtype)
        work = decode_work(backend, heads, storage, each.batch, each.context, keys)
        call = _captured(work.kernel) if self.device.type == "cuda" else work.kernel
        seconds = side_by_side({"kernel": call}, self.device, 5)["kernel"]
        least = spread([value / work.layers for value in seconds])
        rate = work.size / least["median"]
        copy = None if self.roof is None else self.roof.copy
        return {
            "backend": backend.name,
            "seconds": least,
            "bytes": work.size,
            "bytes_per_second": rate,
            "share_of_copy_bandwidth": None if copy is None else rate / copy,
        }


def _captured(kernel: Callable[[int], object]) -> Callable[[int], object]:
    """One call as a CUDA graph, so that kernel launches cost nothing."""
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(0)
    return lambda _: graph.replay()


def _decoding_fits(engine: Engine, prompt_len: int, output_len: int) -> int:
    """Requests that can decode at once."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    tokens: TokenIds = [0] * prompt_len
    cost = engine.make(tokens, params).cost
    return max(1, engine.ledger.how_many(cost.after_prefill or cost))


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "cuda": torch.version.cuda,
        "capability": [found.major, found.minor],
    }


# --- the page ---------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[Table]:
    """The output in the terminal: rows, and targets."""
    where = "TOY RUN, no GPU" if result["is_toy"] else result["gpu"]["name"]
    rows = Table(title=f"{where}; {result['seconds']:.0f} s")
    for name in (
        "cell",
        "engine",
        "batch",
        "prompt + new",
        "output tokens/s",
        "prefill, s",
        "step, ms",
        "KV at the end",
        "graphs",
    ):
        rows.add_column(name, justify="left" if name in ("cell", "engine") else "right")
    for row in result["rows"]:
        head = [
            row["cell"],
            row["engine"],
            str(row["batch"] or "largest"),
            f"{row['prompt_len']} + {row['output_len']}",
        ]
        if "error" in row:
            rows.add_row(*head, row["error"], "", "", "", "")
            continue
        rows.add_row(
            *head,
            ranged(row["output_tokens_per_second"], ".1f"),
            ranged(row["prefill_seconds"], ".2f"),
            ranged(row["step_seconds"], ".2f", 1e3),
            percent(row.get("kv_share_end")),
            str(row.get("graphs", "–")),
        )
    judged = Table(title="bars")
    for name in ("what", "ours", "against", "ratio", "bar", "paper", "met"):
        judged.add_column(name, justify="left" if name in ("what", "ours", "against") else "right")
    for bar in result["bars"]:
        ratio = "not measured" if bar["ratio"] is None else f"{bar['ratio']:.2f}"
        judged.add_row(
            bar["cell"],
            str(bar["ours"]),
            str(bar["against"] or ", ".join(bar["of"])),
            ratio,
            f"{bar['bar']:g}",
            "–" if bar["paper"] is None else f"{bar['paper']:g}",
            {True: "yes", False: "NO", None: "–"}[bar["met"]],
        )
    return [rows, judged]


def run_bench(plan: GPUPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, show tables, and return the result."""
    if parse_device(plan.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench-gpu needs a GPU that torch can use; --toy runs without one")
    quiet_transformers()
    result = Bench(plan, out).run()
    console = Console()
    for table in tables(result):
        console.print(table)
    for name in result["not_run"]:
        console.print(f"not run, no time left: {name}")
    console.print(str(out))
    return result


def main(arguments: list[str] | None = None) -> None:
    """``python -m pyramidinfer.lab.bench.gpu``."""
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.bench.gpu", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--json", type=Path, default=None, help="default benchmarks/results/bench_gpu.json")
    add("--budget-seconds", type=float, default=GPUPlan.budget_seconds)
    add("--repeats", type=int, default=None, help="passes of our engines that count")
    add("--backend", default="auto")
    add("--toy", action="store_true", help="a tiny model on the CPU, to try the script")
    given = parser.parse_args(arguments)
    changes = {"budget_seconds": given.budget_seconds, "backend": given.backend}
    if given.repeats is not None:
        changes["repeats"] = given.repeats
    usual = Path("out" if given.toy else "benchmarks/results") / "bench_gpu.json"
    try:
        run_bench((toy_plan if given.toy else real_plan)(**changes), given.json or usual)
    except ValueError as error:
        sys.exit(f"bench-gpu: {error}")


if __name__ == "__main__":
    main()
