"""One request as the layer loop sees it, and new tokens on their way through the layers."""

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
    """A cache and what decides about it: what the layer loop knows of a request.

    ``cache``: None while it has none in the pool;  ``protected``: bool ``[text]``, tokens no policy
    may drop (generated ones never are);  ``is_long``: rotary regime, fixed at admission;
    ``prompt_len``: length of the text last taken in;  ``idle``: steps for which the policy need not
    be asked whether to evict;  ``draft_view``: what its drafts read, where its policy has any;
    ``adapter``: what its tokens run with besides the model, for as long as it has a cache.
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
        """Its cache, where it must have one."""
        assert self.cache is not None, "it has no cache in the pool"
        return self.cache

    def take(self, cache: Table, of: Sequence) -> None:
        """Go on with a cache that was made for another one, under the other one's policy."""
        self.cache, self.policy, self.layers = cache, of.policy, of.layers
        self.protected, self.is_long = of.protected, of.is_long
        self.prompt_len, self.idle = of.prompt_len, of.idle
        self.draft_view = of.draft_view and of.draft_view.copy()

    @property
    def offset(self) -> int:
        """Rotary position of a new token: its place in the text less this (streaming only)."""
        return int(self.table.state[OFFSET]) if OFFSET in self.table.state else 0

    def is_protected(self, positions: Tensor) -> Tensor:
        """Which of these places in the text must stay; bool like ``positions``."""
        if not self.protected.shape[0]:
            return torch.zeros_like(positions, dtype=torch.bool)
        last = self.protected.shape[0] - 1
        there = (positions >= 0) & (positions <= last)
        return self.protected[positions.clamp(0, last)] & there


class Moments(NamedTuple):
    """Sums over queries before rotation: how many ``[]``, of them ``[heads, key_dim]``, of their
    outer products ``[heads, key_dim, key_dim]``, and of the lengths of their rotated pairs
    ``[heads, pairs]``."""

    number: Tensor
    first: Tensor
    second: Tensor
    sizes: Tensor

    @staticmethod
    def of(queries: Tensor, pairs: int) -> Moments:
        """queries ``[heads, n, key_dim]``, of which the first ``2 * pairs`` numbers rotate."""
        number = torch.tensor(queries.shape[1], device=queries.device)
        sizes = queries[..., :pairs].hypot(queries[..., pairs : 2 * pairs]).sum(1)
        return Moments(number, queries.sum(1), queries.mT @ queries, sizes)

    def plus(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def queries(self, scale: float) -> Queries:
        """What the queries are like, times ``scale``."""
        mean = self.first / self.number
        covariance = self.second / self.number - mean[:, :, None] * mean[:, None]
        return Queries(mean * scale, covariance * scale**2, self.sizes / self.number * scale)


@dataclass(slots=True, eq=False)
class Prefill:
    """Progress of a request's new tokens: a prompt (prefill) or more text (extend).

    Layer-major: all tokens go through a layer before the next one begins, so one layer's state
    is held at a time.

    tokens : ``[new]`` ids;  ``reach``: at most so many of them enter each layer;
    positions : ``[n]`` of the tokens that entered the current ``layer``;
    hidden : ``[n, hidden]`` its input (None at layer 0: embedded chunk by chunk);
    reader : is given the logits of every new token, ``[part, vocab]`` in order, once they are in
    (then the last one's alone are the pass's), with the number of the part's first token; what it
    gives is added to ``read``;
    out : ``[n, hidden]`` its output so far;  ``done`` of the n tokens have been through it.
    readings : what is still to be read behind the text once it is in (``Policy.readings``), and
    ``again`` what is being read;  ``answer`` waits meanwhile: outputs that the head will read.
    """

    sequence: Sequence
    tokens: Tensor
    first: int
    reach: list[int]
    all_rows: bool = False  # logits of every new token are wanted, not the last one's alone
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
    computed: list[int] = field(default_factory=list)  # tokens that entered each layer, each time
    readings: list[Tensor] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    again: Tensor | None = None
    is_reread: bool = False  # the text is in and was begun to be read again
    answer: Tensor | None = None

    def __post_init__(self) -> None:
        new = self.tokens.shape[0]
        self.positions = torch.arange(self.first, self.first + new, device=self.tokens.device)
        self.sequence.prompt_len = new

    def read_on(self) -> bool:
        """Turn to the next reading; False where none is left."""
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
        """The place behind the text."""
        return self.first + self.tokens.shape[0]

    @property
    def entering(self) -> Tensor:
        """Ids of what goes through the layers now."""
        return self.tokens if self.again is None else self.again

    @property
    def gives_all(self) -> bool:
        """Whether all outputs of the last layer are wanted from what goes through it now."""
        return self.all_rows and self.again is None

    @property
    def length(self) -> int:
        """Tokens that enter the current layer."""
        return self.positions.shape[0]

    @property
    def left(self) -> int:
        """Tokens still to go through the current layer."""
        return self.length - self.done

    @property
    def rows(self) -> int:
        """Logits that the pass gives of it at its end."""
        return len(self.tokens) if self.all_rows and not self.reader else 1

    @property
    def finished(self) -> bool:
        return self.layer >= self.sequence.layers.count

    @property
    def work_left(self) -> int:
        """Layer-tokens still to do, at most."""
        depth = self.sequence.layers.count
        later = depth * sum(map(len, self.readings))
        if self.again is not None:
            return later + self.left + self.length * (depth - self.layer - 1)
        if self.finished:
            return 0
        return later + self.left + sum(min(self.length, n) for n in self.reach[self.layer + 1 :])

    def view(self, layer: int | None = None) -> View:
        """The layer it is at as a policy sees it, or another one once all is through."""
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
            max(kept) if layer <= first else int(table.longest[first]),
            self.end,
            table.state,
        )

    def move(self, device: torch.device | str) -> None:
        """Take what is held beside the pool to a device."""
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
    """What one step may do for a prefill: at most ``budget`` layer-tokens."""

    prefill: Prefill
    budget: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: running sequences with the tokens they feed (``[R]``, of each so many as ``fed``
    says, one where that is empty), and prefill work."""

    decode: list[Sequence]
    tokens: Tensor
    works: list[Work]
    fed: list[int] = field(default_factory=list)
