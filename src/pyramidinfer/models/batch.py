"""One request in the layer loop, and the progress of new tokens through the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.cache import Table
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.draft_view import DraftView
from pyramidinfer.policies import Policy
from pyramidinfer.types import Layers, Needs, Phase, Queries, View

__all__ = ["OFFSET", "Batch", "Prefill", "Sequence", "Work"]

#: Name of a streaming request's rotary offset in its state.
OFFSET = "streaming.offset"


NO_LAYERS = Layers(())


def _nothing_protected() -> Tensor:
    return torch.zeros(0, dtype=torch.bool)


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request in the layer loop: its cache, and the state that decides about its entries.

    ``cache``: None while it has no cache in the pool;  ``protected``: bool ``[text]``, tokens no
    policy may drop (generated ones never are);  ``is_long``: rotary regime, fixed at admission;
    ``prompt_len``: length of the last prefilled text;  ``idle``: number of steps without a check
    for evictions;  ``draft_view``: the pages that its drafts read, if its policy drafts;
    ``adapter``: the LoRA adapter of its tokens, constant while it has a cache.
    """

    policy: Policy
    cache: Table | None = None
    layers: Layers = NO_LAYERS
    protected: Tensor = field(default_factory=_nothing_protected)
    is_long: bool = False
    prompt_len: int = 0
    idle: int = 0
    draft_view: DraftView | None = None
    adapter: Adapter | None = None

    @property
    def table(self) -> Table:
        """The cache, which must exist."""
        assert self.cache is not None, "it has no cache in the pool"
        return self.cache

    def take(self, cache: Table, of: Sequence) -> None:
        """Continue with the cache of another sequence, under that sequence's policy."""
        self.cache, self.policy, self.layers = cache, of.policy, of.layers
        self.protected, self.is_long = of.protected, of.is_long
        self.prompt_len, self.idle = of.prompt_len, of.idle
        self.draft_view = of.draft_view and of.draft_view.copy()

    @property
    def offset(self) -> int:
        """Rotary position of a new token: its place in the text minus this offset (streaming
        only)."""
        return int(self.table.state[OFFSET]) if OFFSET in self.table.state else 0

    def is_protected(self, positions: Tensor) -> Tensor:
        """Which of these places in the text must stay; bool like ``positions``."""
        if not self.protected.shape[0]:
            return torch.zeros_like(positions, dtype=torch.bool)
        last = self.protected.shape[0] - 1
        there = (positions >= 0) & (positions <= last)
        return self.protected[positions.clamp(0, last)] & there


