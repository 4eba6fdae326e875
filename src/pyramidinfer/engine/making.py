"""Builds requests from what a user asks for: validated, with their memory cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Protocol

import numpy as np

from pyramidinfer.cache import Table
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.checks import (
    ContextLengthError,
    check_params,
    check_prefix,
    check_prompt_logprobs,
    check_spans,
    check_stream,
    check_tokens,
)
from pyramidinfer.engine.grammar import Grammars
from pyramidinfer.engine.memory import Cost, for_samples
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.shared import Shared
from pyramidinfer.engine.text import Detokenizer, added_tokens
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.policies import Policy
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["Maker", "Spans", "cost_from_held", "costs_of", "expected_of"]

Spans = Items[tuple[int, int]]


class Cached(Protocol):
    """The cache that a request continues from."""

    @property
    def seen_len(self) -> int:
        """The number of tokens processed so far."""

    @property
    def kept(self) -> np.ndarray:
        """The number of entries ``[layers, kv_heads]``."""


class Maker:
    """Builds the requests of one engine."""

    def __init__(self, shared: Shared, end_ids: frozenset[int]) -> None:
        self.shared = shared
        self.added_tokens = added_tokens(shared.tokenizer)
        self.grammars = Grammars(shared.tokenizer, shared.runner.vocab_size, end_ids)
        self._ids = itertools.count()

    def make(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        policy: Policy,
        protect: Spans,
        hold: bool,
        on: Table | None,
        scoring: Scoring | None,
        samples: int,
        owner: str | None = None,
        adapter: Adapter | None = None,
        prefix: int = 0,
        salt: str = "",
    ) -> Request:
        """See :meth:`Engine.make`; ``policy`` is already checked."""
        shared, size = self.shared, self.shared.runner.vocab_size
        check_params(params, size, shared.tokenizer is not None)
        check_tokens(prompt, size)
        if not 1 <= samples <= shared.config.max_requests:
            raise ValueError(
                f"{samples} samples of one prompt: at least 1, and at most "
                f"max_requests={shared.config.max_requests}"
            )
        if prefix:
            check_prefix(prefix, len(prompt), params, on is not None or scoring is not None)
        max_new = self._room(prompt, params, policy, on, scoring, prefix)
        spans = check_spans(protect, len(prompt))
        cost, likely = costs_of(
            shared, policy, len(prompt), max_new, spans, on, scoring, samples, prefix
        )
        if params.min_tokens > max_new:
            raise ContextLengthError(
                f"min_tokens={params.min_tokens}: after a prompt of {len(prompt)} tokens this "
                f"model has positions for {max_new}"
            )
        if params.prompt_logprobs is not None:
            check_prompt_logprobs(policy, on is not None)
        shared.ledger.check_fits(cost, len(prompt), max_new, samples)
        ids, form = self.added_tokens, params.structured_outputs
        stops = {*params.stop_token_ids, *(ids[text] for text in params.stop if text in ids)}
        constraint = None if form is None else self.grammars.constraint(form)

        def one(params: SamplingParams) -> Request:
            return Request(
                id=next(self._ids),
                prompt=list(prompt),
                params=params,
                max_new=max_new,
                policy=policy,
                adapter=adapter,
                cost=cost,
                likely=likely,
                protect=spans,
                hold=hold,
                detokenizer=self._detokenizer(prompt, params),
                stop_ids=frozenset(stops),
                scoring=scoring,
                owner=owner,
                prefix=prefix,
                salt=salt,
                constraint=constraint.copy() if constraint else None,
            )

        request = one(params)
        for index in range(1, samples):
            seed = None if params.seed is None else (params.seed + index) % 2**63
            request.samples.append(one(replace(params, seed=seed)))
            request.samples[-1].leads = False
        return request

    def _detokenizer(self, prompt: TokenIds, params: SamplingParams) -> Detokenizer | None:
        tokenizer = self.shared.tokenizer
        if not tokenizer:
            return None
        stop = tuple(params.stop)
        return Detokenizer(tokenizer, stop, prompt, params.min_tokens, params.skip_special_tokens)

    def _room(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        policy: Policy,
        on: Table | None,
        scoring: Scoring | None,
        prefix: int,
    ) -> int:
        """The number of tokens that may be generated or are scored; ``ValueError`` if the model has
        too few positions."""
        runner, longest = self.shared.runner, self.shared.runner.max_positions
        endless = self.shared.is_endless(policy, len(prompt))
        if endless:
            held = int(on.kept.max()) if on else 0
            new = len(prompt) - (on.seen_len if on else 0)
            if prefix:
                layers = runner.layers_for(prefix + 1)
                kept = policy.forecast(prefix, 1, layers).by_head(runner.kv_heads)
                held, new = min(prefix, int(kept.max())), len(prompt) - prefix + 1
            check_stream(new, held, longest)
        elif len(prompt) >= longest + bool(scoring):
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens; this model has {longest} positions, so at "
                f"most {longest - 1} fit with one generated token"
            )
        if not scoring:
            return params.max_tokens if endless else min(params.max_tokens, longest - len(prompt))
        check_tokens(scoring.tokens, runner.vocab_size, "continuation")
        max_new = len(scoring.tokens)
        if len(prompt) + max_new - 1 > longest:  # the last one is never fed
            raise ValueError(
                f"{len(prompt)} context tokens and {max_new} scored ones exceed the model's "
                f"{longest} positions"
            )
        return max_new


def costs_of(
    shared: Shared,
    policy: Policy,
    length: int,
    max_new: int,
    spans: Spans,
    on: Cached | None = None,
    scoring: Scoring | None = None,
    samples: int = 1,
    prefix: int = 0,
) -> tuple[Cost, Cost]:
    """The most memory that a prompt of ``length`` tokens can need, and what has to be reserved
    before it begins.  ``on`` already holds its first tokens; its first ``prefix`` tokens are
    prefilled separately."""
    seen, held = (on.seen_len, on.kept) if on else (0, None)
    layers = shared.runner.layers_for(length + max_new)
    covered = len(set().union(*(range(*span) for span in spans)))
    ledger, expected = shared.ledger, expected_of(shared.config, max_new)

    def cost(generated: int) -> Cost:
        if seen < prefix:
            return ledger.prefix_cost(
                policy, prefix, length - prefix, max_new, layers, covered, generated
            )
        return ledger.cost(policy, length - seen, max_new, layers, covered, held, generated, seen)

    if scoring:
        most = likely = ledger.scoring_cost(
            policy, length - seen, max_new, layers, covered, held, seen=seen
        )
    else:
        most = cost(max_new)
        likely = most if expected == max_new else cost(expected)
    if samples > 1:
        most, likely = for_samples(most, samples), for_samples(likely, samples)
    return most, likely


def cost_from_held(shared: Shared, request: Request, samples: list[Request]) -> None:
    """Update the cost of a request whose text was compressed with one threshold for all layers: the
    entries kept per layer were unknown in advance, so the remaining need follows from those held
    now."""
    kept = request.table.kept

    def from_here(cost: Cost, generated: int) -> Cost:
        most = cost.after_prefill
        assert most is not None and most.entries is not None
        entries = np.minimum(most.entries, kept + generated)
        return cost._replace(after_prefill=shared.ledger.decode_cost(entries, most.overhead))

    cost = from_here(request.cost, request.max_new)
    likely = from_here(request.likely, expected_of(shared.config, request.max_new))
    for each in (request, *samples):
        each.cost, each.likely = cost, likely


def expected_of(config: EngineConfig, left: int) -> int:
    """The number of tokens that a request is expected to generate, out of the ``left`` that it
    may."""
    if config.admission == "reserve":
        return left
    return max(1, math.ceil(config.expected_output * left))
