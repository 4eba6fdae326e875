"""``pyramidinfer demo``: the same questions in the same memory, four ways."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyramidinfer.cli.choices import DemoOptions
from pyramidinfer.cli.common import human_bytes
from pyramidinfer.config import EngineConfig, parse_bytes
from pyramidinfer.engine import LLM, Engine
from pyramidinfer.engine.english import ENGLISH
from pyramidinfer.engine.tracing import trace
from pyramidinfer.lab.asked import Question, real_questions, shipped_questions
from pyramidinfer.lab.plots import draw_pyramid
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import GENERATED, SHIPPED
from pyramidinfer.models import LoadedModel, ModelRunner, load_model
from pyramidinfer.models.catalog import fetch, find_entry, find_model
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Duo, Full, Policy, Pyramid, PyramidInfer
from pyramidinfer.types import RequestOutput, Trace

__all__ = ["run_demo"]

SEED = 2024
EXAMPLES = 3  # number of questions whose answers are shown


@dataclass(frozen=True, slots=True)
class Usual:
    """The default questions and memory for a model."""

    documents: int
    length: int
    kv_memory: str
    keep: float


#: Defaults of the shipped model and of any other.
TOY, REAL = Usual(24, 2000, "64MiB", 0.3), Usual(15, 1500, "256MiB", 0.25)


@dataclass(frozen=True, slots=True)
class Run:
    """One way of answering: its answers and its cost."""

    title: str
    outputs: list[RequestOutput]
    right: list[bool]
    seconds: float
    peak_bytes: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Questions, model and memory of a demo.  ``model``: None is the shipped one."""

    model: str | None
    documents: int
    length: int
    kv_memory: str
    keep: float

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ValueError(f"--documents {self.documents} must be at least 1")
        if not 200 <= self.length <= 4000:
            raise ValueError(f"--length {self.length} must lie between 200 and 4000 tokens")

    @property
    def name(self) -> str:
        return self.model or SHIPPED

    @property
    def text(self) -> str:
        """The text that the documents are made of."""
        return GENERATED if self.model is None else ENGLISH

    def questions(self, tokenizer: Any, seed: int, count: int, length: int) -> list[Question]:
        make = shipped_questions if self.model is None else real_questions
        return make(tokenizer, seed, count, length)


def run_demo(model: str | None, asked: DemoOptions, engine: EngineConfig) -> None:
    """Answer, print the table, draw ``out/pyramid.png``.

    model : None is the shipped one;  engine : with the ``kv_memory`` of ``asked``.
    """
    if asked.fetch is not None:
        if model is not None:
            raise ValueError(f"give --model {model} or --fetch {asked.fetch}, not both")
        model = _fetched(asked.fetch)
    usual, out = TOY if model is None else REAL, asked.out
    ask = Ask(
        model,
        usual.documents if asked.documents is None else asked.documents,
        usual.length if asked.length is None else asked.length,
        asked.kv_memory or usual.kv_memory,
        usual.keep if asked.keep is None else asked.keep,
    )
    config = replace(engine, kv_memory=ask.kv_memory)
    out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    console = Console()
    loaded = load_model(find_model(model) if model else shipped_model(), dtype="float32")
    questions = ask.questions(loaded.tokenizer, SEED, ask.documents, ask.length)
    stored = "" if config.kv_dtype == "auto" else f", in {config.kv_dtype}"
    if config.weights != "auto":
        stored += f" (weights in {config.weights})"
    console.print(
        f"[bold]{ask.name}[/bold]: {ask.documents} documents of {ask.length} tokens ({ask.text}), "
        f"one question each, all inside [bold]{human_bytes(config.budget)}[/bold] of "
        f"KV memory{stored}\n[dim]for example: … {questions[0].asked}[/dim]"
    )
    (shown,) = ask.questions(loaded.tokenizer, SEED + 1, 1, min(ask.length, 600))
    traces: list[tuple[str, Trace]] = []
    engines = _engines(ask, loaded, config)
    runs = _run(console, ask, engines, questions, shown, traces)
    _show_answers(console, questions, runs)
    words = [loaded.tokenizer.decode([token]).strip() for token in shown.prompt]
    picture = draw_pyramid(traces[1:], words, shown.needle, out / "pyramid.png")
    figures = {run.title: _figures(run) for run in runs}
    configuration = {**asdict(ask), "model": ask.name, "text": ask.text, "seed": SEED}
    configuration["kv_dtype"] = config.kv_dtype
    configuration["weights"] = config.weights
    write_result(out / "demo.json", configuration, figures, model=ask.name)
    console.print(_verdict(runs))
    console.print(f"which token is kept in which layer: [bold]{picture}[/bold]", soft_wrap=True)


