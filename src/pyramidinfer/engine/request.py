"""A request inside the engine: its input, its state and its output."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pyramidinfer.cache import Away, Exported
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.text import Detokenizer
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.batch import Prefill, Sequence
from pyramidinfer.types import KVUsage, Logprob, SamplingParams, TokenIds

__all__ = [
    "Constraint",
    "Drafting",
    "Preempted",
    "Request",
    "Scoring",
    "Status",
    "Times",
    "realm_of",
]

#: A request's status: not queued yet, in one of the scheduler's queues, or finished.
Status = Literal["made", "waiting", "prefilling", "running", "preempted", "finished"]


def realm_of(owner: str, salt: str, adapter: Adapter | None) -> tuple[str, ...]:
    """Whose caches a request may take up, the owner first: all with the same realm share them."""
    return (owner, salt, adapter.mark if adapter else "")


class Constraint(Protocol):
    """The allowed next tokens of a request (a grammar); it receives every sampled token."""

    @property
    def done(self) -> bool:
        """Whether no token can follow."""

    def allowed(self, vocab_size: int) -> Tensor:
        """The allowed next tokens: bool ``[vocab_size]``, at least one of them."""

    def accept(self, token: int) -> int:
        """Advance by the sampled token, or by a longer one with the same text."""

    def copy(self) -> Self:
        """A copy in the same state."""


@dataclass(slots=True, eq=False)
class Scoring:
    """A continuation to be scored instead of generating, and its results so far.

    ``logits``: ``[tokens, vocab]`` in parts, on the host, if they are kept.
    """

    tokens: TokenIds
    keep_logits: bool
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, likeliest: TokenIds) -> None:
        """Add the logits ``[n, vocab]`` that predict the next n tokens, and their argmax."""
        done = len(self.logprobs)
        wanted = self.tokens[done : done + len(likeliest)]
        wide = logits.to(accumulate_dtype(logits.dtype))
        tokens = torch.tensor(wanted, device=logits.device)[:, None]
        self.logprobs += wide.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        self.greedy += [best == token for best, token in zip(likeliest, wanted, strict=True)]
        if self.keep_logits:
            self.logits.append(wide.float().cpu())


class Preempted(NamedTuple):
    """A preempted request: its cache in host memory (None: to be recomputed), its state in the
    pool, the reservation that must fit before it comes back, and its bytes of host memory."""

    cache: Exported | None
    kv: KVUsage
    wanted: Cost
    size: int = 0


@dataclass(slots=True, eq=False)
class Drafting:
    """Statistics of a request's drafts so far.

    ``drafted`` tokens were verified, of which ``accepted`` were accepted, in ``verifications``
    passes;  ``rates``: recent acceptance rates, by drafter.  ``places``: the last places of short
    runs of tokens in the first ``indexed`` tokens of the text, for lookup drafts.
    """

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Times:
    """When a request arrived, began, got its first token and ended (``time.monotonic``, None: not
    yet)."""

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Sequence):
    """A request: its input, its cache, its state and its output.  Only the engine changes it.

    ``status``: its state;  ``cache``: while it has pages in the pool.
    ``cost``: the maximum it may need;  ``likely``: the reservation that it needs to begin (the
    same, unless memory is overcommitted);  ``reserved``: its current reservation in the ledger.
    ``prompt``: all tokens fed so far (including extended turns and answers); ``scoring``: a
    continuation to score; nothing is generated then. ``output``: tokens generated since the last
    prompt;  ``hold``: keep the cache at the end, so that more tokens can be appended
    (``Engine.extend``). ``samples``: further answers to the same prompt, which start on this one's
    pages after its prefill. ``onto``: a held request; its cache is copied when this one is queued.
    ``owner``: the owner of the conversation; at its end, the cache is kept for a request of the
    same owner that continues it (None: no reuse).  ``reused``: tokens of its cache, and
    ``reused_entries`` over all layers. ``constraint``: its allowed next tokens, if its answer has a
    given form. ``stop_ids``: tokens that end it in addition to the model's: ids, and stop strings
    of one token. ``error``: the error, if ``finish_reason`` is ``"error"``. ``preempted``: the
    place of its cache while it has nothing in the pool; ``lowered_to``: the value its policy's
    ``keep`` was lowered to because memory was short. ``pinned``: the time until which its cache
    must not be dropped (``time.time``; 0: none). ``prefix``: number of first tokens that are
    prefilled separately, for other requests (0: none); ``salt``: caches are shared only by requests
    with the same salt;  ``chain``: digests of the pages of its prompt, computed at first use.
    ``drafting``: statistics of its drafts, if its policy is lossless;  ``away``: what its cache may
    have in host memory, if it is there (``offload_lossless``);  ``leaves_cache``: whether its
    cache was held for its conversation when it ended.
    """

    id: int
    prompt: TokenIds
    params: SamplingParams
    max_new: int
    cost: Cost
    likely: Cost
    protect: tuple[tuple[int, int], ...] = ()
    hold: bool = False
    status: Status = "made"
    detokenizer: Detokenizer | None = None
    stop_ids: frozenset[int] = frozenset()
    reserved: Cost | None = None
    prefill: Prefill | None = None
    scoring: Scoring | None = None
    output: TokenIds = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    processors: Any = None
    generator: torch.Generator | None = None
    times: Times = field(default_factory=Times)
    computed: list[int] = field(default_factory=list)
    kv: KVUsage | None = None
    samples: list[Request] = field(default_factory=list)
    constraint: Constraint | None = None
    onto: Request | None = None
    owner: str | None = None
    reused: int = 0
    reused_entries: float = 0.0
    leads: bool = True  # False for a sample of another request
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    error: str | None = None
    preempted: Preempted | None = None
    lowered_to: float | None = None
    pinned: float = 0.0
    prefix: int = 0
    salt: str = ""
    chain: list[bytes] | None = None
    drafting: Drafting | None = None
    away: Away | None = None
    leaves_cache: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has ended, held or not."""
        return self.status == "finished"

    @property
    def text(self) -> TokenIds:
        """All tokens so far."""
        return self.prompt + self.output

    @property
    def realm(self) -> tuple[str, ...]:
        """See :func:`realm_of`."""
        assert self.owner is not None
        return realm_of(self.owner, self.salt, self.adapter)

    @property
    def is_beginning(self) -> bool:
        """Whether its prefix is being prefilled, and not the rest."""
        return self.prefill is not None and self.prefill.end <= self.prefix

    def holder(self) -> Request:
        """A finished request with this one's prefix, to hold its cache."""
        return Request(
            id=self.id,
            prompt=self.prompt[: self.prefix],
            params=self.params,
            max_new=1,
            policy=self.policy,
            cost=self.cost,
            likely=self.likely,
            protect=self.protected_in(self.prefix),
            status="finished",
            owner=self.owner,
            prefix=self.prefix,
            salt=self.salt,
            adapter=self.adapter,
        )

    def protected_in(self, length: int) -> tuple[tuple[int, int], ...]:
        """Protected spans of the first ``length`` tokens."""
        return tuple((start, min(stop, length)) for start, stop in self.protect if start < length)

    @property
    def width(self) -> int:
        """Number of requests in flight for this one: itself, and samples that wait for it."""
        return 1 + len(self.waiting_samples)

    @property
    def waiting_samples(self) -> list[Request]:
        """Samples that begin after this one's prefill."""
        return [each for each in self.samples if each.status == "made"]

    @property
    def prompt_top(self) -> int | None:
        """Number of most likely tokens to report per place in the prompt; None: no
        log-probabilities."""
        return self.params.prompt_logprobs if self.leads else None