class Moments(NamedTuple):
    """Sums over queries before rotation: their count ``[]``, their sum ``[heads, key_dim]``, the
    sum of outer products ``[heads, key_dim, key_dim]``, and of the norms of their rotated pairs
    ``[heads, pairs]``."""

    number: Tensor
    first: Tensor
    second: Tensor
    sizes: Tensor

    @staticmethod
    def of(queries: Tensor, pairs: int) -> Moments:
        """queries ``[heads, n, key_dim]``, of which the first ``2 * pairs`` channels rotate."""
        number = torch.tensor(queries.shape[1], device=queries.device)
        sizes = queries[..., :pairs].hypot(queries[..., pairs : 2 * pairs]).sum(1)
        return Moments(number, queries.sum(1), queries.mT @ queries, sizes)

    def plus(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def queries(self, scale: float) -> Queries:
        """Statistics of the queries, times ``scale``."""
        mean = self.first / self.number
        covariance = self.second / self.number - mean[:, :, None] * mean[:, None]
        return Queries(mean * scale, covariance * scale**2, self.sizes / self.number * scale)


@dataclass(slots=True, eq=False)
class Prefill:
    """Progress of a request's new tokens: a prompt (prefill) or more text (extend).

    Layer-major: all tokens go through a layer before the next layer starts, so only one layer's
    state is held at a time.

    tokens : ``[new]`` ids;  ``reach``: maximum number of them that enter each layer;
    positions : ``[n]`` of the tokens that entered the current ``layer``;
    hidden : ``[n, hidden]`` its input (None at layer 0: embedded chunk by chunk);
    reader : called with the logits of all new tokens, ``[part, vocab]`` in order, and the number of
    the part's first token; its results are added to ``read`` (the pass returns only the last
    token's logits);
    out : ``[n, hidden]`` its output so far;  ``done`` of the n tokens have passed it.
    readings : tokens still to be read after the prefilled text (``Policy.readings``);  ``again`` :
    the current reading;  ``answer`` : outputs for the head, kept until readings end.
    """

    sequence: Sequence
    tokens: Tensor
    first: int
    reach: list[int]
    all_rows: bool = False  # logits of all new tokens are needed, not only the last one's
    reader: Callable[[int, Tensor], list[Any]] | None = None
    layer: int = 0
    done: int = 0
    positions: Tensor = field(init=False)
    hidden: Tensor | None = None
    out: Tensor | None = None
    needs: Needs = field(default_factory=Needs)
    queries: Tensor | None = None  # [window, heads, key_dim], the newest queries of the layer
    scores: Tensor | None = None  # [1 or kv_heads, entries]
    columns: Tensor | None = None  # [kv_heads, entries]
    moments: Moments | None = None  # of the layer's queries
    computed: list[int] = field(default_factory=list)  # tokens that entered each layer, per pass
    readings: list[Tensor] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    again: Tensor | None = None
    is_reread: bool = False  # the text is prefilled, and its second reading has begun
    answer: Tensor | None = None

    def __post_init__(self) -> None:
        new = self.tokens.shape[0]
        self.positions = torch.arange(self.first, self.first + new, device=self.tokens.device)
        self.sequence.prompt_len = new

    def read_on(self) -> bool:
        """Start the next reading; False if none is left."""
        if not self.readings:
            self.again = None
            return False
        self.again, self.is_reread = self.readings.pop(0), True
        size, device = self.again.shape[0], self.tokens.device
        self.positions = torch.arange(self.end, self.end + size, device=device)
        self.layer = self.done = 0
        return True

    @property
    def end(self) -> int:
        """The place after the text."""
        return self.first + self.tokens.shape[0]

    @property
    def entering(self) -> Tensor:
        """Ids of the tokens that currently go through the layers."""
        return self.tokens if self.again is None else self.again

    @property
    def gives_all(self) -> bool:
        """Whether all outputs of the last layer are needed from the current tokens."""
        return self.all_rows and self.again is None

    @property
    def length(self) -> int:
        """Number of tokens that enter the current layer."""
        return self.positions.shape[0]

    @property
    def left(self) -> int:
        """Number of tokens that have not passed the current layer yet."""
        return self.length - self.done

    @property
    def rows(self) -> int:
        """Number of rows of logits that the pass returns for it at its end."""
        return len(self.tokens) if self.all_rows and not self.reader else 1

    @property
    def finished(self) -> bool:
        return self.layer >= self.sequence.layers.count

    @property
    def work_left(self) -> int:
        """Upper bound on the remaining layer-tokens."""
        depth = self.sequence.layers.count
        later = depth * sum(map(len, self.readings))
        if self.again is not None:
            return later + self.left + self.length * (depth - self.layer - 1)
        if self.finished:
            return 0
        return later + self.left + sum(min(self.length, n) for n in self.reach[self.layer + 1 :])

    def view(self, layer: int | None = None) -> View:
        """The view of the current layer that a policy gets, or of another layer after the last."""
        sequence, table = self.sequence, self.sequence.table
        new, arriving = (0, 0) if self.finished else (self.length, self.left)
        layer, first = self.layer if layer is None else layer, sequence.layers.first
        kept = tuple(held + arriving for held in table.lens(layer))
        phase: Phase = "reread" if self.is_reread else "extend" if self.first else "prefill"
        return View(
            phase,
            layer,
            sequence.layers,
            sequence.prompt_len,
            new,
            kept,
            max(kept) if layer <= first else int(table.entries[first].max()),
            self.end,
            table.state,
        )

    def move(self, device: torch.device | str) -> None:
        """Move its tensors outside the pool to a device."""
        for name in ("hidden", "out", "queries", "scores", "columns", "answer"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        if self.moments is not None:
            self.moments = Moments(*(tensor.to(device) for tensor in self.moments))

    @property
    def transient_bytes(self) -> int:
        """Memory of this prefill outside the pool."""
        held = (
            self.hidden,
            self.out,
            self.queries,
            self.scores,
            self.columns,
            self.answer,
            *(self.moments or ()),
        )
        return sum(each.nbytes for each in held if each is not None)


@dataclass(slots=True, eq=False)
class Work:
    """A prefill's work in one step: at most ``budget`` layer-tokens."""

    prefill: Prefill
    budget: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: running sequences with the tokens they feed (``[R]``; ``fed`` gives the number per
    sequence, one if empty), and prefill work."""

    decode: list[Sequence]
    tokens: Tensor
    works: list[Work]
    fed: list[int] = field(default_factory=list)
