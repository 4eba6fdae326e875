"""What the commands share."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:  # torch takes seconds, and --help needs none of it
    from pyramidinfer.engine import LLM
    from pyramidinfer.policies import Policy
    from pyramidinfer.types import DraftUsage

__all__ = [
    "BACKENDS",
    "DEFAULT_POLICY",
    "POLICY_NAMES",
    "DraftTokens",
    "Dtype",
    "FromModel",
    "Keep",
    "KvDtype",
    "Lossless",
    "Model",
    "NoProfile",
    "Options",
    "PipelineParallel",
    "PolicyName",
    "TemplateKwargs",
    "TensorParallel",
    "Weights",
    "check_asked",
    "check_drafts",
    "defaults_of",
    "drafts_told",
    "human_bytes",
    "json_object",
    "names_model",
    "plain_errors",
    "policy_from",
    "profiling",
    "said",
]

#: What ``--help`` tells of the registry and of the backends, which are not imported for it.
POLICY_NAMES = (
    "chunkkv",
    "duo",
    "expected_attention",
    "fastkv",
    "full",
    "h2o",
    "keydiff",
    "kvzip",
    "pyramid",
    "pyramidinfer",
    "pyramidkv",
    "rkv",
    "scissorhands",
    "snapkv",
    "streaming_llm",
    "tova",
    "triattention",
)
BACKENDS = ("cpu", "reference", "triton")
DEFAULT_POLICY = "pyramid"

#: What each extra brings.
EXTRAS = {
    "server": ("fastapi", "httpx", "llguidance", "prometheus_client", "pydantic", "uvicorn"),
    "lab": ("matplotlib", "scipy"),
    "ray": ("ray",),
}

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
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Keep everything and say what policy full says: --policy and --keep (a tenth by "
        "default) choose what is read to guess tokens ahead.",
    ),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        help="Lossless requests: tokens guessed in every step; default: as many as pay by what "
        "is measured."
    ),
]
NoProfile = Annotated[
    bool,
    typer.Option(
        "--no-profile",
        help="For pyramid, duo and triattention: do not measure what the model's heads are like; "
        "only a profile that is known already is used.",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        help="Processes, each on a device of its own, that split every layer; --kv-memory is each "
        "one's.",
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        "--pipeline-parallel-size",
        help="Stages that the layers are dealt to, each of --tensor-parallel-size processes.",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
KvDtype = Annotated[
    str,
    typer.Option(
        help="How the cache stores keys and values: auto (in --dtype); int8 or fp8 (about half the "
        "bytes of 16 bits); int4 (about a quarter, and less exact).",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        help="How the weights of linears are stored: auto (in --dtype), int8 or int4 (about half "
        "or a third of the bytes of 16 bits); C++ kernels only.",
    ),
]
FromModel = Annotated[
    str,
    typer.Option(
        "--generation-config",
        help="auto: what is not said about sampling is as the model's generation_config.json "
        "says; none: it is not.",
    ),
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(help='For the chat template, a JSON object such as {"enable_thinking": false}.'),
]


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object that an option gives; ``ValueError`` where it gives another thing."""
    try:
        found = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {text!r:.60} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{option} {text!r:.60} is not a JSON object")
    return found


def said(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def check_asked(asked: Mapping[str, Any], generation_config: str) -> None:
    """``ValueError`` for options of sampling that cannot be, before anything is loaded."""
    from pyramidinfer.config import check_choice
    from pyramidinfer.types import SamplingParams

    SamplingParams(**asked)
    check_choice("--generation-config", generation_config, ("auto", "none"))


def defaults_of(llm: LLM, generation_config: str) -> dict[str, Any]:
    """The model's sampling defaults, told on standard error; none where they are switched off."""
    found = llm.sampling_defaults if generation_config == "auto" else {}
    if found:
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        print(
            f"sampling defaults of the model: {shown} (its generation_config.json; "
            f"--generation-config none switches them off)",
            file=sys.stderr,
        )
    return found


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


@contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; Ctrl-C leaves what is done and exits 130.

    A ``RuntimeWarning`` (a slow fallback, say) is one line, told once.
    """
    try:
        with _plain_warnings():
            yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if not getattr(error, "is_told", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(
            f"error: this command needs {package}, which is not installed: "
            f"pip install 'pyramidinfer[{extra}]'",
            file=sys.stderr,
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        print(f"\nstopped{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _plain_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        show, told = warnings.showwarning, set()

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RuntimeWarning):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.add(str(message))
                print(f"warning: {message}", file=sys.stderr)

        warnings.showwarning = tell
        yield


def policy_from(
    name: str, keep: float | None, options: list[str], lossless: bool = False
) -> Policy:
    """A policy from ``--policy``, ``--keep``, ``--option NAME=VALUE`` and ``--lossless``."""
    from pyramidinfer.policies.lossless import choose_policy
    from pyramidinfer.policies.registry import parse_options

    values = parse_options(name, options)
    if keep is not None and "keep" in values:
        raise ValueError(f"keep is given twice: --keep {keep} and --option keep={values['keep']}")
    return choose_policy(name, values.pop("keep", keep), lossless, **values)


def check_drafts(draft_tokens: int | None, lossless: bool) -> None:
    """``ValueError`` for ``--draft-tokens`` where no request can be lossless."""
    if draft_tokens is not None and not lossless:
        raise ValueError(
            f"--draft-tokens {draft_tokens} has no effect without --lossless; give both or neither"
        )


def profiling(policy: Policy, no_profile: bool) -> bool:
    """Whether a head profile may be measured; ``ValueError`` where nobody asks for one."""
    from pyramidinfer.policies.base import asks_for_profile

    if no_profile and not asks_for_profile(policy):
        raise ValueError(
            f"--no-profile has no effect: policy {policy.name!r} asks for no head profile of the "
            f"model; leave it out"
        )
    return not no_profile


def drafts_told(drafts: DraftUsage) -> str:
    """What a lossless answer's guesses did, in a few words."""
    if not drafts.verifications:
        return "lossless, nothing drafted"
    return (
        f"lossless, {drafts.accepted} of {drafts.drafted} drafts accepted, "
        f"{drafts.tokens_per_verification:.1f} tokens a verification"
    )


def human_bytes(count: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
