"""``pyramidinfer serve``: the OpenAI API over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console

from pyramidinfer.cli.common import defaults_of
from pyramidinfer.config import check_whole
from pyramidinfer.engine import LLM
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Policy
from pyramidinfer.server.run import EngineDied, bind, check_connections, serve
from pyramidinfer.server.settings import ServerSettings

__all__ = ["ModelChoice", "load", "run_serve"]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, how it runs, and options of ``EngineConfig``."""

    model: str | None
    policy: Policy
    dtype: str
    device: str
    backend: str
    threads: int
    options: dict[str, Any]


def load(choice: ModelChoice) -> LLM:
    """The model, ready; the shipped one where none is named."""
    quiet_transformers()
    _set_threads(choice)
    return LLM(
        choice.model or shipped_model(),
        choice.policy,
        dtype=choice.dtype,
        device=choice.device,
        backend=choice.backend,
        **choice.options,
    )


def _set_threads(choice: ModelChoice) -> None:
    check_whole("threads", choice.threads, 0)
    if choice.threads:
        torch.set_num_threads(choice.threads)


def _check_quality(choice: ModelChoice, floor: float) -> None:
    """End with exit code 1 where the policy is surely below the floor on this model."""
    from pyramidinfer.cli.verify import run_verify
    from pyramidinfer.lab.samples import SHIPPED, Subject
    from pyramidinfer.lab.verify import Plan

    where = Subject(
        choice.model or SHIPPED,
        None,
        choice.dtype,
        choice.device,
        str(choice.options["kv_memory"]),
        choice.backend,
        choice.options.get("kv_dtype", "auto"),
    )
    _set_threads(choice)
    if not run_verify(where, choice.policy, floor, Plan(), console=Console(stderr=True)):
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
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not settings.api_keys and not settings.is_loopback:
        print(
            f"warning: {settings.host} can be reached from other machines and there is no API "
            f"key: anybody who reaches it may use the model (--api-key-file sets keys)",
            file=sys.stderr,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server is there to drain
    check_connections(settings)
    with bind(settings) as line:  # held, so that nobody takes it, and not open yet
        if floor is not None:
            _check_quality(choice, floor)
        llm = load(choice)
        defaults_of(llm, settings.generation_config)
        try:
            serve(llm, settings, line)
        except EngineDied as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        finally:
            llm.close()
