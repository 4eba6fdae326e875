"""``pyramidinfer serve``: the OpenAI API over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import asdict
from typing import NamedTuple

import typer
from rich.console import Console

from pyramidinfer.cli.choices import ModelOptions
from pyramidinfer.cli.common import check_profiling, defaults_of
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import LLM
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Policy
from pyramidinfer.server.logs import announce, set_up
from pyramidinfer.server.run import EngineDied, bind, check_connections, serve
from pyramidinfer.server.service import spans_module
from pyramidinfer.server.settings import ServerSettings

__all__ = ["ModelChoice", "load", "run_serve"]


class ModelChoice(NamedTuple):
    """A model, its policy, and the engine's settings."""

    model: ModelOptions
    policy: Policy
    engine: EngineConfig

    @classmethod
    def of(cls, model: ModelOptions, engine: EngineConfig) -> ModelChoice:
        """With the policy of the options; ``ValueError`` if that is invalid."""
        policy = model.chosen
        check_profiling(policy, engine.profile)
        return cls(model, policy, engine)


def load(choice: ModelChoice) -> LLM:
    """The loaded model; the shipped one if none is named."""
    quiet_transformers()
    where = choice.model
    where.set_threads()
    return LLM(
        where.model or shipped_model(),
        choice.policy,
        dtype=where.dtype,
        device=where.device,
        backend=where.backend,
        **asdict(choice.engine),
    )


def _check_quality(choice: ModelChoice, floor: float) -> None:
    """End with exit code 1 if the policy is significantly below the floor on this model."""
    from pyramidinfer.cli.verify import run_verify
    from pyramidinfer.lab.plans import VerifyPlan
    from pyramidinfer.lab.samples import SHIPPED, Subject

    model, engine = choice.model, choice.engine
    where = Subject(
        model.model or SHIPPED,
        None,
        model.dtype,
        model.device,
        str(engine.kv_memory),
        model.backend,
        engine.kv_dtype,
        engine.weights,
    )
    model.set_threads()
    if not run_verify(where, choice.policy, floor, VerifyPlan(), console=Console(stderr=True)):
        print(
            f"error: policy {choice.policy.name!r} keeps less than {floor:g} of the full cache's "
            f"quality on this model, so the server does not start: choose another --policy or a "
            f"higher "
            f"--keep, or lower --verify-floor",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def run_serve(choice: ModelChoice, settings: ServerSettings, floor: float | None = None) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C.

    floor : verify the policy first; below this share of the full cache's quality, do not serve.
    """
    set_up(settings.log_level, settings.log_format)
    if not settings.api_keys and not settings.is_loopback:
        announce(
            f"warning: {settings.host} can be reached from other machines, and there are no "
            f"API keys: anybody who reaches it can use the model (--api-key-file sets keys)",
            settings.log_format,
            logging.WARNING,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server can drain
    check_connections(settings)
    if settings.otel_traces:
        spans_module()
    with bind(settings) as line:  # bound, so that no other process takes the port, but not open yet
        if floor is not None:
            _check_quality(choice, floor)
        llm = load(choice)
        defaults_of(llm, settings.generation_config, settings.log_format)
        try:
            serve(llm, settings, line)
        except EngineDied as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        finally:
            llm.close()
