"""Functions that the commands share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from pyramidinfer.engine import LLM
    from pyramidinfer.policies import Policy
    from pyramidinfer.types import DraftUsage

__all__ = [
    "BACKENDS",
    "DEFAULT_POLICY",
    "POLICY_NAMES",
    "check_asked",
    "check_drafts",
    "check_profiling",
    "defaults_of",
    "drafts_told",
    "human_bytes",
    "plain_errors",
    "policy_from",
]

#: Names of policies and backends for ``--help``, which does not import them.
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

#: The packages of each extra.
EXTRAS = {
    "server": (
        "fastapi",
        "httpx",
        "llguidance",
        "prometheus_client",
        "pydantic",
        "uvicorn",
        "yaml",
    ),
    "lab": ("matplotlib", "scipy"),
    "ray": ("ray",),
}


def check_asked(asked: Mapping[str, Any], generation_config: str) -> None:
    """``ValueError`` for invalid sampling options, before anything is loaded."""
    from pyramidinfer.config import check_choice
    from pyramidinfer.types import SamplingParams

    SamplingParams(**asked)
    check_choice("--generation-config", generation_config, ("auto", "none"))


def defaults_of(llm: LLM, generation_config: str, log_format: str = "text") -> dict[str, Any]:
    """The model's sampling defaults, printed to standard error; none if they are switched off."""
    from pyramidinfer.server.logs import announce

    found = llm.sampling_defaults if generation_config == "auto" else {}
    if found:
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        announce(
            f"sampling defaults of the model: {shown} (its generation_config.json; "
            f"--generation-config none ignores them)",
            log_format,
        )
    return found


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print a user's error as one line and exit with code 2; Ctrl-C exits with code 130.

    A ``RuntimeWarning`` (such as a slow fallback) is one line, printed once.
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
    """``ValueError`` for ``--draft-tokens`` if no request can be lossless."""
    if draft_tokens is not None and not lossless:
        raise ValueError(
            f"--draft-tokens {draft_tokens} has no effect without --lossless; set both or neither"
        )


def check_profiling(policy: Policy, profile: bool) -> None:
    """``ValueError`` for ``--no-profile`` if the policy needs no head profile."""
    from pyramidinfer.policies.base import asks_for_profile

    if not profile and not asks_for_profile(policy):
        raise ValueError(
            f"--no-profile has no effect: policy {policy.name!r} needs no head profile of the "
            f"model; leave it out"
        )


def drafts_told(drafts: DraftUsage) -> str:
    """The drafts of a lossless answer, in a few words."""
    if not drafts.verifications:
        return "lossless, nothing drafted"
    return (
        f"lossless, {drafts.accepted} of {drafts.drafted} drafts accepted, "
        f"{drafts.tokens_per_verification:.1f} tokens per verification"
    )


def human_bytes(count: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
