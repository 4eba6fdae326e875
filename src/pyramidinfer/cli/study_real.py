"""``pyramidinfer study ruler | turns | text | long | heads | codecs``: what a real model loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pyramidinfer.cli.common import plain_errors
from pyramidinfer.cli.old import Model, names_model
from pyramidinfer.cli.study import (
    Context,
    Device,
    Dtype,
    Json,
    KvDtypes,
    KvMemory,
    Seed,
    Specs,
    Text,
    Workers,
    numbers,
    subject,
    words,
)

if TYPE_CHECKING:
    from pyramidinfer.lab.samples import Subject

__all__ = ["add_real"]

Keeps = Annotated[str, typer.Option(help="Budgets, shares in (0, 1].")]
KEEPS = ".45,.3,.15"


def add_real(study: typer.Typer) -> None:
    """Register the commands."""
    for command in (ruler, turns, text, long, heads, codecs):
        study.command(command.__name__)(plain_errors()(names_model(command)))


def ruler(
    model: Model = None,
    text: Annotated[
        str | None,
        typer.Option(help="UTF-8 file to hide needles in, or 'noise'. Default: real English."),
    ] = None,
    policies: Specs = None,
    keeps: Keeps = KEEPS,
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt and its answer.")] = "2000",
    tasks: Annotated[str | None, typer.Option(help="NAME,NAME. Default: all thirteen.")] = None,
    protocols: Annotated[
        str, typer.Option(help="inside: with the question in view; after: before it came.")
    ] = "inside,after",
    kv_dtypes: KvDtypes = "auto",
    samples: Annotated[
        int, typer.Option(help="Samples of each task at the shortest length; longer: fewer.")
    ] = 20,
    seed: Seed = 0,
    json: Json = Path("out/ruler.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "1GiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """RULER's thirteen tasks, the question inside the compressed prompt and after it."""
    from pyramidinfer.lab.ruler.grid import RulerPlan, run_ruler
    from pyramidinfer.lab.ruler.tables import means_table
    from pyramidinfer.lab.ruler.tasks import TASKS

    where = replace(subject(model, None, dtype, device), kv_memory=kv_memory, text=text)
    plan = RulerPlan(
        *_ways(policies, keeps, where, samples, seed),
        numbers(lengths, int, "--lengths"),
        TASKS if tasks is None else words(tasks),
        words(protocols),
        kv_dtypes=words(kv_dtypes),
    )
    means, pictures = run_ruler(plan, json, workers)
    _show(means_table(means), [json, *pictures])


