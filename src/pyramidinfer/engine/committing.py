"""After a pass: samples tokens from the logits, and advances or ends requests."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from pyramidinfer.engine import answers
from pyramidinfer.engine.drafting import Drafter, Drafts
from pyramidinfer.engine.making import cost_from_held, costs_of
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.reuse import Conversations
from pyramidinfer.engine.sampler import sample
from pyramidinfer.engine.scheduler import Plan, Scheduler
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models import Prefill
from pyramidinfer.models.runner import Stepped
from pyramidinfer.types import TokenIds

__all__ = ["Committer", "Rows"]


class Rows(NamedTuple):
    """Logits ``[rows, vocab]``, the likeliest token of each row, and whether it is not finite."""

    logits: Tensor
    likeliest: TokenIds
    broken: list[bool]

    def part(self, first: int, end: int) -> Rows:
        """Some of the rows."""
        return Rows(self.logits[first:end], self.likeliest[first:end], self.broken[first:end])


class Committer:
    """Commits the steps of one engine, and ends its requests.  ``end_ids``: the model's end
    tokens."""

    def __init__(
        self,
        shared: Shared,
        scheduler: Scheduler,
        conversations: Conversations,
        drafter: Drafter,
        end_ids: frozenset[int],
    ) -> None:
        self.shared, self.scheduler, self.conversations = shared, scheduler, conversations
        self.drafter, self.end_ids = drafter, end_ids

    def commit(self, plan: Plan, stepped: Stepped, committed: set[Request]) -> list[Request]:
        """Sample a token for every request that has logits; end those that are done."""
        highest, best = stepped.logits.max(-1)  # max treats NaN as the highest number
        every = Rows(stepped.logits, best.tolist(), (~highest.isfinite()).tolist())
        ended, following = [], 0
        for index, (request, count) in enumerate(plan.given):
            first, following = following, following + count
            if request.ended:  # ended from outside while the step ran
                continue
            if request in plan.drafts:
                fed = range(first, following)
                ended += self._verify(request, plan.drafts[request], stepped, fed, every, committed)
                continue
            if index < len(plan.decode):
                self.advance(request, stepped, first)
            ended += self._answer(request, every.part(first, following), committed)
        return ended

    def _verify(
        self,
        request: Request,
        drafts: Drafts,
        stepped: Stepped,
        fed: range,
        every: Rows,
        committed: set[Request],
    ) -> list[Request]:
        """Sample tokens from the rows that a request has ``fed``, as long as they equal its drafts;
        returns the request if it ended."""
        assert stepped.decoding is not None
        chosen, reason = 0, None
        try:
            for row in fed:
                reason = self.choose(request, every.part(row, row + 1))
                chosen += 1
                committed.add(request)
                if reason or chosen == len(fed) or request.output[-1] != drafts.tokens[chosen - 1]:
                    break
        finally:
            if chosen:
                self.shared.runner.accept(self.shared.pool, request, stepped.decoding, fed, chosen)
        self.drafter.learn(request, drafts, chosen - 1)
        if not reason:
            return []
        self.end(request, reason)
        return [request]

    def advance(self, request: Request, stepped: Stepped, row: int) -> None:
        """Commit a decoding request's token, and evict entries that are due."""
        assert stepped.decoding is not None
        self.shared.runner.commit(self.shared.pool, request, stepped.decoding, row)

    def _answer(self, request: Request, rows: Rows, committed: set[Request]) -> list[Request]:
        """Handle a request's logits, also for samples that wait for its prompt; returns the
        requests that ended."""
        if request.scoring is not None:
            request.scoring.add(rows.logits, rows.likeliest)
            committed.add(request)
            return [request] if self._score_on(request, request.scoring) else []
        if request.is_beginning:
            self._go_on_from_prefix(request)
            committed.add(request)
            return []
        samples, ended = self._split(request) if request.status == "prefilling" else [], []
        for each in (request, *samples):
            reason = self.choose(each, rows)
            committed.add(each)
            if each.prefill is not None:
                self._prefilled(each, each.prefill, samples)
            if reason:
                self.end(each, reason)
                ended.append(each)
        return ended

    def choose(self, request: Request, rows: Rows) -> str | None:
        """Sample a request's next token from its last row; returns the reason if it ends with this
        token, else None."""
        if rows.broken[-1]:
            request.error = "the model's logits are not finite numbers (NaN or infinity)"
            return "error"
        try:
            token, logprob = sample(rows.logits[-1], request, rows.likeliest[-1])
        except Exception as error:
            if request.constraint is None:
                raise
            request.error = f"{type(error).__name__}: {error}"  # affects this request only
            return "error"
        request.output.append(token)
        request.logprobs += [] if logprob is None else [logprob]
        return self._reason(request, token)

    def _split(self, request: Request) -> list[Request]:
        """Start the further samples of a prefilled prompt, on its pages."""
        begun = request.waiting_samples
        for each in begun:
            each.take(self.shared.pool.fork(request.table), request)
            each.reused = request.reused
            each.computed = self._computed(request)
            each.times.started, each.times.first_token = request.times.started, time.monotonic()
        return begun

    def _computed(self, request: Request) -> list[int]:
        """The number of tokens of a prefilled prompt that entered each layer, per reading; a prefix
        that was prefilled separately is included."""
        assert request.prefill is not None
        depth, now, before = self.shared.runner.depth, request.prefill.computed, request.computed
        if not before:
            return now
        entered = [sum(pair) for pair in zip(before[:depth], now[:depth], strict=True)]
        return entered + before[depth:] + now[depth:]

    def _go_on_from_prefix(self, request: Request) -> None:
        """After a prompt's prefix is prefilled: hold its cache for other requests, and continue
        with the rest of the prompt."""
        assert request.prefill is not None
        shared = self.shared
        if request.times.first_token is None:
            request.computed = request.prefill.computed
        request.prefill = None
        costs = costs_of(
            shared,
            request.policy,
            len(request.prompt),
            request.max_new,
            request.protect,
            request.table,
            samples=request.width,
        )
        if not request.output and costs[0].bytes <= request.cost.bytes:
            for each in (request, *request.samples):
                each.cost, each.likely = costs
            self.shared.ledger.reserve(request, request.likely)
        self.conversations.hold_prefix(request)
        shared.start(request)

    def _prefilled(self, request: Request, prefill: Prefill, samples: list[Request]) -> None:
        """After a prompt is prefilled: free what only prefill needed; the request and its samples
        decode from now on."""
        if request.times.first_token is None:  # else it was recomputed
            request.times.first_token, request.computed = time.monotonic(), self._computed(request)
        if prefill.reader is not None:
            request.prompt_logprobs = prefill.read
        request.prefill = None
        if prefill.is_reread:
            cost_from_held(self.shared, request, samples)
        for each in (request, *samples):
            self.shared.ledger.reserve(each, request.likely.after_prefill)
            self.scheduler.to_running(each)

    def _score_on(self, request: Request, scoring: Scoring) -> bool:
        """After the context is prefilled: score the continuation on top of it; True when that is
        done."""
        assert request.prefill is not None
        runner, table = self.shared.runner, request.table
        if request.kv is None:  # only the context is prefilled
            request.times.first_token = time.monotonic()
            request.computed = request.prefill.computed
            request.kv = answers.usage(self.shared.pool, runner, request)
            rest = torch.tensor(
                scoring.tokens[:-1], dtype=torch.int64, device=self.shared.runner.device
            )
            if len(rest):
                reach = [len(rest)] * self.shared.runner.depth
                request.prefill = Prefill(request, rest, table.seen_len, reach, True)
                return False
        request.prefill = None
        self.end(request, "length")
        return True

    def _reason(self, request: Request, token: int) -> str | None:
        """The reason if a request ends with ``token``, else None."""
        params = request.params
        ends = token in request.stop_ids or (token in self.end_ids and not params.ignore_eos)
        if ends and len(request.output) > params.min_tokens:
            return "stop"
        if params.stop and request.detokenizer:
            request.detokenizer.update(request.output)
            if request.detokenizer.stopped:
                return "stop"
        if request.constraint is not None and request.constraint.done:
            return "stop"
        return "length" if len(request.output) >= request.max_new else None

    def end(self, request: Request, reason: str) -> None:
        """End a request: record what it used, then free its pages (or hold them)."""
        self.scheduler.remove(request)
        request.finish_reason, request.times.ended = reason, time.monotonic()
        request.status = "finished"
        if request.drafting is not None:
            request.drafting.places.clear()  # no more lookups
        request.kv = answers.usage(self.shared.pool, self.shared.runner, request)
        if request.detokenizer and not request.detokenizer.stopped:
            request.detokenizer.update(self._said(request, reason), last=True)
        if request.detokenizer and request.detokenizer.error and reason in ("stop", "length"):
            reason = request.finish_reason = "error"
            request.error = request.detokenizer.error
        if request.prefill is not None:
            request.computed, request.prefill = request.computed or request.prefill.computed, None
        keeps = request.owner is not None and reason != "error" and request.lowered_to is None
        if (request.hold or keeps) and request.cache is not None:
            self.shared.ledger.reserve(request, self.shared.ledger.held(request.cache))
            if keeps:
                request.leaves_cache = self.conversations.keep(request)
            return
        self.shared.release(request)

    def _said(self, request: Request, reason: str) -> TokenIds:
        """A request's tokens, without the one that ended it if that is not part of its text."""
        ends = self.end_ids.union(request.stop_ids).difference(request.params.stop_token_ids)
        ended = reason == "stop" and request.output[-1] in ends
        return request.output[:-1] if ended else request.output
