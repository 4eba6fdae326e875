"""A request inside the engine: what was asked, where it stands, what it has produced."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.text import Detokenizer
from pyramidinfer.models.intake import Intake, Sequence
from pyramidinfer.types import KVUsage, Logprob, SamplingParams, TokenIds

__all__ = ["Request"]


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of one request; only the engine changes it.

    ``cost``: the most it may need;  ``promised``: what the ledger counts for it now.
    ``prompt``: every token taken in so far (extended turns and fed answers included);
    ``output``: tokens generated since the last prompt;  ``hold``: keep the cache at the end, so
    that more tokens can be appended (``Engine.extend``).
    """

    id: int
    prompt: TokenIds
    params: SamplingParams
    max_new: int
    cost: Cost
    protect: tuple[tuple[int, int], ...] = ()
    hold: bool = False
    detokenizer: Detokenizer | None = None
    promised: Cost | None = None
    sequence: Sequence | None = None
    intake: Intake | None = None
    output: TokenIds = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    processors: Any = None
    generator: torch.Generator | None = None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    computed: list[int] = field(default_factory=list)
    kv: KVUsage | None = None
