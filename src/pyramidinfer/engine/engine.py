"""The engine: schedule → run → commit, one step at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import nn

from pyramidinfer.attention import select_backend
from pyramidinfer.cache import Pool, Ring, Table
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import answers
from pyramidinfer.engine.checks import (
    check_count,
    check_plan,
    check_spans,
    check_stream,
    check_tokens,
)
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.sampler import prepare, sample
from pyramidinfer.engine.scheduler import Plan, Scheduler
from pyramidinfer.engine.text import Detokenizer
from pyramidinfer.engine.undo import Undo
from pyramidinfer.models import Adapter, Intake
from pyramidinfer.models.adapter import Stepped
from pyramidinfer.models.intake import Batch, Sequence
from pyramidinfer.policies import Policy
from pyramidinfer.types import KVUsage, RequestMetrics, RequestOutput, SamplingParams, TokenIds

__all__ = ["Engine"]

Spans = Items[tuple[int, int]]


class Engine:
    """Many requests, one model, one pool.  Not thread-safe: one caller steps it.

    ``add`` queues a request, ``step`` advances all of them and returns those that ended,
    ``abort`` ends one at once.  ``ValueError`` for a request that can never be served.

    ``model``: a transformers model, or an ``Adapter`` that engines share, whose backend and chunk
    of prefill then hold.
    """

    def __init__(self, model: nn.Module | Adapter, policy: Policy, config: EngineConfig,
                 tokenizer: Any = None, backend: str = "auto", *, own: bool = False
                 ) -> None:  # fmt: skip
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        if isinstance(model, Adapter):
            self.adapter = model
        else:
            chosen = select_backend(backend, next(model.parameters()).device)
            self.adapter = Adapter(model, chosen, config.prefill_chunk, own=own)
        device = self.adapter.device
        check_plan(self.adapter, policy, config, device)
        self.pool = Pool(
            self.adapter.group_specs(), config.budget, config.page_size, device,
            scores=policy.uses_scores, poison=config.poison, kernels=self.adapter.backend.kernels,
        )  # fmt: skip
        self.ledger = Ledger(self.pool, self.adapter)
        self.scheduler = Scheduler(config, self.ledger, self.adapter.depth)
        self.end_ids = self.adapter.end_ids
        self.peak_in_flight = 0
        self._ids = itertools.count()

    # --- requests -----------------------------------------------------------------------------

    def make(self, prompt: TokenIds, params: SamplingParams, *, protect: Spans = (),
             hold: bool = False, on: Table | None = None, scoring: Scoring | None = None
             ) -> Request:  # fmt: skip
        """Check a request and build it, without queueing it.

        ``protect``: spans ``(start, stop)`` of prompt positions that no policy may drop;
        ``on``: a cache that already holds the beginning of the prompt;  ``scoring``: a
        continuation to score instead of generating.
        """
        adapter, longest = self.adapter, self.adapter.max_positions
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling={params!r} must be SamplingParams")
        check_tokens(prompt, adapter.vocab_size)
        seen, held = (on.seen_len, on.kept) if on else (0, None)
        is_endless = self._is_endless(len(prompt))
        if is_endless:
            check_stream(len(prompt) - seen, int(on.kept.max()) if on else 0, longest)
        elif len(prompt) >= longest + bool(scoring):
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; this model has {longest} positions, so at "
                f"most {longest - 1} fit with one generated token"
            )
        spans = check_spans(protect, len(prompt))
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; none was loaded (use stop_token_ids)")
        for token in params.stop_token_ids:
            if token >= adapter.vocab_size:
                raise ValueError(
                    f"stop_token_ids: {token} is outside the vocabulary of {adapter.vocab_size}"
                )
        max_new = params.max_tokens if is_endless else min(params.max_tokens, longest - len(prompt))
        if scoring:
            check_tokens(scoring.tokens, adapter.vocab_size, "continuation")
            max_new = len(scoring.tokens)
            if len(prompt) + max_new - 1 > longest:  # the last one is never fed
                raise ValueError(
                    f"{len(prompt)} context tokens and {max_new} scored ones exceed the model's "
                    f"{longest} positions"
                )
        layers = adapter.layers_for(len(prompt) + max_new)
        covered = len(set().union(*(range(*span) for span in spans)))
        cost_of = self.ledger.scoring_cost if scoring else self.ledger.cost
        cost = cost_of(self.policy, len(prompt) - seen, max_new, layers, covered, held)
        self.ledger.check_fits(cost, len(prompt), max_new)
        text = Detokenizer(self.tokenizer, tuple(params.stop)) if self.tokenizer else None
        request = Request(next(self._ids), list(prompt), params, max_new, cost, spans, hold, text)
        request.scoring = scoring
        return request

    def add(self, prompt: TokenIds, params: SamplingParams, *, protect: Spans = (),
            hold: bool = False) -> Request:  # fmt: skip
        """Queue a request; its progress can be read off the returned object."""
        request = self.make(prompt, params, protect=protect, hold=hold)
        self.submit(request)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request made before."""
        prepare(request, self.adapter.device)
        self.scheduler.waiting.append(request)

    def extend(self, request: Request, tokens: TokenIds, params: SamplingParams, *,
               protect: Spans = (), hold: bool = False) -> Request:  # fmt: skip
        """Go on with a held request: ``tokens`` (a further turn) join its compressed cache.

        Its own last answer is part of the text, and ``protect`` spans are positions of the whole
        text.  The old request object is used up.
        """
        old = request.sequence
        if not request.hold or old is None or request.finish_reason is None:
            raise ValueError(f"request {request.id} holds no cache; add it with hold=True")
        check_tokens(tokens, self.adapter.vocab_size)
        text = request.prompt + request.output + list(tokens)
        turn = self.make(text, params, protect=[*request.protect, *protect], hold=hold,
                         on=old.table)  # fmt: skip
        reached = len(text) + turn.max_new - 1
        if self._is_endless(len(text)):  # its rotary positions begin again
            limit = self.adapter.streaming.limit(old.is_long)
            check_stream(len(tokens) + 1, int(old.table.kept.max()), limit)
        elif self.adapter.rotary.is_long(reached) and not old.is_long:
            raise ValueError(
                "the text outgrows the rotary range its cache was made for; start a new request"
            )
        turn.sequence, request.sequence, request.hold = old, None, False
        turn.promised, request.promised = request.promised, None
        self.submit(turn)
        return turn

    def truncate(self, request: Request, seen_len: int) -> None:
        """Forget a held request's tokens from position ``seen_len`` on (a rejected draft).

        ``ValueError`` where layers with a sliding window have already let go of entries that
        would be seen again.
        """
        sequence = request.sequence
        if not request.hold or sequence is None or request.finish_reason is None:
            raise ValueError(f"request {request.id} holds no cache; add it with hold=True")
        table, seen_len = sequence.table, check_count("seen_len", seen_len)
        for layer, shape in enumerate(self.adapter.shapes):
            if shape.window is None or sequence.layers.governed[layer] or seen_len < 1:
                continue
            oldest = int(self.pool.positions(table, layer).min())
            if oldest > max(0, seen_len - shape.window + 1):
                raise ValueError(
                    f"cannot go back to {seen_len} tokens: layer {layer} keeps its window only, "
                    f"from position {oldest} on"
                )
        self.pool.truncate(table, seen_len)
        table.state = self.policy.truncated(table.state, [int(n) for n in table.kept])
        if self.policy.streams:
            self.adapter.streaming.forget(table)
            self.adapter.streaming.close_gaps(self.pool, sequence)
        request.prompt, request.output = (request.prompt + request.output)[:seen_len], []
        request.protect = tuple(
            (start, min(stop, seen_len)) for start, stop in request.protect if start < seen_len
        )
        self.ledger.promise(request, self.ledger.held(table))

    def release(self, request: Request) -> None:
        """Give a held request's cache back."""
        if request.finish_reason is not None and request.sequence is not None:
            self.pool.release(request.sequence.table)
            self.ledger.promise(request, None)
            request.sequence, request.hold = None, False

    def abort(self, request: Request) -> None:
        """End a request at once; its pages are free when this returns."""
        if request.finish_reason is None:
            self.scheduler.remove(request)
            request.hold = False
            self._end(request, "abort")

    # --- stepping -----------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Advance everything by one step; returns the requests that ended.

        If anything is raised inside (Ctrl-C included), what the step had begun is undone and
        requests go on as if it had not been tried; only one that cannot be taken back (its
        entries were being evicted, or it extends a cache) is aborted.
        """
        for request in self.scheduler.admit():
            try:
                self.begin(request)
            except BaseException:
                self.abort(request)
                raise
        if self.scheduler.waiting and not self.scheduler.in_flight:
            raise ValueError(
                f"{self.ledger.bytes} bytes of kv_memory are held by finished requests, and the "
                f"next one needs {self.scheduler.waiting[0].cost.bytes} of {self.pool.budget}: "
                f"release some of them"
            )
        plan = self.scheduler.plan()
        self.peak_in_flight = max(self.peak_in_flight, self.scheduler.in_flight)
        undo = Undo(self, plan)
        try:
            stepped = self.adapter.forward(self.pool, self._batch(plan))
            undo.ran = True
            return self._commit(plan, stepped, undo.committed)
        except BaseException:
            undo.roll_back()
            raise

    @property
    def peak_bytes(self) -> int:
        """The most that all requests together ever held, pages and everything beside them."""
        return self.pool.peak_bytes

    def check(self) -> None:
        """``pool.check()``, and that nothing is promised when nothing runs."""
        self.pool.check()
        if self.scheduler.idle and not self.pool.tables:
            assert self.ledger.bytes == 0 and not self.ledger.pages.any(), "a promise is left"

    def begin(self, request: Request) -> None:
        """Give an admitted request its table and put its prompt at the first layer."""
        request.started = time.monotonic()
        adapter, device = self.adapter, self.adapter.device
        longest = len(request.prompt) + request.max_new
        layers = adapter.layers_for(longest)
        if request.sequence is None:
            table = self.pool.new_table(len(request.prompt))
            table.state = self.policy.start(layers)
            reached = min(longest - 1, adapter.max_positions)  # the last token is never fed
            is_long = adapter.rotary.is_long(reached)
            request.sequence = Sequence(
                table, self.policy, layers, torch.zeros(0, dtype=torch.bool), is_long
            )
        sequence = request.sequence
        sequence.layers = layers
        scored = len(request.scoring.tokens) if request.scoring else 0
        size = len(request.prompt) + scored
        sequence.protected = torch.arange(size, device=device) >= len(request.prompt)
        for start, stop in request.protect:
            sequence.protected[start:stop] = True
        table, shape = sequence.table, adapter.shapes[0]
        new = request.prompt[table.seen_len :]
        if self.policy.streams:
            adapter.streaming.make_room(self.pool, sequence, len(new))
        rows = self.policy.ring(len(new) + int(table.kept[layers.first]), request.max_new)
        if rows and not request.scoring:
            table.ring = Ring.empty(
                adapter.depth, rows, shape.heads, shape.key_dim, adapter.dtype, device
            )
        forecast = self.policy.forecast(len(new), request.max_new, layers)
        extra = int(sequence.protected.sum()) - scored
        reach = [min(len(new), count + extra) for count in forecast.reach]
        tokens = torch.tensor(new, device=device)
        request.intake = Intake(sequence, tokens, table.seen_len, reach)

    def _batch(self, plan: Plan) -> Batch:
        running = [each.sequence for each in plan.decode if each.sequence is not None]
        tokens = [each.output[-1] for each in plan.decode]
        return Batch(
            running, torch.tensor(tokens, dtype=torch.int64, device=self.adapter.device),
            [work for _, work in plan.prefill],
        )  # fmt: skip

    def _commit(self, plan: Plan, stepped: Stepped, committed: set[Request]) -> list[Request]:
        """Sample a token for every request that got logits; end those that are done."""
        begun = [request for request, work in plan.prefill if work.intake.finished]
        likeliest = stepped.logits.argmax(-1).tolist()
        broken = stepped.logits.isnan().any(-1).tolist()
        ended = []
        following = 0
        for index, request in enumerate(plan.decode + begun):
            assert request.sequence is not None
            row, following = following, following + request.rows
            if index < len(plan.decode):
                assert stepped.decoding is not None
                self.adapter.settle(self.pool, request.sequence, stepped.decoding, row)
            if request.scoring is not None:
                request.scoring.add(stepped.logits[row:following], likeliest[row:following])
                committed.add(request)
                if self._score_on(request, request.scoring):
                    ended.append(request)
                continue
            if broken[row]:
                self.scheduler.remove(request)
                self._end(request, "error")
                ended.append(request)
                continue
            token, logprob = sample(stepped.logits[row], request, likeliest[row])
            request.output.append(token)
            committed.add(request)
            if logprob is not None:
                request.logprobs.append(logprob)
            if request.intake is not None:
                request.first_token = time.monotonic()
                request.computed, request.intake = request.intake.computed, None
                self.ledger.promise(request, request.cost.settled)
                self.scheduler.to_running(request)
            reason = self._reason(request, token)
            if reason:
                self.scheduler.remove(request)
                self._end(request, reason)
                ended.append(request)
        return ended

    def _score_on(self, request: Request, scoring: Scoring) -> bool:
        """Once the context is in, score the continuation on top of it; True when that is done."""
        assert request.sequence is not None and request.intake is not None
        table = request.sequence.table
        if request.kv is None:  # the context is in, nothing else yet
            request.first_token, request.computed = time.monotonic(), request.intake.computed
            request.kv = self.usage(request)
            rest = torch.tensor(scoring.tokens[:-1], dtype=torch.int64, device=self.adapter.device)
            if len(rest):
                reach = [len(rest)] * self.adapter.depth
                request.intake = Intake(request.sequence, rest, table.seen_len, reach, True)
                return False
        request.intake = None
        self.scheduler.remove(request)
        self._end(request, "length")
        return True

    def _reason(self, request: Request, token: int) -> str | None:
        """Why a request ends with ``token``, or None."""
        params = request.params
        if token in params.stop_token_ids or (token in self.end_ids and not params.ignore_eos):
            return "stop"
        if params.stop and request.detokenizer:
            request.detokenizer.update(request.output)
            if request.detokenizer.stopped:
                return "stop"
        return "length" if len(request.output) >= request.max_new else None

    def _end(self, request: Request, reason: str) -> None:
        """Count what the request used, then give its pages back (or hold them)."""
        request.finish_reason, request.ended = reason, time.monotonic()
        request.kv = self.usage(request)
        if request.detokenizer and not request.detokenizer.stopped:
            request.detokenizer.update(request.output, last=True)
        if request.intake is not None:
            request.computed, request.intake = request.intake.computed, None
        if request.hold and request.sequence is not None:
            self.ledger.promise(request, self.ledger.held(request.sequence.table))
            return
        if request.sequence is not None:
            self.pool.release(request.sequence.table)
            request.sequence = None
        self.ledger.promise(request, None)

    # --- answers ------------------------------------------------------------------------------

    def usage(self, request: Request) -> KVUsage:
        """What the request's cache is now (or was, once it has ended)."""
        return answers.usage(self.pool, self.adapter, request)

    def metrics(self, request: Request) -> RequestMetrics:
        """What the request took so far."""
        return answers.metrics(self.adapter, request)

    def output(self, request: Request) -> RequestOutput:
        """The request's answer so far."""
        return answers.output(self.pool, self.adapter, request)

    def _is_endless(self, length: int) -> bool:
        """Whether a request of this length may go past the model's positions: its policy streams,
        and what it holds fits in them."""
        adapter = self.adapter
        if not (self.policy.streams and adapter.streaming.is_possible):
            return False
        layers = adapter.layers_for(length)
        kept = zip(self.policy.forecast(length, length, layers).kept, layers.governed, strict=True)
        return max((n for n, governed in kept if governed), default=0) < adapter.max_positions
