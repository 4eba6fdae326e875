"""``pyramidinfer study …``: measurements of a model under compression, one command each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pyramidinfer.cli.common import DEFAULT_POLICY, plain_errors, policy_from
from pyramidinfer.cli.old import Keep, Model, Options, PolicyName, names_model

if TYPE_CHECKING:
    from pyramidinfer.lab.samples import Subject

__all__ = ["study"]

study = typer.Typer(
    help="Measure a model under compression: JSON, pictures, resumable.", no_args_is_help=True
)

Text = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text. Default: real English; the shipped model's own language."),
]
Json = Annotated[Path, typer.Option("--json", help="Where the result goes; pictures beside it.")]
Samples = Annotated[int, typer.Option(help="Passages a figure rests on.")]
Context = Annotated[int, typer.Option(help="Tokens of context.")]
Seed = Annotated[int, typer.Option(help="Which passages are drawn.")]
Workers = Annotated[int, typer.Option(help="Processes of one thread each; 1 runs in this one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


Specs = Annotated[
    str | None,
    typer.Option(help="NAME,NAME or 'NAME NAME:option=value,…'. Default: every policy."),
]
KvDtypes = Annotated[
    str,
    typer.Option(
        help="How keys and values are stored: auto, int8, int4, fp8; each policy with each."
    ),
]
KEEPS = "1,.75,.6,.45,.3,.2,.1"
N = TypeVar("N", int, float)


def words(text: str) -> tuple[str, ...]:
    """``"a,b"`` → names."""
    return tuple(text.replace(",", " ").split())


def numbers(text: str, kind: type[N], option: str) -> tuple[N, ...]:
    """``"1,.5"`` → numbers; ``ValueError`` naming the option otherwise."""
    try:
        found = tuple(kind(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers, separated by commas") from None
    if not found:
        raise ValueError(f"{option} is empty: give at least one number")
    return found


def subject(model: str | None, text: Path | None, dtype: str, device: str) -> Subject:
    """What is studied, with the shipped model as the default."""
    from pyramidinfer.lab.samples import SHIPPED, Subject
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    path = None if text is None else str(text)
    return Subject(model or SHIPPED, path, dtype, device)


KvMemory = Annotated[str, typer.Option(help="Memory for the cache.")]


@study.command()
@plain_errors()
@names_model
def icr(
    model: Model = None,
    text: Text = None,
    context: Context = 1000,
    continuation: Annotated[int, typer.Option(help="Tokens scored after it, at most.")] = 64,
    shares: Annotated[
        str, typer.Option(help="Shares of the pruned layer's entries that stay, in (0, 1].")
    ] = ".02,.05,.1,.2,.35,.5,.75,1",
    layers: Annotated[
        str | None, typer.Option(help="Layers to prune, one at a time. Default: all.")
    ] = None,
    samples: Samples = 24,
    seed: Seed = 0,
    json: Json = Path("out/icr.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Prune one layer at a time to a share, all others whole: what does each layer need?"""
    from pyramidinfer.lab.icr import IcrPlan, run_icr

    plan = IcrPlan(
        replace(subject(model, text, dtype, device), kv_memory=kv_memory),
        context,
        continuation,
        samples,
        seed,
        numbers(shares, float, "--shares"),
        None if layers is None else numbers(layers, int, "--layers"),
    )
    print(f"{json}\n{run_icr(plan, json, workers)}")


@study.command()
@plain_errors()
@names_model
def rac(
    model: Model = None,
    text: Text = None,
    context: Context = 1000,
    top: Annotated[str, typer.Option(help="Shares of the context that a token picks.")] = ".8,.2",
    bins: Annotated[int, typer.Option(help="Parts of the distances below 30 %.")] = 10,
    samples: Samples = 16,
    seed: Seed = 0,
    json: Json = Path("out/rac.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Do recent tokens, alone or together, agree on which context matters?"""
    from pyramidinfer.lab.rac import RacPlan, run_rac

    plan = RacPlan(
        replace(subject(model, text, dtype, device), kv_memory=kv_memory),
        context,
        samples,
        seed,
        numbers(top, float, "--top"),
        bins,
    )
    print(f"{json}\n{run_rac(plan, json, workers)}")


@study.command("map")
@plain_errors()
@names_model
def survival(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt. Default: a generated question.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File holding the prompt; - is standard input.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the generated question.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate after the prompt.")] = 11,
    seed: Seed = 0,
    json: Json = Path("out/map.json"),
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Which token of one prompt survives to which layer: figures, a picture and a page."""
    from pyramidinfer.lab.survival import MapPlan, run_map

    if prompt is not None and prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if prompt_file is not None:
        prompt = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text("utf-8")
    plan = MapPlan(
        replace(subject(model, None, dtype, device), kv_memory=kv_memory),
        policy_from(policy, keep, option or []),
        prompt,
        context,
        max_tokens,
        seed,
    )
    for path in [json, *run_map(plan, json)]:
        print(path)


@study.command()
@plain_errors()
@names_model
def quality(
    model: Model = None,
    text: Text = None,
    policies: Specs = None,
    keeps: Annotated[str, typer.Option(help="Budgets, shares in (0, 1].")] = KEEPS,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1000,3000",
    samples: Annotated[
        int, typer.Option(help="Questions at the shortest context; longer ones get fewer.")
    ] = 40,
    passages: Annotated[
        float, typer.Option(help="Passages for each question: a share, at least 5 a cell.")
    ] = 0.5,
    kv_dtypes: KvDtypes = "auto",
    seed: Seed = 0,
    json: Json = Path("out/quality.json"),
    workers: Workers = 1,
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Every policy at every budget: recall, perplexity, divergence, agreement, bytes."""
    from pyramidinfer.lab.fields import split_specs
    from pyramidinfer.lab.quality import Grid, run_quality
    from pyramidinfer.policies import POLICIES

    specs = split_specs(policies) if policies else tuple(POLICIES)
    grid = Grid(
        replace(subject(model, text, dtype, device), kv_memory=kv_memory),
        specs,
        numbers(keeps, float, "--keeps"),
        numbers(contexts, int, "--contexts"),
        samples,
        passages,
        min(8, samples),
        seed=seed,
        kv_dtypes=words(kv_dtypes),
    )
    for path in [json, *run_quality(grid, json, workers)]:
        print(path)
