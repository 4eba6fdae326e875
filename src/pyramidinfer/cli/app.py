"""``pyramidinfer demo | generate | serve | chat | batch | inspect | calibrate | study | …``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import pyramidinfer
from pyramidinfer.cli.bench import bench
from pyramidinfer.cli.common import (
    BACKENDS,
    DEFAULT_POLICY,
    DraftTokens,
    Dtype,
    FromModel,
    Keep,
    KvDtype,
    Lossless,
    Model,
    NoProfile,
    Options,
    PipelineParallel,
    PolicyName,
    TemplateKwargs,
    TensorParallel,
    Weights,
    check_drafts,
    json_object,
    names_model,
    plain_errors,
    policy_from,
    profiling,
    said,
)
from pyramidinfer.cli.models import add_models
from pyramidinfer.cli.profile import add_profile
from pyramidinfer.cli.serving import add_serving
from pyramidinfer.cli.study import study, subject
from pyramidinfer.cli.study_real import add_real

__all__ = ["app", "main"]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pyramidinfer {pyramidinfer.__version__}")
        raise typer.Exit


app = typer.Typer(
    name="pyramidinfer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(study, name="study")
app.add_typer(bench, name="bench")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Language model inference in which fewer tokens are computed and fewer are kept."""


MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
@plain_errors()
@names_model
def demo(
    model: Model = None,
    fetch: Annotated[
        str | None,
        typer.Option(help="Fetch this model and run on it; where that fails, on the shipped one."),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Documents to answer a question about. Default: 24 or 15.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in each. Default: 2000, or 1500 for a real model.")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for all caches. Default: 64MiB or 256MiB.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the cache that is kept. Default: 0.3 or 0.25.")
    ] = None,
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
) -> None:
    """Answer questions about long documents in one memory budget, four ways, and draw it."""
    from pyramidinfer.cli.demo import run_demo

    options = {
        "kv_dtype": kv_dtype,
        "weights": weights,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
    }
    run_demo(model, fetch, documents, length, kv_memory, keep, out, options)


@app.command()
@plain_errors()
@names_model
def generate(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    lossless: Lossless = False,
    draft_tokens: DraftTokens = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File holding the prompt; - is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most; default: the model's, or 64.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the model's, or 0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="1 is off; default: the model's, or off.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="0 is off; default: the model's, or off.")
    ] = None,
    generation_config: FromModel = "auto",
    chat_template_kwargs: TemplateKwargs = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop text; may be repeated.")] = None,
    kv_memory: Annotated[str, typer.Option(help="Memory for the cache.")] = "1GiB",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str, typer.Option(help=f"How to attend: auto, {', '.join(BACKENDS)}.")
    ] = "auto",
    no_profile: NoProfile = False,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt with any supported local or hub model."""
    from pyramidinfer.cli.generate import run_generate

    if chat_template_kwargs is not None and not chat:
        raise ValueError("--chat-template-kwargs has no effect without --chat")
    asked = said(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or None,
    )
    check_drafts(draft_tokens, lossless)
    chosen = policy_from(policy, keep, option or [], lossless)
    run_generate(
        model,
        chosen,
        prompt,
        prompt_file,
        chat,
        asked,
        generation_config,
        json_object("--chat-template-kwargs", chat_template_kwargs),
        kv_memory,
        dtype,
        device,
        backend,
        as_json,
        kv_dtype=kv_dtype,
        weights=weights,
        draft_tokens=draft_tokens,
        profile=profiling(chosen, no_profile),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )


@app.command()
@plain_errors()
@names_model
def inspect(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens in the prompt.")] = 2048,
    max_tokens: MaxTokens = 256,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a policy would compute and keep in each layer, and the bytes; generates nothing."""
    from pyramidinfer.cli.inspect import run_inspect

    chosen = policy_from(policy, keep, option or [])
    run_inspect(model, chosen, prompt_len, max_tokens, dtype, kv_dtype, weights, as_json)


@app.command()
@plain_errors()
@names_model
def calibrate(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The profile. Default: in the user's cache folder."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the work.")] = False,
    keep: Annotated[float, typer.Option(help="The budget that is measured at.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    kv_memory: Annotated[str, typer.Option(help="Memory for the cache.")] = "512MiB",
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Find after which layer of a model tokens may be dropped, and write it into its profile."""
    from pyramidinfer.cli.calibrate import run_calibrate
    from pyramidinfer.lab.calibrate import Task

    task = Task(replace(subject(model, text, dtype, device), kv_memory=kv_memory), keep, seed=seed)
    run_calibrate(task.quick() if quick else task, output, as_json)


@app.command()
@plain_errors()
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has, which kernels and attention backend are in use, and why."""
    from pyramidinfer.cli.doctor import run_doctor

    run_doctor(as_json)


add_serving(app)
add_models(app)
add_profile(app)
add_real(study)


@app.command()
@plain_errors()
@names_model
def verify(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Share of the full cache's quality to be kept. Default: 0.8."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1000,
    seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 100.0,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text for needles, text and long answers. Default: real English."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    kv_memory: Annotated[str, typer.Option(help="Memory for the cache.")] = "1GiB",
    dtype: Dtype = "float32",
    kv_dtype: KvDtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Tell what share of the full cache's quality a setting keeps here; exit 1 below the floor."""
    from pyramidinfer.cli.verify import run_verify
    from pyramidinfer.lab.verify import FLOOR, Plan

    floor = FLOOR if floor is None else floor
    chosen = policy_from(policy, keep, option or [])
    where = subject(model, text, dtype, device)
    where = replace(where, kv_memory=kv_memory, kv_dtype=kv_dtype)
    if not run_verify(where, chosen, floor, Plan(length, seconds, seed), json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a wrong command or option is one line, too."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        tell = getattr(error, "format_message", None)  # what every usage error of typer has
        if tell is None:
            raise
        print(f"error: {tell()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
