"""One request as the layer loop sees it, and new tokens on their way through the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramidinfer.cache import Table
from pyramidinfer.policies import Policy
from pyramidinfer.types import Layers, Needs

__all__ = ["OFFSET", "Batch", "Intake", "Sequence", "Work"]

#: Name of a streaming request's rotary offset in its state.
OFFSET = "streaming.offset"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's cache and what decides about it.

    ``protected``: bool ``[text]``, tokens no policy may drop (generated ones never are);
    ``is_long``: rotary regime, fixed at admission; ``prompt_len``: length of the text last taken
    in;  ``idle``: steps for which the policy need not be asked whether to evict.
    """

    table: Table
    policy: Policy
    layers: Layers
    protected: Tensor
    is_long: bool = False
    prompt_len: int = 0
    idle: int = 0

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


@dataclass(slots=True, eq=False)
class Intake:
    """Progress of a request's new tokens: a prompt (prefill) or more text (extend).

    Layer-major: all tokens go through a layer before the next one begins, so one layer's state
    is held at a time.

    tokens : ``[new]`` ids;  ``reach``: at most so many of them enter each layer;
    positions : ``[n]`` of the tokens that entered the current ``layer``;
    hidden : ``[n, hidden]`` its input (None at layer 0: embedded chunk by chunk);
    reader : is given the logits of every new token, ``[part, vocab]`` in order, once they are in
    (then the last one's alone are the pass's);
    out : ``[n, hidden]`` its output so far;  ``done`` of the n tokens have been through it.
    """

    sequence: Sequence
    tokens: Tensor
    first: int
    reach: list[int]
    all_rows: bool = False  # logits of every new token are wanted, not the last one's alone
    reader: Callable[[Tensor], None] | None = None
    layer: int = 0
    done: int = 0
    positions: Tensor = field(init=False)
    hidden: Tensor | None = None
    out: Tensor | None = None
    needs: Needs = field(default_factory=Needs)
    queries: Tensor | None = None  # [window, heads, key_dim], the newest queries of the layer
    scores: Tensor | None = None  # [1 or kv_heads, entries]
    columns: Tensor | None = None  # [kv_heads, entries]
    computed: list[int] = field(default_factory=list)  # tokens that entered each layer

    def __post_init__(self) -> None:
        new = self.tokens.shape[0]
        self.positions = torch.arange(self.first, self.first + new, device=self.tokens.device)
        self.sequence.prompt_len = new

    @property
    def length(self) -> int:
        """Tokens that enter the current layer."""
        return self.positions.shape[0]

    @property
    def left(self) -> int:
        """Tokens still to go through the current layer."""
        return self.length - self.done

    @property
    def finished(self) -> bool:
        return self.layer >= self.sequence.layers.count

    @property
    def work_left(self) -> int:
        """Layer-tokens still to do, at most."""
        if self.finished:
            return 0
        return self.left + sum(min(self.length, n) for n in self.reach[self.layer + 1 :])

    def move(self, device: torch.device | str) -> None:
        """Take what is held beside the pool to a device."""
        for name in ("hidden", "out", "queries", "scores", "columns"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    @property
    def transient_bytes(self) -> int:
        """Memory of this intake outside the pool."""
        held = (self.hidden, self.out, self.queries, self.scores, self.columns)
        return sum(each.nbytes for each in held if each is not None)


@dataclass(slots=True, eq=False)
class Work:
    """What one step may do for an intake: at most ``budget`` layer-tokens."""

    intake: Intake
    budget: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: running sequences with the token each feeds (``[R]``), and prefill work."""

    decode: list[Sequence]
    tokens: Tensor
    works: list[Work]
