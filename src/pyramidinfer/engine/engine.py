"""The engine: schedule → run → commit, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from pyramidinfer.cache import Copier, Layout, Pool, Table
from pyramidinfer.config import EngineConfig, check_choice
from pyramidinfer.engine import answers, holding, owned
from pyramidinfer.engine.chat_template import find_end_ids
from pyramidinfer.engine.checks import check_plan
from pyramidinfer.engine.committing import Committer
from pyramidinfer.engine.drafting import Drafter
from pyramidinfer.engine.making import Maker, Spans
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.profiling import ensure_profile, find_profile
from pyramidinfer.engine.recompress import Recompressor, recompress
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.reuse import open_conversations
from pyramidinfer.engine.sampler import prepare
from pyramidinfer.engine.scheduler import Plan, Scheduler
from pyramidinfer.engine.shared import Shared
from pyramidinfer.engine.stats import Stats, Work, read_stats
from pyramidinfer.engine.text import encoder_of
from pyramidinfer.engine.undo import Undo
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.batch import Batch
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.models.ranks import ALONE, Ranks
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
    prefill chunk apply.  ``policy``: of requests that name none.  ``adapters``: those of
    ``config``, if the runner already has them.
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
        adapters: dict[str, Adapter] | None = None,
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
        self.adapters = adapters or self.runner.load_adapters(config.adapters)
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
        self.committer = self._committer()
        #: The requests that the last failed step could not restore.
        self.lost: list[Request] = []
        self.peak_in_flight, self.work = 0, Work()
        self._profile: Profile | None = None
        self.policy = self.bind(policy)
        if self.policy is not policy:
            self.policy.check(self.runner.layers_for(1))

    def _committer(self) -> Committer:
        return Committer(
            self.shared, self.scheduler, self.conversations, self.drafter, self.end_ids
        )

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

    def caches(self, owner: str) -> list[owned.Held]:
        """Caches of an owner's finished conversations, the most recently used first."""
        return owned.listed(self.conversations, owner)

    def pin_cache(self, owner: str, id: str, ttl: float) -> owned.Held:
        """See :func:`owned.pin`."""
        return owned.pin(self.conversations, owner, id, ttl)

    def delete_cache(self, owner: str, id: str) -> None:
        """See :func:`owned.delete`."""
        owned.delete(self.conversations, owner, id)

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
                each.hold, each.owner, each.error = False, None, error
                self.committer.end(each, reason)

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
        evicted, or it extends a cache) ends (``lost``): with the error, or aborted if the step was
        interrupted.
        """
        self.lost = []
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
                self._lose(request, error)
                ended.append(request)
        return ended

    def _lose(self, request: Request, error: BaseException) -> None:
        """End a request that a failed step cannot restore."""
        self.lost.append(request)
        if isinstance(error, Exception):
            self.fail(request, error=f"{type(error).__name__}: {error}")
        else:
            self.abort(request)

    def _schedule(self, begin: bool = True) -> Plan:
        """The plan of the next step, after memory for it was freed; with ``begin``, requests that
        fit are started first."""
        scheduler = self.scheduler
        try:
            scheduler.relieve()
            if begin:
                scheduler.admit()
        except BaseException as error:
            if (lost := scheduler.moving) is not None:
                scheduler.moving = None
                self._lose(lost, error)
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
            plan = plan._replace(drafts=self.drafter.propose(plan.decode, not plan.prefill))
            guessed, before = time.perf_counter(), self.drafter.accepted
            stepped = self.runner.forward(self.pool, self._batch(plan))
            undo.ran = True
            ended = self.committer.commit(plan, stepped, undo.committed)
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
        except BaseException as error:
            for lost in undo.roll_back():
                self._lose(lost, error)
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
