"""A request inside the engine: what was asked, where it stands, what it has produced."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pyramidinfer.cache import Exported
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

#: Where a request stands: not queued yet, in one of the scheduler's queues, or at its end.
Status = Literal["made", "waiting", "prefilling", "running", "preempted", "finished"]


def realm_of(owner: str, salt: str, adapter: Adapter | None) -> tuple[str, ...]:
    """Whose caches a request may take up, the owner first: all with the same realm share them."""
    return (owner, salt, adapter.mark if adapter else "")


class Constraint(Protocol):
    """What a request's next token may be (a grammar); it is told every token that was chosen."""

    @property
    def done(self) -> bool:
        """Nothing can follow."""

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: bool ``[vocab_size]``, at least one of them."""

    def accept(self, token: int) -> int:
        """Take in the token that was chosen, or a longer one that leads to the same text."""

    def copy(self) -> Self:
        """Another one in the same state."""


@dataclass(slots=True, eq=False)
class Scoring:
    """A continuation to be scored instead of generating, and what is known of it so far.

    ``logits``: ``[tokens, vocab]`` in parts, on the host, if they are to be kept.
    """

    tokens: TokenIds
    keep_logits: bool
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, likeliest: TokenIds) -> None:
        """Take the logits ``[n, vocab]`` that predict the next n tokens, and their argmax."""
        done = len(self.logprobs)
        wanted = self.tokens[done : done + len(likeliest)]
        wide = logits.to(accumulate_dtype(logits.dtype))
        tokens = torch.tensor(wanted, device=logits.device)[:, None]
        self.logprobs += wide.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        self.greedy += [best == token for best, token in zip(likeliest, wanted, strict=True)]
        if self.keep_logits:
            self.logits.append(wide.float().cpu())


class Preempted(NamedTuple):
    """A preempted request: its cache in host memory (None: to be computed anew), what it was in
    the pool, what must fit before it comes back, and the bytes of host memory it takes."""

    cache: Exported | None
    kv: KVUsage
    wanted: Cost
    size: int = 0


@dataclass(slots=True, eq=False)
class Drafting:
    """How a request's drafts did so far.

    ``drafted`` tokens were verified, of which ``accepted`` were right, in ``verifications`` passes;
    ``rates``: of what is accepted lately, by who drafts.  ``places``: where a text's runs of a few
    tokens were last seen, the first ``indexed`` tokens of it, for drafts that are looked up.
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
    """A request: what was asked, its cache, where it stands and what it produced.  Only the engine
    changes it.

    ``status``: where it stands;  ``cache``: while it has pages in the pool.
    ``cost``: the most it may need;  ``likely``: what must be reserved for it to begin (the same,
    unless memory is overcommitted);  ``reserved``: what the ledger counts for it now.
    ``prompt``: every token taken in so far (extended turns and fed answers included);
    ``scoring``: a continuation to score; nothing is generated then.
    ``output``: tokens generated since the last prompt;  ``hold``: keep the cache at the end, so
    that more tokens can be appended (``Engine.extend``).
    ``samples``: further answers to the same prompt, which begin on this one's pages once its
    prompt is in.
    ``onto``: a held request; a copy of its cache is taken when this one is queued.
    ``owner``: whose conversation this is; when it ends its cache is kept for a request of the
    same owner that goes on with it (None: no reuse).  ``reused``: tokens of its cache, and
    ``reused_entries`` over all layers.
    ``constraint``: what its next token may be, where its answer has a given form.
    ``stop_ids``: tokens that end it besides the model's own: ids, and stop strings that are one.
    ``error``: what went wrong, where ``finish_reason`` is ``"error"``.
    ``preempted``: where its cache is meanwhile, since it holds nothing in the pool;
    ``lowered_to``: what its policy's ``keep`` was lowered to for want of memory.
    ``pinned``: when what it leaves behind may be dropped (``time.time``; 0: any time).
    ``prefix``: its first so many tokens are taken in alone, for others to go on from (0: none);
    ``salt``: caches are for requests with the same one;  ``chain``: what the pages of its prompt
    are known by, once somebody asked.
    ``drafting``: how its drafts did, where its policy is lossless.
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
    leads: bool = True  # False for one of another's samples
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    error: str | None = None
    preempted: Preempted | None = None
    lowered_to: float | None = None
    pinned: float = 0.0
    prefix: int = 0
    salt: str = ""
    chain: list[bytes] | None = None
    drafting: Drafting | None = None

    @property
    def ended(self) -> bool:
        """Whether it is at its end, held or not."""
        return self.status == "finished"

    @property
    def text(self) -> TokenIds:
        """Every token so far."""
        return self.prompt + self.output

    @property
    def realm(self) -> tuple[str, ...]:
        """See :func:`realm_of`."""
        assert self.owner is not None
        return realm_of(self.owner, self.salt, self.adapter)

    @property
    def is_beginning(self) -> bool:
        """Whether its prefix is being taken in, and not what comes after it."""
        return self.prefill is not None and self.prefill.end <= self.prefix

    def holder(self) -> Request:
        """A request that has ended with this one's prefix, to hold that."""
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
        """Protected spans of the first so many tokens."""
        return tuple((start, min(stop, length)) for start, stop in self.protect if start < length)

    @property
    def width(self) -> int:
        """Requests in flight that this one stands for: itself, and samples that wait for it."""
        return 1 + len(self.waiting_samples)

    @property
    def waiting_samples(self) -> list[Request]:
        """Samples that begin once this one's prompt is in."""
        return [each for each in self.samples if each.status == "made"]

    @property
    def prompt_top(self) -> int | None:
        """How many of the likeliest tokens are wanted of each place in the prompt; None: nothing
        is."""
        return self.params.prompt_logprobs if self.leads else None