def turns(
    model: Model = None,
    policies: Specs = None,
    keeps: Keeps = KEEPS,
    length: Annotated[int, typer.Option(help="Tokens of the first turn.")] = 1000,
    compress_idle: Annotated[
        bool,
        typer.Option(
            "--compress-idle",
            help="Recompress caches between turns, as serve --compress-idle does.",
        ),
    ] = False,
    kv_dtypes: KvDtypes = "auto",
    samples: Annotated[int, typer.Option(help="Chats.")] = 20,
    seed: Seed = 0,
    json: Json = Path("out/turns.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "2GiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Facts told in a chat's first turn, asked for in turns 2 to 4 on the cache taken up."""
    from pyramidinfer.lab.turns import TurnsPlan, run_turns
    from pyramidinfer.lab.ways import rows_table

    where = replace(subject(model, None, dtype, device), kv_memory=kv_memory)
    plan = TurnsPlan(
        *_ways(policies, keeps, where, samples, seed),
        length,
        compress_idle,
        kv_dtypes=words(kv_dtypes),
    )
    rows, picture = run_turns(plan, json, workers)
    columns = {"answered": _estimate("score"), "lost": _estimate("lost"), "turn 2, 3, 4": _by_turn}
    _show(rows_table("facts of turn 1, asked in turns 2 to 4", rows, columns), [json, picture])


def text(
    model: Model = None,
    text: Text = None,
    policies: Specs = None,
    keeps: Keeps = KEEPS,
    contexts: Annotated[
        str, typer.Option(help="Context lengths in tokens.")
    ] = "500,1000,2000,4000",
    kv_dtypes: KvDtypes = "auto",
    samples: Annotated[
        int, typer.Option(help="Passages at the shortest context; longer ones get fewer.")
    ] = 20,
    seed: Seed = 0,
    json: Json = Path("out/text.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "1GiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Perplexity and divergence on real text by context length."""
    from pyramidinfer.lab.text import TextPlan, run_text
    from pyramidinfer.lab.ways import rows_table

    where = replace(subject(model, text, dtype, device), kv_memory=kv_memory)
    ways = _ways(policies, keeps, where, samples, seed)
    plan = TextPlan(*ways, numbers(contexts, int, "--contexts"), kv_dtypes=words(kv_dtypes))
    rows, picture = run_text(plan, json, workers)
    columns = {
        "tokens": lambda r: f"{r['context']:,}",
        "perplexity": _estimate("perplexity"),
        "over full": _estimate("ratio"),
        "KL": _estimate("kl"),
    }
    _show(rows_table("real text on a compressed cache", rows, columns), [json, picture])


def long(
    model: Model = None,
    text: Text = None,
    policies: Specs = None,
    keeps: Keeps = KEEPS,
    context: Context = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens to generate; end tokens do not end.")] = 512,
    kv_dtypes: KvDtypes = "auto",
    samples: Annotated[int, typer.Option(help="Prompts.")] = 8,
    seed: Seed = 0,
    json: Json = Path("out/long.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "2GiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Long answers: first difference from the full cache's, likelihood, repetition."""
    from pyramidinfer.lab.long import LongPlan, run_long
    from pyramidinfer.lab.ways import rows_table

    where = replace(subject(model, text, dtype, device), kv_memory=kv_memory)
    plan = LongPlan(
        *_ways(policies, keeps, where, samples, seed), context, tokens, kv_dtypes=words(kv_dtypes)
    )
    rows, picture = run_long(plan, json, workers)
    columns = {
        "perplexity": lambda r: f"{r['perplexity']:.2f}",
        "nats a token lost": _estimate("lost"),
        "same tokens first": lambda r: f"{r['same_tokens']:.0f}",
        "repeated": lambda r: f"{r['repetition']:.2f}",
    }
    _show(rows_table(f"{tokens} tokens generated", rows, columns), [json, picture])


def heads(
    model: Model = None,
    text: Text = None,
    context: Context = 1000,
    continuation: Annotated[int, typer.Option(help="Tokens scored after it, at most.")] = 64,
    share: Annotated[float, typer.Option(help="What a pruned layer is cut to, in (0, 1).")] = 0.2,
    samples: Annotated[int, typer.Option(help="Passages that layers are pruned on.")] = 4,
    seed: Seed = 0,
    json: Json = Path("out/heads.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """What each KV head needs of a text, beside what pruning each layer alone loses."""
    from pyramidinfer.lab.heads import HeadsPlan, heads_table, run_heads

    where = replace(subject(model, text, dtype, device), kv_memory=kv_memory)
    plan = HeadsPlan(where, context, continuation, samples, seed, share)
    rows, picture = run_heads(plan, json, workers)
    _show(heads_table(rows), [json, picture])


def codecs(
    model: Model = None,
    text: Text = None,
    context: Annotated[int, typer.Option(help="Tokens of a passage, all measured.")] = 1000,
    samples: Annotated[int, typer.Option(help="Passages.")] = 4,
    seed: Seed = 0,
    json: Json = Path("out/codecs.json"),
    workers: Workers = 1,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Keys and values in few bits: what rotation, scales and minima are worth. No picture."""
    from pyramidinfer.lab.codecs import CodecsPlan, codecs_table, run_codecs

    plan = CodecsPlan(subject(model, text, dtype, device), context, samples, seed)
    _show(codecs_table(run_codecs(plan, json, workers)), [json])


def _ways(
    policies: str | None, keeps: str, where: Subject, samples: int, seed: int
) -> tuple[tuple[str, ...], tuple[float, ...], Subject, int, int]:
    """The first fields of every plan (``lab.ways.Ways``)."""
    from pyramidinfer.lab.fields import split_specs
    from pyramidinfer.policies import POLICIES

    specs = split_specs(policies) if policies else tuple(POLICIES)
    return specs, numbers(keeps, float, "--keeps"), where, samples, seed


def _show(table: Table, paths: Iterable[Path]) -> None:
    Console().print(table)
    for path in paths:
        print(path)


def _by_turn(row: dict[str, Any]) -> str:
    return ", ".join(f"{each:.2f}" for each in row["by_turn"])


def _estimate(name: str) -> Callable[[dict[str, Any]], str]:
    """A column of a row's figure with its interval."""
    return lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(row[name], *row[f"{name}_ci"])
