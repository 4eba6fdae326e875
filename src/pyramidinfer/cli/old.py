"""Options of commands that are still written out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pyramidinfer.cli.common import POLICY_NAMES

Model = Annotated[
    str | None,
    typer.Argument(help="Folder, hub id, fetched model or GGUF file. Default: the shipped model."),
]
PolicyName = Annotated[str, typer.Option(help=f"One of: {', '.join(POLICY_NAMES)}.")]
Keep = Annotated[
    float | None,
    typer.Option(
        help="Common budget of all policies: a share in (0, 1]. Default: 0.5 for pyramid and duo, "
        "the published settings for the others."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="A policy option, NAME=VALUE; may be repeated."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
KvDtype = Annotated[
    str,
    typer.Option(
        help="How the cache stores keys and values: auto (in --dtype); int8 or fp8 (about half the "
        "bytes of 16 bits); int4 (about a quarter, and less exact).",
    ),
]


def names_model(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose model (its parameter ``model``, a ``Model``) may also be given as --model."""
    option = inspect.Parameter(
        "model_option",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Option("--model", help="MODEL, by name.")],
    )

    @functools.wraps(command)
    def run(*, model: str | None, model_option: str | None, **others: Any) -> None:
        if None not in (model, model_option) and model != model_option:
            raise ValueError(
                f"two models are given, {model!r} and --model {model_option!r}; leave one out"
            )
        command(model=model if model_option is None else model_option, **others)

    signature = inspect.signature(command, eval_str=True)
    kinds = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()
    ]
    kinds.insert(1 + list(signature.parameters).index("model"), option)
    run.__signature__ = signature.replace(parameters=kinds)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in kinds}
    return run