def _engines(ask: Ask, loaded: LoadedModel, config: EngineConfig) -> Iterator[tuple[str, Engine]]:
    """One engine and a title for each way, the full cache first.

    On one rank all engines share the weights; with several ranks, the ranks of one way end before
    those of the next begin.
    """
    ways = _ways(ask.keep, ask.model is None)
    if config.ranks == 1:
        runner = ModelRunner(loaded.model, "auto", config.prefill_chunk, own=True)
        for title, policy in ways:
            yield title, Engine(runner, policy, config, loaded.tokenizer)
        return
    for title, policy in ways:
        model = ask.model or shipped_model()
        llm = LLM(model, policy, dtype="float32", **asdict(config))
        try:
            yield title, llm.engine
        finally:
            llm.close()


def _run(
    console: Console,
    ask: Ask,
    engines: Iterator[tuple[str, Engine]],
    questions: Sequence[Question],
    shown: Question,
    traces: list[tuple[str, Trace]],
) -> list[Run]:
    """Answer the questions one way after the other, and record what each way keeps of the prompt
    ``shown``; print the table of finished ways, also when interrupted."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    runs: list[Run] = []
    try:
        with bar:
            for title, engine in engines:
                task = bar.add_task(title, total=len(questions))
                _answer(title, engine, questions, partial(bar.advance, task), runs)
                traces.append((title, trace(engine, shown.prompt, 0, ())))
    finally:
        if runs:
            console.print(_table(runs, parse_bytes(ask.kv_memory)))
    return runs


def _fetched(wanted: str) -> str | None:
    """The model's name after the download; None, with a line that says why, if that fails."""
    find_entry(wanted)  # an unknown name is an error of the user, not of the network
    try:
        fetch(wanted)
    except (ValueError, OSError) as error:
        print(f"{wanted} cannot be fetched, so the shipped model runs: {error}", file=sys.stderr)
        return None
    return wanted


def _ways(keep: float, shipped: bool) -> list[tuple[str, Policy]]:
    """Titles and policies: the full cache, the paper's rule, the default policy.

    shipped : whether it is the shipped model, which the paper's settings suit.
    """
    rule = (f"paper's rule, keep {keep}", PyramidInfer(keep=keep))
    ours = (f"pyramid, keep {keep}", Pyramid(keep=keep))
    if shipped:
        return [("full cache", Full()), ("paper's settings", PyramidInfer()), rule, ours]
    return [("full cache", Full()), rule, (f"duo, keep {keep}", Duo(keep=keep)), ours]


def _show_answers(console: Console, questions: Sequence[Question], runs: Sequence[Run]) -> None:
    """The answers of each way to the first questions."""
    for index, question in enumerate(questions[:EXAMPLES]):
        console.print(f"\n{question.asked} [dim]({question.wanted})[/dim]", highlight=False)
        for run in runs:
            if index < len(run.outputs):
                said = " ".join(run.outputs[index].text.split()) or "(nothing)"
                mark = (
                    "[green]right[/green]"
                    if question.is_right(run.outputs[index].text)
                    else "[red]wrong[/red]"
                )
                console.print(f"  {mark} {run.title}: ", end="", highlight=False)
                console.print(said, markup=False, highlight=False)
    console.print()


def _verdict(runs: Sequence[Run]) -> str:
    """Cost and savings of each way against the first, one line each."""
    first, whole, lines = runs[0], _figures(runs[0]), []
    for run in runs[1:]:
        found, same = _figures(run), sum(map(min, run.right, first.right))
        lines.append(
            f"{run.title}: {sum(run.right)} right ({same} of {first.title}'s {sum(first.right)}), "
            f"at {found['kept_share'] / whole['kept_share']:.0%} of its entries and "
            f"{found['computed_share'] / whole['computed_share']:.0%} of its prefill"
        )
    return "\n".join(lines)


def _answer(
    title: str,
    engine: Engine,
    questions: Sequence[Question],
    advance: Callable[[], None],
    runs: list[Run],
) -> None:
    """All questions at once on one engine; if interrupted, finished answers still count."""
    requests = [engine.make(question.prompt, question.params) for question in questions]
    begun = time.monotonic()
    try:
        for ended in engine.steps(requests):
            for _ in ended:
                advance()
    finally:
        seconds = time.monotonic() - begun
        pairs = list(zip(requests, questions, strict=True))
        done = [(engine.output(r), q) for r, q in pairs if r.finish_reason not in (None, "abort")]
        if done:
            right = [question.is_right(output.text) for output, question in done]
            outputs = [output for output, _ in done]
            runs.append(
                Run(title, outputs, right, seconds, engine.peak_bytes, engine.peak_in_flight)
            )


def _figures(run: Run) -> dict[str, float]:
    """The table row of a run."""
    count = len(run.outputs)
    new = sum(len(o.token_ids) for o in run.outputs)
    old = sum(len(o.prompt_token_ids) for o in run.outputs)
    return {
        "right": sum(run.right),
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
