"""``pyramidinfer demo``: the same questions in the same memory, four ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyramidinfer.cli.common import human_bytes
from pyramidinfer.config import parse_bytes
from pyramidinfer.engine import LLM
from pyramidinfer.lab.plots import draw_pyramid
from pyramidinfer.lab.recall import ANSWER, Question, is_right, make_questions
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Full, Policy, Pyramid, PyramidInfer
from pyramidinfer.types import RequestOutput

__all__ = ["run_demo"]

SEED = 2024


@dataclass(frozen=True, slots=True)
class Run:
    """One way of answering: what came out and what it took."""

    title: str
    outputs: list[RequestOutput]
    right: int
    seconds: float
    peak_bytes: int
    in_flight: int


def run_demo(documents: int, length: int, kv_memory: str, keep: float, out: Path) -> None:
    """Answer, print the table, draw ``out/pyramid.png``."""
    if documents < 1:
        raise ValueError(f"--documents {documents} must be at least 1")
    if not 200 <= length <= 4000:
        raise ValueError(f"--length {length} must lie between 200 and 4000 tokens")
    out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    console = Console()
    questions = make_questions(SEED, documents, length)
    ways: list[tuple[str, Policy]] = [
        ("full cache", Full()),
        ("paper's settings", PyramidInfer()),
        (f"paper's rule, keep {keep}", PyramidInfer(keep=keep)),
        (f"pyramid, keep {keep}", Pyramid(keep=keep)),
    ]
    console.print(
        f"{documents} documents of {length} tokens, one question each, "
        f"all inside [bold]{human_bytes(parse_bytes(kv_memory))}[/bold] of KV memory\n"
        f"[dim]for example: … {questions[0].prompt.split(' ? ')[0].split(' . ')[-1]} ?[/dim]"
    )
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    llms = [
        LLM(shipped_model(), policy, kv_memory=kv_memory, dtype="float32") for _, policy in ways
    ]
    runs: list[Run] = []
    try:
        with bar:
            for (title, _), llm in zip(ways, llms, strict=True):
                task = bar.add_task(title, total=documents)
                _answer(title, llm, questions, partial(bar.advance, task), runs)
    finally:
        if runs:
            console.print(_table(runs, llms[0].engine.pool.budget))
    shown = make_questions(SEED + 1, 1, min(length, 600))[0]
    picture = draw_pyramid(
        [(way[0], llm.trace(shown.prompt)) for way, llm in zip(ways[2:], llms[2:], strict=True)],
        shown.prompt, shown.needle, out / "pyramid.png",
    )  # fmt: skip
    configuration = {
        "documents": documents, "length": length, "kv_memory": kv_memory, "keep": keep,
        "seed": SEED,
    }  # fmt: skip
    figures = {run.title: _figures(run) for run in runs}
    write_result(out / "demo.json", configuration, figures)
    console.print(f"which token is kept in which layer: [bold]{picture}[/bold]", soft_wrap=True)


def _answer(title: str, llm: LLM, questions: list[Question], advance: Callable[[], None],
            runs: list[Run]) -> None:  # fmt: skip
    """All questions at once through one engine; interrupted, what is answered still counts."""
    engine = llm.engine
    requests = [engine.add(llm.encode(question.prompt), ANSWER) for question in questions]
    begun = time.monotonic()
    try:
        while not engine.scheduler.idle:
            for _ in engine.step():
                advance()
    finally:
        seconds = time.monotonic() - begun
        pairs = list(zip(requests, questions, strict=True))
        done = [(engine.output(r), q) for r, q in pairs if r.finish_reason is not None]
        if done:
            right = sum(is_right(output, question) for output, question in done)
            outputs = [output for output, _ in done]
            runs.append(
                Run(title, outputs, right, seconds, engine.peak_bytes, engine.peak_in_flight)
            )


def _figures(run: Run) -> dict[str, float]:
    """What the table says of a run."""
    count = len(run.outputs)
    new = sum(len(o.token_ids) for o in run.outputs)
    old = sum(len(o.prompt_token_ids) for o in run.outputs)
    return {
        "right": run.right,
        "questions": count,
        "peak_bytes": run.peak_bytes,
        "computed_share": sum(o.metrics.computed_share for o in run.outputs) / count,
        "kept_share": sum(o.kv.kept_share for o in run.outputs) / count,
        "in_flight": run.in_flight,
        "first_token_seconds": sum(o.metrics.first_token_seconds or 0 for o in run.outputs) / count,
        "output_tokens_per_second": new / run.seconds,
        "all_tokens_per_second": (new + old) / run.seconds,
    }


def _table(runs: list[Run], budget: int) -> Table:
    table = Table(title=f"the same questions in {human_bytes(budget)}")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.title, justify="right")
    all_figures = [_figures(run) for run in runs]
    rows: dict[str, Callable[[dict[str, float]], str]] = {
        "answers right": lambda f: f"{f['right']:.0f} of {f['questions']:.0f}",
        "peak KV bytes": lambda f: human_bytes(f["peak_bytes"]),
        "tokens computed, mean": lambda f: f"{f['computed_share']:.0%}",
        "tokens kept, mean": lambda f: f"{f['kept_share']:.0%}",
        "requests in flight": lambda f: f"{f['in_flight']:.0f}",
        "time to first token": lambda f: f"{f['first_token_seconds']:.2f} s",
        "output tokens/s": lambda f: f"{f['output_tokens_per_second']:.0f}",
        "prompt + output tokens/s": lambda f: f"{f['all_tokens_per_second']:.0f}",
    }
    for name, show in rows.items():
        table.add_row(name, *(show(figures) for figures in all_figures))
    return table
