"""``bench step``: time of a decode step by part, for each format of the weights and each batch, and
the share of the read bandwidth that it reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyramidinfer.engine import LLM
from pyramidinfer.engine.engine import Engine
from pyramidinfer.lab.bench.machine import plain_read
from pyramidinfer.lab.bench.plans import StepPlan
from pyramidinfer.lab.bench.setting import FIRST_WORD, progress
from pyramidinfer.lab.bench.timing import spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.fused import FusedDecoder
from pyramidinfer.models.ops import KernelOps
from pyramidinfer.native.library import PARTS
from pyramidinfer.policies import Full
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["StepPlan", "run_step"]

#: Bytes that are read after each pass, and how often: other programs slow down both the pass and
#: the reads.
READ, READS = 256 * 2**20, 5
#: Parts of a step: those of all layers together (``PARTS``), the head, the rest of the forward pass
#: (pages, positions, embedding), and the engine (best token, bookkeeping).
STEP_PARTS = (*PARTS, "head", "inputs", "engine")


def run_step(plan: StepPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result: one row per format of weights and batch."""
    plan.check()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    llms = {name: plan.subject.llm(Full(), weights=name) for name in plan.weights}
    sizes = {name: _decoder(llm).step_bytes for name, llm in llms.items()}
    rows, memory = [], torch.ones(READ // 4)
    with progress("step", len(plan.batches) * len(llms) * (plan.repeats + plan.warmup)) as done:
        for batch in plan.batches:
            passes: dict[str, list[np.ndarray]] = {name: [] for name in llms}
            reads: dict[str, list[float]] = {name: [] for name in llms}
            for repeat in range(plan.warmup + plan.repeats):
                for name, llm in llms.items():
                    found = _pass(llm.engine, _prompts(plan, llm, batch), plan.output_len)
                    if repeat >= plan.warmup:
                        passes[name].append(found)
                        reads[name].append(_read_rate(memory))
                    done(f"{name} {batch}")
            rows += [
                {"weights": name, "batch": batch, **_row(found, sizes[name], reads[name])}
                for name, found in passes.items()
            ]
    result = {"backend": "cpu", "rows": rows}
    write_result(out, asdict(plan), result)
    return result


def _prompts(plan: StepPlan, llm: LLM, batch: int) -> list[TokenIds]:
    draw = np.random.default_rng(plan.seed)
    highest = llm.engine.runner.vocab_size
    return [draw.integers(FIRST_WORD, highest, plan.prompt_len).tolist() for _ in range(batch)]


def _row(passes: list[np.ndarray], size: int, reads: list[float]) -> dict[str, Any]:
    """Figures of one row.

    passes : of each pass, the seconds of its steps by part, ``[steps, parts]``;  size : bytes of
    the weights;  reads : bytes read per second after each pass.
    """
    medians = [np.median(each, axis=0) for each in passes]
    parts = dict(zip(STEP_PARTS, np.median(medians, axis=0).tolist(), strict=True))
    steps = [float(np.median(each.sum(axis=1))) for each in passes]
    shares = [size / step / read for step, read in zip(steps, reads, strict=True)]
    return {
        "bytes": size,
        "step_seconds": spread(steps),
        "parts": parts,
        "read_per_second": spread(reads),
        "share_of_read_bandwidth": spread(shares),
    }


def _read_rate(memory: torch.Tensor) -> float:
    """Bytes per second at which memory is read now, the median of a few reads."""
    seconds = []
    for _ in range(READS):
        began = time.perf_counter()
        plain_read(memory)
        seconds.append(time.perf_counter() - began)
    return memory.nbytes / float(np.median(seconds))


def _decoder(llm: LLM) -> FusedDecoder:
    """``ValueError`` if the model's steps are not one call of the kernels."""
    decoder = llm.engine.runner.decoder
    if isinstance(decoder, FusedDecoder) and isinstance(decoder.ops, KernelOps):
        return decoder
    raise ValueError(
        "bench step needs a model whose layers the CPU kernels pack (docs/weights.md), with "
        "--backend auto or cpu and --dtype float32 or bfloat16"
    )


def _pass(engine: Engine, prompts: list[TokenIds], output_len: int) -> np.ndarray:
    """Seconds of each step in which all requests decode, by part: ``[steps, parts]``."""
    runner, params = engine.runner, SamplingParams(max_tokens=output_len, ignore_eos=True)
    decoder: Any = runner.decoder
    inner = torch.zeros(len(PARTS), dtype=torch.float64)
    spent = dict.fromkeys(("step", "logits", "forward"), 0.0)

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*values)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    watched = (decoder, "step"), (decoder, "logits"), (runner, "forward")
    for owner, name in watched:
        setattr(owner, name, timed(name, getattr(owner, name)))
    decoder.ops.seconds = inner
    requests, steps = [engine.make(prompt, params) for prompt in prompts], []
    try:
        decodes, began = False, time.perf_counter()
        for _ in engine.steps(requests):
            whole = time.perf_counter() - began
            if decodes:
                layers, head, forward = float(inner.sum()), spent["logits"], spent["forward"]
                rest = [head, forward - layers - head, whole - forward]
                steps.append([*inner.tolist(), *rest])
            decodes = all(request.status == "running" for request in requests)
            inner.zero_()
            spent.update(dict.fromkeys(spent, 0.0))
            began = time.perf_counter()
    finally:
        decoder.ops.seconds = None
        for owner, name in watched:
            delattr(owner, name)  # the class's own method again
    return np.array(steps)
