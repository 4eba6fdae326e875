"""``pyramidinfer study …``: measurements of a model under compression, one command each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pyramidinfer.cli.choices import ModelOptions, PromptOptions
from pyramidinfer.cli.fields import command
from pyramidinfer.lab.plans import (
    CodecsPlan,
    Grid,
    HeadsPlan,
    IcrPlan,
    LongPlan,
    MapPlan,
    RacPlan,
    RulerPlan,
    TextPlan,
    TurnsPlan,
)
from pyramidinfer.options import pick

__all__ = ["study"]

study = typer.Typer(
    help="Measure a model under compression; results are JSON and pictures, and can be resumed.",
    no_args_is_help=True,
)

Json = Annotated[
    Path, typer.Option("--json", help="JSON file for the result; pictures are written next to it.")
]
JsonOnly = Annotated[Path, typer.Option("--json", help="JSON file for the result.")]
Workers = Annotated[
    int, typer.Option(help="Number of processes with one thread each; 1 starts none.")
]


@command(study)
def icr(plan: IcrPlan, json: Json = Path("out/icr.json"), workers: Workers = 1) -> None:
    """How many entries each layer needs: prune one layer at a time, the others keep all."""
    from pyramidinfer.lab.icr import run_icr

    _quiet()
    print(f"{json}\n{run_icr(plan, json, workers)}")


@command(study)
def rac(plan: RacPlan, json: Json = Path("out/rac.json"), workers: Workers = 1) -> None:
    """Whether recent tokens attend to the same context, singly and as a group."""
    from pyramidinfer.lab.rac import run_rac

    _quiet()
    print(f"{json}\n{run_rac(plan, json, workers)}")


@command(study, "map")
def survival(
    model: Annotated[ModelOptions, pick("policy", "keep", "option")],
    asked: Annotated[PromptOptions, pick("prompt", "prompt_file")],
    plan: MapPlan,
    json: Json = Path("out/map.json"),
) -> None:
    """Which tokens of a prompt are kept in which layer: numbers, a picture and a web page."""
    from pyramidinfer.lab.survival import run_map

    if asked.prompt is not None and asked.prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    prompt = asked.prompt
    if asked.prompt_file is not None:
        piped = str(asked.prompt_file) == "-"
        prompt = sys.stdin.read() if piped else asked.prompt_file.read_text("utf-8")
    _quiet()
    for path in [json, *run_map(replace(plan, prompt=prompt), model.chosen, json)]:
        print(path)


@command(study)
def quality(plan: Grid, json: Json = Path("out/quality.json"), workers: Workers = 1) -> None:
    """Every policy at every keep: recall, perplexity, divergence, agreement, bytes."""
    from pyramidinfer.lab.quality import run_quality

    _quiet()
    plan = replace(plan, long_samples=min(plan.long_samples, plan.samples))
    for path in [json, *run_quality(plan, json, workers)]:
        print(path)


@command(study)
def ruler(plan: RulerPlan, json: Json = Path("out/ruler.json"), workers: Workers = 1) -> None:
    """RULER's thirteen tasks, with the question inside the compressed prompt and after it. With
    --text noise, needles are hidden in noise."""
    from pyramidinfer.lab.ruler.grid import run_ruler
    from pyramidinfer.lab.ruler.tables import means_table

    _quiet()
    means, pictures = run_ruler(plan, json, workers)
    _show(means_table(means), [json, *pictures])


@command(study)
def turns(plan: TurnsPlan, json: Json = Path("out/turns.json"), workers: Workers = 1) -> None:
    """Facts from a chat's first turn, asked for in turns 2 to 4 with the reused cache."""
    from pyramidinfer.lab.turns import run_turns
    from pyramidinfer.lab.ways import rows_table

    _quiet()
    rows, picture = run_turns(plan, json, workers)
    columns = {"answered": _estimate("score"), "lost": _estimate("lost"), "turn 2, 3, 4": _by_turn}
    _show(rows_table("facts of turn 1, asked in turns 2 to 4", rows, columns), [json, picture])


@command(study)
def text(plan: TextPlan, json: Json = Path("out/text.json"), workers: Workers = 1) -> None:
    """Perplexity and divergence on real text by context length."""
    from pyramidinfer.lab.text import run_text
    from pyramidinfer.lab.ways import rows_table

    _quiet()
    rows, picture = run_text(plan, json, workers)
    columns = {
        "tokens": lambda r: f"{r['context']:,}",
        "perplexity": _estimate("perplexity"),
        "over full": _estimate("ratio"),
        "KL": _estimate("kl"),
    }
    _show(rows_table("real text on a compressed cache", rows, columns), [json, picture])


@command(study)
def long(plan: LongPlan, json: Json = Path("out/long.json"), workers: Workers = 1) -> None:
    """Long answers: first difference from the full cache's answer, likelihood, repetition."""
    from pyramidinfer.lab.long import run_long
    from pyramidinfer.lab.ways import rows_table

    _quiet()
    rows, picture = run_long(plan, json, workers)
    columns = {
        "perplexity": lambda r: f"{r['perplexity']:.2f}",
        "nats a token lost": _estimate("lost"),
        "same tokens first": lambda r: f"{r['same_tokens']:.0f}",
        "repeated": lambda r: f"{r['repetition']:.2f}",
    }
    _show(rows_table(f"{plan.tokens} tokens generated", rows, columns), [json, picture])


@command(study)
def heads(plan: HeadsPlan, json: Json = Path("out/heads.json"), workers: Workers = 1) -> None:
    """How much of a text each KV head needs, and the loss when one layer is pruned."""
    from pyramidinfer.lab.heads import heads_table, run_heads

    _quiet()
    rows, picture = run_heads(plan, json, workers)
    _show(heads_table(rows), [json, picture])


@command(study)
def codecs(
    plan: CodecsPlan, json: JsonOnly = Path("out/codecs.json"), workers: Workers = 1
) -> None:
    """Error of quantized keys and values, by rotation, scales and minima."""
    from pyramidinfer.lab.codecs import codecs_table, run_codecs

    _quiet()
    _show(codecs_table(run_codecs(plan, json, workers)), [json])


def _quiet() -> None:
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()


def _show(table: Table, paths: Iterable[Path]) -> None:
    Console().print(table)
    for path in paths:
        print(path)


def _by_turn(row: dict[str, Any]) -> str:
    return ", ".join(f"{each:.2f}" for each in row["by_turn"])


def _estimate(name: str) -> Callable[[dict[str, Any]], str]:
    """A table column: a row's value with its interval."""
    return lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(row[name], *row[f"{name}_ci"])
