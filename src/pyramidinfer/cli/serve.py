"""``pyramidinfer serve``: the OpenAI API over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch

from pyramidinfer.config import check_whole
from pyramidinfer.engine import LLM
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Policy
from pyramidinfer.server.run import bind, serve
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
    check_whole("threads", choice.threads, 0)
    if choice.threads:
        torch.set_num_threads(choice.threads)
    return LLM(
        choice.model or shipped_model(), choice.policy, dtype=choice.dtype, device=choice.device,
        backend=choice.backend, **choice.options,
    )  # fmt: skip


def run_serve(choice: ModelChoice, settings: ServerSettings) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
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
    with bind(settings) as line:
        serve(load(choice), settings, line)
