"""The engine: schedule → run → commit, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pyramidinfer.cache import Copier, Layout, Pool, Table
from pyramidinfer.config import EngineConfig, check_choice
from pyramidinfer.engine import answers, holding
from pyramidinfer.engine.chat_template import find_end_ids
from pyramidinfer.engine.checks import check_plan
from pyramidinfer.engine.drafting import Drafter, Drafts
from pyramidinfer.engine.making import Maker, Spans, cost_from_held, costs_of
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.profiling import ensure_profile, find_profile
from pyramidinfer.engine.recompress import Recompressor, recompress
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.reuse import Held, open_conversations
from pyramidinfer.engine.sampler import prepare, sample
from pyramidinfer.engine.scheduler import Plan, Scheduler
from pyramidinfer.engine.shared import Shared
from pyramidinfer.engine.stats import Stats, Work, read_stats
from pyramidinfer.engine.text import encoder_of
from pyramidinfer.engine.undo import Undo
from pyramidinfer.models import ModelRunner, Prefill
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.batch import Batch
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.models.ranks import ALONE, Ranks
from pyramidinfer.models.runner import Stepped
from pyramidinfer.models.sharding import weights_mark
from pyramidinfer.native.forks import watch_forks
from pyramidinfer.policies import KVzip, Policy
from pyramidinfer.policies.base import Facts
from pyramidinfer.policies.profile import Fingerprint, Profile
from pyramidinfer.types import KVUsage, RequestMetrics, RequestOutput, SamplingParams, TokenIds

__all__ = ["Engine"]


class Engine:
    """Many requests, one model, one pool.  Not thread-safe: only one caller may step it.

    ``add`` queues a request, ``step`` advances all of them and returns those that ended, ``abort``
    ends one at once.  ``ValueError`` for a request that can never be served.

    ``model``: a transformers model, or a ``ModelRunner`` that engines share; then its backend and
    prefill chunk apply.  ``policy``: for requests that name none.
    """

    def __init__(
        self,
        model: nn.Module | ModelRunner,
        policy: Policy,
        config: EngineConfig,
        tokenizer: Any = None,
        backend: str = "auto",
        *,
        own: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        watch_forks()
        self.config, self.policy = config, policy
        mark = weights_mark(model) if config.disk_kv_cache and isinstance(model, nn.Module) else ""
        if isinstance(model, ModelRunner):
            if model.weights != config.weights:
                raise ValueError(
                    f"weights={config.weights!r}, but the runner given stores its weights as "
                    f"{model.weights!r}; give the config that, too"
                )
            self.runner = model
        else:
            self.runner = ModelRunner(
                model,
                backend,
                config.prefill_chunk,
                own=own,
                ranks=ranks,
                weights=config.weights,
            )
        #: The LoRA adapters that requests may use, by name.
        self.adapters = self.runner.load_adapters(config.adapters)
        device = self.runner.device
        check_plan(self.runner, policy, config, device)
        layout = Layout(
            self.runner.group_specs(config.kv_dtype),
            config.budget,
            config.page_size,
            scores=policy.uses_scores or config.slot_scores,
            places=self.runner.places,
            rank=self.runner.rank,
        )
        self.pool = Pool(layout, device, mover=self.runner.chosen.mover)
        self.ledger = Ledger(layout, self.runner)
        copier = Copier(self.pool)
        self.shared = Shared(self.runner, self.pool, self.ledger, config, tokenizer, copier)
        self.conversations = open_conversations(self.shared, mark)
        self.scheduler = Scheduler(self.shared, self.conversations)
        self.drafter = Drafter(self.shared, config.draft_tokens)
        ends = self.runner.end_ids | find_end_ids(tokenizer)
        self.end_ids = frozenset(end for end in ends if end < self.runner.vocab_size)
        self.maker = Maker(self.shared, self.end_ids)
        self.peak_in_flight, self.work = 0, Work()
        self._profile: Profile | None = None
        self.policy = self.bind(policy)
        if self.policy is not policy:
            self.policy.check(self.runner.layers_for(1))

    @property
    def tokenizer(self) -> Any:
        return self.shared.tokenizer

    # --- requests -----------------------------------------------------------------------------

    def make(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        *,
        policy: Policy | None = None,
        protect: Spans = (),
        hold: bool = False,
        on: Table | None = None,
        scoring: Scoring | None = None,
        samples: int = 1,
        owner: str | None = None,
        lora: str | None = None,
        prefix: int = 0,
        salt: str = "",
    ) -> Request:
        """Check a request and build it, without queueing it.

        ``policy``: what to keep (None: the engine's policy);  ``protect``: spans ``(start, stop)``
        of prompt positions that no policy may drop;  ``on``: a cache that already holds the
        beginning of the prompt;  ``scoring``: a continuation to score instead of generating;
        ``samples``: the number of answers; ``request.samples`` holds all but the first;  ``owner``:
        the owner of the conversation, whose later requests can reuse the cache (None: the request
        neither leaves nor reuses a cache);  ``lora``: the name of the adapter to use (None: the
        model alone);  ``prefix``: this many first tokens of the prompt are prefilled and compressed
        separately, and their cache is held for requests of the owner with the same prefix (0:
        none);  ``salt``: caches are shared only between requests with the same salt.
        """
        adapter = self.adapter(lora)
        chosen = self.policy if policy is None else self.bind(policy)
        if chosen is not self.policy:
            self.check_policy(chosen)
        return self.maker.make(
            prompt,
            params,
            chosen,
            protect,
            hold,
            on,
            scoring,
            samples,
            owner,
            adapter,
            prefix,
            salt,
        )

    def adapter(self, name: str | None) -> Adapter | None:
        """The adapter with this name (None for None); ``ValueError`` if there is none."""
        if name is None:
            return None
        if not self.adapters:
            raise ValueError(
                f"lora={name!r}, and no adapter was loaded: give lora_modules={{{name!r}: FOLDER}}"
            )
        check_choice("lora", name, self.adapters)
        return self.adapters[name]

    def bind(self, policy: Policy, measure: bool = True) -> Policy:
        """The policy bound to this model: with the model's head profile if it needs one and has
        none, and with its texts tokenized.

        measure : measure a missing profile, which runs the model (seconds, with a progress bar in a
        terminal).  Without it, or with ``profile=False`` in the config, the profile may stay
        missing, which the policy's ``check`` reports.  ``ValueError`` if the given profile is of
        other weights.
        """

        def profile() -> Profile | None:
            if self._profile is None:
                self._profile = self._known_profile(measure and self.config.profile)
            return self._profile

        def check(given: Profile) -> None:
            given.check_model(self._fingerprint)

        return policy.bind(Facts(profile, check, partial(encoder_of, self.tokenizer)))

    def _known_profile(self, measure: bool) -> Profile | None:
        return (ensure_profile if measure else find_profile)(self.shared)

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.runner)

    def check_policy(self, policy: Policy) -> None:
        """``ValueError`` if a request cannot use this policy in this engine."""
        self.shared.check_policy(policy)

    def add(
        self, prompt: TokenIds, params: SamplingParams, *, protect: Spans = (), hold: bool = False
    ) -> Request:
        """Queue a request; the returned object shows its progress."""
        request = self.make(prompt, params, protect=protect, hold=hold)
        self.submit(request)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request that ``make`` or ``branch`` built."""
        holding.copy_held(self.pool, request)
        for each in (request, *request.samples):
            prepare(each, self.runner.device, self.end_ids)
        self.scheduler.queue(request)

    def extend(
        self,
        request: Request,
        tokens: TokenIds,
        params: SamplingParams,
        *,
        protect: Spans = (),
        hold: bool = False,
    ) -> Request:
        """Continue a held request: ``tokens`` (a further turn) are added to its compressed cache.

        The text includes the request's last answer, and ``protect`` spans are positions in the
        whole text.  The old request object can no longer be used.
        """
        turn = holding.next_turn(self.maker, request, tokens, params, protect, hold)
        self._go_on(request, turn)
        return turn

    def _go_on(self, request: Request, turn: Request) -> None:
        """Queue a turn with the cache that a request holds."""
        turn.take(request.table, request)
        request.cache, request.hold = None, False
        turn.reserved, request.reserved = request.reserved, None
        self.submit(turn)

    def branch(
        self, request: Request, tokens: TokenIds, params: SamplingParams, *, protect: Spans = ()
    ) -> Request:
        """A request, not yet queued, that continues from a copy of a held request's cache.

        The copy is made when the request is queued, and shares pages until they are written.  The
        held request does not change, so other requests can branch from it too.
        """
        turn = holding.next_turn(self.maker, request, tokens, params, protect, False)
        turn.onto = request
        return turn

    def truncate(self, request: Request, seen_len: int) -> None:
        """Remove a held request's tokens from position ``seen_len`` on (a rejected draft).

        ``ValueError`` if layers with a sliding window have already dropped entries that would be
        attended to again.
        """
        holding.truncate(self.shared, request, seen_len)

    def recompress(self, request: Request) -> bool:
        """Choose again which entries a held request's cache keeps: those that the model needs to
        repeat the text, so that the cache serves any later question.

        Every head keeps the same number of entries as before.  This takes two prefills of the text,
        in free memory, while other requests wait.  False if the cache was left unchanged
        (``engine/recompress.py`` lists the cases);  ``ValueError`` if the request holds no cache.
        """
        return recompress(self.shared, self.conversations, self._reader(), request)

    def recompressor(self) -> Recompressor:
        """A ``Recompressor``, which recompresses the caches of finished conversations in small
        steps; ``ValueError`` if this engine holds no conversations."""
        return Recompressor(self.shared, self.conversations, self._reader())

    def _reader(self) -> KVzip:
        reader = self.bind(KVzip())
        assert isinstance(reader, KVzip)
        return reader

    def caches(self, owner: str) -> list[Held]:
        """Caches of an owner's finished conversations, the most recently used first."""
        return self.conversations.listed(owner)

    def pin_cache(self, owner: str, id: str, ttl: float) -> Held:
        """See :meth:`Conversations.pin`."""
        return self.conversations.pin(owner, id, ttl)

    def delete_cache(self, owner: str, id: str) -> None:
        """See :meth:`Conversations.delete`."""
        self.conversations.delete(owner, id)

    def release(self, request: Request) -> None:
        """Free a held request's cache."""
        if request.ended and request.cache is not None:
            self.shared.release(request)
            request.hold = False

    def abort(self, request: Request) -> None:
        """End a request at once; its pages are free when this returns.

        Samples that still wait for its prompt end with it.
        """
        self.fail(request, "abort")

    def fail(self, request: Request, reason: str = "error", error: str | None = None) -> None:
        """End a request at once with this reason; its cache is not kept for its conversation."""
        for each in (request, *request.waiting_samples):
            if not each.ended:
                self.scheduler.remove(each)
                each.hold, each.owner, each.error = False, None, error
                self._end(each, reason)

    # --- stepping -----------------------------------------------------------------------------

    def run(self, requests: Items[Request]) -> None:
        """Queue requests and step until all of them have ended; see ``steps``."""
        for _ in self.steps(requests):
            pass

    def steps(self, requests: Items[Request]) -> Iterator[list[Request]]:
        """Queue the requests that are not queued yet, and step until all have ended; yields the
        requests that ended in each step.

        It also waits for the samples of each request.  If an exception is raised, or the caller
        stops iterating, all of them are aborted.
        """
        everyone = [each for request in requests for each in (request, *request.samples)]
        try:
            for request in requests:
                if request.status == "made":
                    self.submit(request)
            while not all(each.ended for each in everyone):
                yield self.step()
        finally:
            for each in everyone:
                self.abort(each)  # no effect on one that has ended

    def step(self) -> list[Request]:
        """Advance all requests by one step; returns those that ended.

        If an exception is raised (Ctrl-C included), the step is undone and requests continue as if
        it had not been tried.  Only a request that cannot be restored (its entries were being
        evicted, or it extends a cache) is aborted.
        """
        return self._run(self._schedule())

    def step_singly(self) -> list[Request]:
        """Step requests one by one; one whose pass fails ends with an error, without affecting
        others.

        For use after ``step`` raised an ``Exception`` that cannot be traced to a request.
        """
        ended = []
        plan = self._schedule(begin=False)
        singles = [Plan([each], []) for each in plan.decode]
        singles += [Plan([], [pair]) for pair in plan.prefill]
        for single in singles:
            request = single.decode[0] if single.decode else single.prefill[0][0]
            if request.ended:
                continue
            try:
                ended += self._run(single)
            except Exception as error:
                self.blame(request, error)
                ended.append(request)
        return ended

    def blame(self, request: Request, error: Exception) -> None:
        """End a request with an error.  If it was already aborted because its step could not be
        undone, its finish reason becomes this error."""
        why = f"{type(error).__name__}: {error}"
        self.fail(request, error=why)
        if request.finish_reason == "abort":
            request.finish_reason, request.error = "error", why

    def _schedule(self, begin: bool = True) -> Plan:
        """The plan of the next step, after memory for it was freed; with ``begin``, requests that
        fit are started first."""
        scheduler = self.scheduler
        try:
            scheduler.relieve()
            if begin:
                scheduler.admit()
        except BaseException:
            if (lost := scheduler.moving) is not None:
                scheduler.moving = None
                self.abort(lost)
            raise
        return scheduler.plan()

    def _run(self, plan: Plan) -> list[Request]:
        """One pass through the model; returns the requests that ended."""
        if not plan.requests:  # all requests wait for something
            return []
        self.peak_in_flight = max(self.peak_in_flight, self.scheduler.in_flight)
        undo = Undo(self.shared, plan)
        try:
            begun = time.perf_counter()
            plan = plan._replace(drafts=self.drafter.propose(plan.decode))
            guessed, before = time.perf_counter(), self.drafter.accepted
            stepped = self.runner.forward(self.pool, self._batch(plan))
            undo.ran = True
            ended = self._commit(plan, stepped, undo.committed)
            done = time.perf_counter()
            self.work.add(done - begun, guessed - begun if plan.drafts else 0.0)
            if plan.decode and not plan.prefill:
                self.drafter.ran(
                    plan.drafts,
                    guessed - begun,
                    done - guessed,
                    len(plan.decode) + self.drafter.accepted - before,
                )
            return ended
        except BaseException:
            for lost in undo.roll_back():
                self.abort(lost)
            raise

    @property
    def peak_bytes(self) -> int:
        """The most bytes that all requests together ever held, in pages and outside them."""
        return self.pool.peak_bytes

    def stats(self) -> Stats:
        """A snapshot of the engine's statistics, for other threads to read."""
        return read_stats(
            self.scheduler, self.conversations, self.drafter, self.work, self.peak_in_flight
        )

    def check(self) -> None:
        """``pool.check()``, and check that nothing is reserved when nothing runs."""
        self.pool.check()
        if self.scheduler.idle and not self.pool.tables:
            assert self.ledger.bytes == 0 and not self.ledger.pages.any(), "a reservation is left"

    def _batch(self, plan: Plan) -> Batch:
        tokens = []
        for each in plan.decode:
            tokens += [each.output[-1], *(plan.drafts[each].tokens if each in plan.drafts else ())]
        return Batch(
            list(plan.decode),
            torch.tensor(tokens, dtype=torch.int64, device=self.runner.device),
            [work for _, work in plan.prefill],
            plan.fed,
        )

    def _commit(self, plan: Plan, stepped: Stepped, committed: set[Request]) -> list[Request]:
        """Sample a token for every request that has logits; end those that are done."""
        highest, best = stepped.logits.max(-1)  # max treats NaN as the highest number
        likeliest, broken = best.tolist(), (~highest.isfinite()).tolist()
        ended = []
        following = 0
        for index, (request, count) in enumerate(plan.given):
            rows = slice(following, following + count)
            following += count
            if request.ended:  # ended from outside while the step ran
                continue
            if request in plan.drafts:
                ended += self._verify(
                    request, plan.drafts[request], stepped, rows, likeliest, broken, committed
                )
                continue
            if index < len(plan.decode):
                self._advance(request, stepped, rows.start)
            ended += self._settle(
                request, stepped.logits[rows], likeliest[rows], broken[rows], committed
            )
        return ended

    def _verify(
        self,
        request: Request,
        drafts: Drafts,
        stepped: Stepped,
        rows: slice,
        likeliest: TokenIds,
        broken: list[bool],
        committed: set[Request],
    ) -> list[Request]:
        """Choose tokens from a request's ``rows`` while they equal its drafts; returns the request
        if it ended."""
        assert stepped.decoding is not None
        fed, chosen, reason = range(rows.start, rows.stop), 0, None
        try:
            for row in fed:
                at = slice(row, row + 1)
                reason = self._choose(request, stepped.logits[at], likeliest[at], broken[at])
                chosen += 1
                committed.add(request)
                if reason or chosen == len(fed) or request.output[-1] != drafts.tokens[chosen - 1]:
                    break
        finally:
            if chosen:
                self.runner.accept(self.pool, request, stepped.decoding, fed, chosen)
        self.drafter.learn(request, drafts, chosen - 1)
        if not reason:
            return []
        self.scheduler.remove(request)
        self._end(request, reason)
        return [request]

    def _advance(self, request: Request, stepped: Stepped, row: int) -> None:
        """Commit a decoding request's token, and evict entries that are due."""
        assert stepped.decoding is not None
        self.runner.commit(self.pool, request, stepped.decoding, row)

    def _settle(
        self,
        request: Request,
        logits: Tensor,
        likeliest: TokenIds,
        broken: list[bool],
        committed: set[Request],
    ) -> list[Request]:
        """Handle a request's logits ``[rows, vocab]``, also for samples that wait for its prompt;
        returns the requests that ended."""
        if request.scoring is not None:
            request.scoring.add(logits, likeliest)
            committed.add(request)
            return [request] if self._score_on(request, request.scoring) else []
        if request.is_beginning:
            self._go_on_from_prefix(request)
            committed.add(request)
            return []
        samples, ended = self._split(request) if request.prefill is not None else [], []
        for each in (request, *samples):
            reason = self._choose(each, logits[-1:], likeliest[-1:], broken[-1:])
            committed.add(each)
            if each.prefill is not None:
                self._prefilled(each, each.prefill, samples)
            if reason:
                self.scheduler.remove(each)
                self._end(each, reason)
                ended.append(each)
        return ended

    def _choose(
        self, request: Request, logits: Tensor, likeliest: TokenIds, broken: list[bool]
    ) -> str | None:
        """Choose a request's next token from its logits ``[1, vocab]``; returns the reason if it
        ends with this token, else None."""
        if broken[0]:
            request.error = "the model's logits are not finite numbers (NaN or infinity)"
            return "error"
        return self._sample(request, logits[0], likeliest[0])

    def _sample(self, request: Request, logits: Tensor, likeliest: int) -> str | None:
        """Sample a request's next token; returns the reason if it ends with this token, else
        None."""
        try:
            token, logprob = sample(logits, request, likeliest)
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
            each.take(self.pool.fork(request.table), request)
            each.reused = request.reused
            each.computed = self._computed(request)
            each.times.started, each.times.first_token = request.times.started, time.monotonic()
        return begun

    def _computed(self, request: Request) -> list[int]:
        """The number of tokens of a prefilled prompt that entered each layer, per reading; a prefix
        that was prefilled separately is included."""
        assert request.prefill is not None
        depth, now, before = self.runner.depth, request.prefill.computed, request.computed
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
            self.ledger.reserve(request, request.likely)
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
            self.ledger.reserve(each, request.likely.after_prefill)
            self.scheduler.to_running(each)

    def _score_on(self, request: Request, scoring: Scoring) -> bool:
        """After the context is prefilled: score the continuation on top of it; True when that is
        done."""
        assert request.prefill is not None
        table = request.table
        if request.kv is None:  # only the context is prefilled
            request.times.first_token = time.monotonic()
            request.computed = request.prefill.computed
            request.kv = self.usage(request)
            rest = torch.tensor(scoring.tokens[:-1], dtype=torch.int64, device=self.runner.device)
            if len(rest):
                reach = [len(rest)] * self.runner.depth
                request.prefill = Prefill(request, rest, table.seen_len, reach, True)
                return False
        request.prefill = None
        self.scheduler.remove(request)
        self._end(request, "length")
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

    def _end(self, request: Request, reason: str) -> None:
        """Record what the request used, then free its pages (or hold them)."""
        request.finish_reason, request.times.ended = reason, time.monotonic()
        request.status = "finished"
        if request.drafting is not None:
            request.drafting.places.clear()  # no more lookups
        request.kv = self.usage(request)
        if request.detokenizer and not request.detokenizer.stopped:
            request.detokenizer.update(self._said(request, reason), last=True)
        if request.detokenizer and request.detokenizer.error and reason in ("stop", "length"):
            reason = request.finish_reason = "error"
            request.error = request.detokenizer.error
        if request.prefill is not None:
            request.computed, request.prefill = request.computed or request.prefill.computed, None
        keeps = request.owner is not None and reason != "error" and request.lowered_to is None
        if (request.hold or keeps) and request.cache is not None:
            self.ledger.reserve(request, self.ledger.held(request.cache))
            if keeps:
                self.conversations.keep(request)
            return
        self.shared.release(request)

    def _said(self, request: Request, reason: str) -> TokenIds:
        """A request's tokens, without the one that ended it if that is not part of its text."""
        ends = self.end_ids.union(request.stop_ids).difference(request.params.stop_token_ids)
        ended = reason == "stop" and request.output[-1] in ends
        return request.output[:-1] if ended else request.output

    # --- ranks --------------------------------------------------------------------------------

    def together(self, name: str, *values: Any) -> AbstractContextManager[None]:
        """A context whose body runs on all ranks of the model (``engine/ranks.py``)."""
        return nullcontext()

    def check_alive(self) -> None:
        """``RanksError`` if a rank of the model is lost."""

    def when_broken(self, tell: Callable[[str], None]) -> None:
        """Call ``tell``, in any thread, with the reason when the engine can no longer run."""

    def close(self) -> None:
        """End the model's other ranks; the engine cannot be used afterwards."""

    # --- answers ------------------------------------------------------------------------------

    def usage(self, request: Request) -> KVUsage:
        """The size of the request's cache now (or when it ended)."""
        return answers.usage(self.pool, self.runner, request)

    def metrics(self, request: Request) -> RequestMetrics:
        """The request's times and counts so far."""
        return answers.metrics(self.runner, request)

    def output(self, request: Request) -> RequestOutput:
        """The request's answer so far."""
        return answers.output(self.pool, self.runner, request)
