"""State that all parts of the engine share: the model, its memory and the config."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache import Copier, Pool, Ring
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.checks import check_ahead
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.readings import is_long, readings
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.sampler import read_prompt
from pyramidinfer.engine.text import head_of
from pyramidinfer.models import ModelRunner, Prefill
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds, View

__all__ = ["Shared"]

#: Length of the text in tokens for which a policy's needs are checked at the start.
TEXT = 1000


@dataclass(eq=False)
class Shared:
    """Passed to the parts that admit, build, hold or start requests; it makes no decisions."""

    runner: ModelRunner
    pool: Pool
    ledger: Ledger
    config: EngineConfig
    tokenizer: Any
    copier: Copier

    def check_policy(self, policy: Policy) -> None:
        """``ValueError`` if a request cannot use this policy with this model and pool."""
        policy.check(self.runner.layers_for(1))
        check_ahead(policy, self.config)
        if policy.uses_scores and self.pool.groups[0].scores is None:
            raise ValueError(
                f"policy {policy.name!r} keeps a running score for each entry, and this pool "
                f"was made without: start the engine with slot_scores=True (serve --slot-scores)"
            )
        if policy.streams and not self._rotates_everywhere():
            raise ValueError(
                f"policy {policy.name!r} needs a layer with rotary positions and without a sliding "
                f"window in every stage, and one of these has none: "
                f"pipeline_layers={self.runner.stages.words}; give others, or fewer stages"
            )

        self._check_scores(policy)

    def _check_scores(self, policy: Policy) -> None:
        """``ValueError`` for scores that ranks which split layers cannot compute."""
        runner = self.runner
        layers, length = runner.layers_for(TEXT), TEXT
        state, lens = policy.start(layers), (length,) * runner.kv_heads
        for layer in range(layers.count if runner.ranks.size > 1 else 0):
            view = View("prefill", layer, layers, length, length, lens, length, length, state)
            runner.ranks.check(policy.needs(view))

    def _rotates_everywhere(self) -> bool:
        """Whether each stage has a layer whose keys a streaming request rotates."""
        runner, streaming = self.runner, self.runner.streaming
        if runner.stages.size == 1 or not streaming.is_possible:
            return True
        unbounded = [layer for layer in streaming.layers if runner.shapes[layer].window is None]
        wanted = set(unbounded or streaming.layers)
        return all(wanted.intersection(layers) for layers in runner.stages.layers)

    def release(self, request: Request) -> None:
        """Free a request's memory in the pool, and its reservation."""
        if request.cache in self.pool.tables:
            self.pool.release(request.table)
        request.cache = request.preempted = None
        self.ledger.reserve(request, None)

    def is_endless(self, policy: Policy, length: int) -> bool:
        """Whether a request of this length may go past the model's positions: its policy streams,
        and what it holds fits in them."""
        runner = self.runner
        if not (policy.streams and runner.streaming.is_possible):
            return False
        layers = runner.layers_for(length)
        kept = policy.forecast(length, length, layers).by_head(runner.kv_heads)
        return int(kept[list(layers.governed)].max(initial=0)) < runner.max_positions

    def start(self, request: Request) -> None:
        """Give an admitted request its table, and put its prompt at the first layer: its prefix
        only, if it has one that is not prefilled yet."""
        if request.times.started is None:
            request.times.started = time.monotonic()
        runner, device, length = self.runner, self.runner.device, len(request.prompt)
        text, until, max_new = request.text, length, request.max_new
        if (request.cache.seen_len if request.cache else 0) < request.prefix:
            text, until, max_new = text[: request.prefix], request.prefix, 1
        layers = request.layers = runner.layers_for(until + max_new)
        request.draft_view = None
        if request.cache is None:
            request.cache = self.pool.new_table(len(request.text))
            request.cache.state = request.policy.start(layers)
            request.is_long = is_long(runner, request.policy, length, length, request.max_new)
        request.table.away = None if request.away is None else request.away.anew()
        scored = len(request.scoring.tokens) if request.scoring else 0
        request.protected = torch.arange(length + scored, device=device) >= length
        for start, stop in request.protect:
            request.protected[start:stop] = True
        table, shape = request.table, runner.ranks.own(runner.shapes[0])
        new = text[table.seen_len :]
        if request.policy.streams:
            table.wait()
            runner.streaming.make_room(self.pool, request, len(new))
        rows = request.policy.ring(len(new) + int(table.longest[layers.first]), max_new)
        if rows and not request.scoring:
            table.ring = Ring.empty(
                runner.depth, rows, shape.heads, shape.key_dim, runner.dtype, device
            )
        forecast = request.policy.forecast(len(new), max_new, layers)
        extra = int(request.protected.sum()) - scored
        reach = [min(len(new), count + extra) for count in forecast.reach]
        reader = None
        if request.prompt_top is not None and not request.output:
            reader = partial(read_prompt, request.prompt, request.prompt_top)
        request.prefill = Prefill(
            request,
            torch.tensor(new, device=device),
            table.seen_len,
            reach,
            reader is not None,
            reader,
            readings=self.readings(request.policy, text, table.seen_len, max_new),
        )

    def start_again(self, request: Request) -> None:
        """Restart an interrupted prompt whose cache was empty before."""
        table = request.table
        self.pool.retract(table, np.zeros_like(table.kept))
        table.seen_len, table.transient_bytes = 0, 0
        self.pool.note_overhead(table)
        table.state = request.policy.start(request.layers)
        self.start(request)

    def readings(self, policy: Policy, text: TokenIds, seen: int, max_new: int) -> list[Tensor]:
        """Token sequences to read after a text of which all but the first ``seen`` tokens are about
        to be prefilled."""
        if not policy.reads_again:
            return []
        head = 0
        if not seen and self.tokenizer is not None:
            begins = head_of(self.tokenizer)
            head = len(begins) if text[: len(begins)] == begins else 0
        found = readings(self.runner, policy, text[seen:], len(text), max_new, head)
        return [torch.tensor(each, device=self.runner.device) for each in found]
