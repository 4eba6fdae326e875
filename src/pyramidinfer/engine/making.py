"""From what a user asks to a request: checked, and its cost known."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyramidinfer.cache import Table
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.checks import check_params, check_spans, check_stream, check_tokens
from pyramidinfer.engine.memory import Cost, for_samples
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.text import Detokenizer, head_of
from pyramidinfer.policies import Policy
from pyramidinfer.types import SamplingParams, TokenIds

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["Spans", "costs_of", "expected_of", "is_endless", "is_long", "make_request",
           "readings_for", "settle_on_held"]  # fmt: skip

Spans = Items[tuple[int, int]]


def make_request(engine: Engine, prompt: TokenIds, params: SamplingParams, policy: Policy,
                 protect: Spans, hold: bool, on: Table | None, scoring: Scoring | None,
                 samples: int) -> Request:  # fmt: skip
    """See :meth:`Engine.make`."""
    adapter, longest = engine.adapter, engine.adapter.max_positions
    check_params(params, adapter.vocab_size, engine.tokenizer is not None)
    check_tokens(prompt, adapter.vocab_size)
    if not 1 <= samples <= engine.config.max_requests:
        raise ValueError(
            f"{samples} samples of one prompt: at least 1, and at most "
            f"max_requests={engine.config.max_requests}"
        )
    if policy is not engine.policy:
        policy.check(adapter.layers_for(1))
        engine.check_policy(policy)
    endless = is_endless(engine, policy, len(prompt))
    if endless:
        held = int(on.kept.max()) if on else 0
        check_stream(len(prompt) - (on.seen_len if on else 0), held, longest)
    elif len(prompt) >= longest + bool(scoring):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; this model has {longest} positions, so at "
            f"most {longest - 1} fit with one generated token"
        )
    spans = check_spans(protect, len(prompt))
    max_new = params.max_tokens if endless else min(params.max_tokens, longest - len(prompt))
    if scoring:
        check_tokens(scoring.tokens, adapter.vocab_size, "continuation")
        max_new = len(scoring.tokens)
        if len(prompt) + max_new - 1 > longest:  # the last one is never fed
            raise ValueError(
                f"{len(prompt)} context tokens and {max_new} scored ones exceed the model's "
                f"{longest} positions"
            )
    cost, likely = costs_of(
        engine, policy, len(prompt), max_new, spans, on, scoring, samples=samples
    )  # fmt: skip
    engine.ledger.check_fits(cost, len(prompt), max_new, samples)

    def one(params: SamplingParams) -> Request:
        text = None
        if engine.tokenizer:
            text = Detokenizer(engine.tokenizer, tuple(params.stop), prompt)
        return Request(
            engine.next_id(), list(prompt), params, max_new, policy, cost, likely, spans, hold,
            text, scoring=scoring,
        )  # fmt: skip

    request = one(params)
    for index in range(1, samples):
        seed = None if params.seed is None else (params.seed + index) % 2**63
        request.samples.append(one(replace(params, seed=seed)))
        request.samples[-1].leads = False
    return request


def costs_of(engine: Engine, policy: Policy, length: int, max_new: int, spans: Spans,
             on: Table | None = None, scoring: Scoring | None = None, samples: int = 1
             ) -> tuple[Cost, Cost]:  # fmt: skip
    """The most that a prompt of ``length`` tokens can need (the first ones held by ``on``), and
    what it has to be promised before it begins."""
    seen, held = (on.seen_len, on.kept) if on else (0, None)
    layers = engine.adapter.layers_for(length + max_new)
    covered = len(set().union(*(range(*span) for span in spans)))
    readings = _readings(engine, policy, range(length - seen), length, max_new)
    reread = max(map(len, readings), default=0)
    find = engine.ledger.scoring_cost if scoring else engine.ledger.cost
    most = likely = find(policy, length - seen, max_new, layers, covered, held, reread=reread)
    expected = expected_of(engine.config, max_new)
    if expected < max_new and not scoring:
        likely = engine.ledger.cost(
            policy, length - seen, max_new, layers, covered, held, expected, reread
        )  # fmt: skip
    if samples > 1:
        most, likely = for_samples(most, samples), for_samples(likely, samples)
    return most, likely


def readings_for(engine: Engine, request: Request) -> list[torch.Tensor]:
    """What is to be read behind the text that a request is about to take in, token ids each."""
    assert request.sequence is not None
    text, seen, head = request.text, request.sequence.table.seen_len, 0
    if not seen and engine.tokenizer is not None:
        begins = head_of(engine.tokenizer)
        head = len(begins) if text[: len(begins)] == begins else 0
    found = _readings(engine, request.policy, text[seen:], len(text), request.max_new, head)
    return [torch.tensor(each, device=engine.adapter.device) for each in found]


def settle_on_held(engine: Engine, request: Request, samples: list[Request]) -> None:
    """A request whose text was cut by one threshold for all layers: what each of them keeps was not
    known before, so what it needs from here on is told by what it holds."""
    assert request.sequence is not None
    kept = request.sequence.table.kept

    def from_here(cost: Cost, generated: int) -> Cost:
        most = cost.settled
        assert most is not None and most.entries is not None
        entries = np.minimum(most.entries, kept + generated)
        return cost._replace(settled=engine.ledger.settled(entries, most.beside))

    cost = from_here(request.cost, request.max_new)
    likely = from_here(request.likely, expected_of(engine.config, request.max_new))
    for each in (request, *samples):
        each.cost, each.likely = cost, likely


def _readings(engine: Engine, policy: Policy, new: Items[int], length: int, max_new: int,
              head: int = 0) -> list[TokenIds]:  # fmt: skip
    """What is read behind a text of ``length`` tokens that ends with ``new``."""
    limit = engine.adapter.streaming.limit(is_long(engine, policy, len(new), length, max_new))
    return policy.readings(new, limit - length, head)


def is_long(engine: Engine, policy: Policy, new: int, length: int, max_new: int) -> bool:
    """Whether a text of ``length`` tokens, the last ``new`` of them to be taken in, needs the long
    rotary regime: for all that is generated, or to be read again behind itself."""
    rotary, longest = engine.adapter.rotary, engine.adapter.max_positions
    if rotary.long_from is None or rotary.is_long(min(length + max_new - 1, longest)):
        return rotary.long_from is not None  # the last token is never fed
    try:
        policy.readings(range(new), rotary.long_from - length)
    except ValueError:
        return True
    return False


def expected_of(config: EngineConfig, left: int) -> int:
    """Tokens that a request is counted on to generate of those ``left`` to it."""
    if config.admission == "reserve":
        return left
    return max(1, math.ceil(config.expected_output * left))


def is_endless(engine: Engine, policy: Policy, length: int) -> bool:
    """Whether a request of this length may go past the model's positions: its policy streams,
    and what it holds fits in them."""
    adapter = engine.adapter
    if not (policy.streams and adapter.streaming.is_possible):
        return False
    layers = adapter.layers_for(length)
    kept = policy.forecast(length, length, layers).by_head(adapter.kv_heads)
    return int(kept[list(layers.governed)].max(initial=0)) < adapter.max_positions
