"""``pyramidinfer serve``, ``chat``, ``batch`` and ``generate``: their options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from pyramidinfer.cli.choices import Lora, ModelOptions, PromptOptions, SamplingOptions
from pyramidinfer.cli.common import check_drafts
from pyramidinfer.cli.config_file import read_config
from pyramidinfer.cli.fields import command
from pyramidinfer.config import EngineConfig
from pyramidinfer.options import Option, option_fields, pick
from pyramidinfer.server.settings import (
    KEYS_VARIABLE,
    SAFETY,
    ServerSettings,
    read_key_file,
    read_keys,
)

__all__ = ["add_serving"]

#: Engine options of commands that run no server: those without a panel.
ALONE = tuple(name for name, each in option_fields(EngineConfig).items() if not each.option.panel)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of ``serve`` for the time before it serves."""

    config: Annotated[
        Path | None,
        Option(
            "YAML file with option names as keys. The command line and environment variables take "
            "precedence over it.",
            callback=read_config,
            see="#configure",
        ),
    ] = None
    verify: Annotated[
        bool,
        Option(
            "Before serving, measure how much of the full cache's quality the policy keeps on this "
            "model; if it is below --verify-floor, end with exit code 1.",
            panel=SAFETY,
            see="#verify",
        ),
    ] = False
    verify_floor: Annotated[
        float | None,
        Option(
            "With --verify: the share of the full cache's quality that the policy must keep.",
            unset="0.8",
            panel=SAFETY,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        Option(
            f"File with API keys, one per line. {KEYS_VARIABLE} may hold more, separated by "
            f"commas.",
            unset="no keys: everybody may send requests",
            panel=SAFETY,
            see="#secure",
        ),
    ] = None

    metrics_key_file: Annotated[
        Path | None,
        Option(
            "File with keys that give access only to /metrics, one per line, for Prometheus.",
            unset="/metrics needs an API key if there are any",
            panel=SAFETY,
            see="#observe",
        ),
    ] = None

    def floor(self, model: ModelOptions) -> float | None:
        """The share of the full cache's quality to keep; None: it is not measured."""
        if not self.verify:
            if self.verify_floor is not None:
                raise ValueError(
                    f"--verify-floor {self.verify_floor:g} has no effect without --verify"
                )
            return None
        if model.lossless:
            raise ValueError(
                "--verify with --lossless: answers are those of the full cache, so there is "
                "nothing to "
                "measure; leave one of them out"
            )
        from pyramidinfer.lab.verify import FLOOR, check_floor

        floor = FLOOR if self.verify_floor is None else self.verify_floor
        check_floor("--verify-floor", floor)
        return floor


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options that a chat begins with."""

    system: Annotated[str | None, Option("System prompt.")] = None
    lora: Lora = None


def add_serving(app: typer.Typer) -> None:
    """Register the commands."""
    for each in (generate, serve, chat, batch):
        command(app, variables=True)(each)


def serve(
    model: ModelOptions, engine: EngineConfig, settings: ServerSettings, options: ServeOptions
) -> None:
    """Serve a model over the OpenAI API, with a web page at /."""
    from pyramidinfer.cli.serve import ModelChoice, run_serve

    choice = ModelChoice.of(model, engine)
    settings = replace(
        settings,
        api_keys=read_keys(options.api_key_file),
        metrics_keys=read_key_file(options.metrics_key_file),
    )
    if settings.compress_idle and not engine.reuse_share:
        raise ValueError(
            f"--compress-idle with --reuse-share {engine.reuse_share:g}: no conversation is held "
            f"then; give a share above 0"
        )
    run_serve(choice, settings, options.floor(model))


def chat(
    model: ModelOptions,
    engine: Annotated[EngineConfig, pick(*ALONE, reuse_share=1.0)],
    sampling: SamplingOptions,
    options: ChatOptions,
) -> None:
    """Chat with a model in the terminal; every turn reuses the cache of the previous one."""
    from pyramidinfer.cli.chat import run_chat
    from pyramidinfer.cli.serve import ModelChoice

    check_drafts(engine.draft_tokens, model.lossless)
    run_chat(ModelChoice.of(model, engine), options.system, sampling, options.lora)


def batch(
    source: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, JSONL.")],
    target: Annotated[
        Path,
        typer.Argument(
            help="File for the answers; requests that have an answer there are skipped."
        ),
    ],
    model: ModelOptions,
    engine: Annotated[EngineConfig, pick("max_requests", *ALONE, reuse_share=0.0)],
    settings: Annotated[ServerSettings, pick("model_name", "generation_config")],
) -> None:
    """Answer a file of requests; after a stop, the same command answers the remaining ones.

    Exit code 0: all requests were answered; 1: some answers are errors; 2: some have no answer.
    """
    from pyramidinfer.cli.batch import run_batch
    from pyramidinfer.cli.serve import ModelChoice

    choice = ModelChoice.of(model, engine)
    run_batch(choice, source, target, settings.model_name, settings.generation_config)


def generate(
    model: ModelOptions,
    engine: Annotated[EngineConfig, pick(*ALONE)],
    sampling: SamplingOptions,
    asked: PromptOptions,
) -> None:
    """Answer one prompt."""
    from pyramidinfer.cli.generate import run_generate
    from pyramidinfer.cli.serve import ModelChoice

    if sampling.chat_template_kwargs is not None and not asked.chat:
        raise ValueError("--chat-template-kwargs has no effect without --chat")
    check_drafts(engine.draft_tokens, model.lossless)
    choice = ModelChoice.of(model, engine)
    run_generate(choice, sampling, asked)
