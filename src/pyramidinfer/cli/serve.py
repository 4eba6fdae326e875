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
    """A model, the policy it runs with, and how the engine runs."""

    model: ModelOptions
    policy: Policy
    engine: EngineConfig

    @classmethod
    def of(cls, model: ModelOptions, engine: EngineConfig) -> ModelChoice:
        """With the policy that the options name; ``ValueError`` where it cannot be."""
        policy = model.chosen
        check_profiling(policy, engine.profile)
        return cls(model, policy, engine)


def load(choice: ModelChoice) -> LLM:
    """The model, ready; the shipped one where none is named."""
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
    """End with exit code 1 where the policy is surely below the floor on this model."""
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
    )
    model.set_threads()
    if not run_verify(where, choice.policy, floor, VerifyPlan(), console=Console(stderr=True)):
        print(
            f"error: policy {choice.policy.name!r} keeps less than {floor:g} of the full cache's "
            f"quality on this model, so nothing is served: choose another --policy or a higher "
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
            f"warning: {settings.host} can be reached from other machines and there is no API "
            f"key: anybody who reaches it may use the model (--api-key-file sets keys)",
            settings.log_format,
            logging.WARNING,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server is there to drain
    check_connections(settings)
    if settings.otel_traces:
        spans_module()
    with bind(settings) as line:  # held, so that nobody takes it, and not open yet
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
