"""The ranks that split a model's layers (tensor parallel), and the collectives between them.

Every rank has a part of the query heads, the KV heads that they read, a part of the MLP and of the
vocabulary, and all tokens.  Partial results are summed over the ranks twice per layer (``sum``).
Policies see all heads: observations of all ranks' heads are gathered (``join``, ``over_heads``), so
every rank selects the same entries, and drops those of its own heads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.types import AttentionShape, Needs

__all__ = ["ALONE", "Ranks", "check_heads"]


@dataclass(eq=False)
class Ranks:
    """One of ``size`` ranks that split every layer.

    index : of this rank;  group : torch.distributed's process group of the ranks (None for one
    rank);
    sent : bytes that this rank passed to collectives, by purpose;  fingerprint : of the whole
    model, for head profiles;  weight_bytes : of this rank's part;  timeout : of the process groups
    (None: torch's default).
    """

    index: int = 0
    size: int = 1
    group: Any = None
    sent: Counter[str] = field(default_factory=Counter)
    fingerprint: Any = None
    weight_bytes: int = 0
    timeout: timedelta | None = None
    _sharing: dict[int, Any] = field(default_factory=dict)  # KV heads → their group

    # --- whose is what --------------------------------------------------------------------------

    def part(self, size: int) -> slice:
        """This rank's part of ``size`` consecutive items; parts differ by at most one."""
        return slice(size * self.index // self.size, size * (self.index + 1) // self.size)

    def copies(self, kv_heads: int) -> int:
        """Ranks that hold the same KV head, each with a part of the query heads that read it."""
        return max(1, self.size // kv_heads)

    def own_heads(self, kv_heads: int) -> range:
        """The KV heads whose keys and values this rank has."""
        if (copies := self.copies(kv_heads)) > 1:
            return range(self.index // copies, self.index // copies + 1)
        part = self.part(kv_heads)
        return range(part.start, part.stop)

    def own(self, shape: AttentionShape) -> AttentionShape:
        """A layer's sizes on this rank."""
        kv_heads = len(self.own_heads(shape.kv_heads))
        return AttentionShape(
            shape.heads // self.size, kv_heads, shape.key_dim, shape.value_dim, shape.window
        )

    def heads_by_rank(self, kv_heads: int) -> list[range]:
        """The KV heads that every rank has."""
        return [Ranks(index, self.size).own_heads(kv_heads) for index in range(self.size)]

    # --- adding up ------------------------------------------------------------------------------

    def sum(self, partial: Tensor, what: str = "layers") -> Tensor:
        """The sum over ranks; the same on all of them."""
        return partial if self.size == 1 else self._sum(partial, self.group, what)

    def _sum(self, partial: Tensor, group: Any, what: str) -> Tensor:
        import torch.distributed as dist

        partial = partial.contiguous()
        self.sent[what] += partial.nbytes
        dist.all_reduce(partial, group=group)
        return partial

    def columns(self, part: Tensor, total: int) -> Tensor:
        """``[n, part]`` of ``total`` columns → ``[n, total]``."""
        if self.size == 1:
            return part
        widest = -(-total // self.size)
        found = self._gather(F.pad(part, (0, widest - part.shape[1])), self.group, "logits")
        ranks = [Ranks(index, self.size).part(total) for index in range(self.size)]
        return torch.cat(
            [each[:, : own.stop - own.start] for each, own in zip(found, ranks, strict=True)], dim=1
        )

    def _gather(self, part: Tensor, group: Any, what: str) -> list[Tensor]:
        import torch.distributed as dist

        part = part.contiguous()
        self.sent[what] += part.nbytes
        found = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, part, group=group)
        return found

    # --- what policies see ----------------------------------------------------------------------

    def join(self, own: Tensor, kv_heads: int) -> Tensor:
        """``[own KV heads, ...]`` of every rank → ``[kv_heads, ...]``, the same on all of them."""
        if self.size == 1:
            return own
        return torch.cat(self._gather(own, self.group, "policy")[:: self.copies(kv_heads)])

    def join_queries(self, own: Tensor) -> Tensor:
        """``[own query heads, ...]`` of every rank → ``[heads, ...]``."""
        return own if self.size == 1 else torch.cat(self._gather(own, self.group, "policy"))

    def over_heads(self, own: Tensor, heads: str) -> Tensor:
        """``[1, n]``, a ``"mean"`` or ``"max"`` over this rank's heads → the same over all heads.

        Computed from the ranks' parts in the same order, so that all ranks round in the same way.
        """
        if self.size == 1:
            return own
        found = torch.stack(self._gather(own, self.group, "policy"))
        return found.amax(0) if heads == "max" else found.mean(0)

    def check(self, needs: Needs) -> None:
        """``ValueError`` for scores that cannot be combined from the ranks' parts."""
        heads, rows = needs.reduce.heads, needs.reduce.rows
        apart = heads.startswith("kv") or (heads, rows) in (
            ("mean", "mean"),
            ("mean", "sum"),
            ("max", "max"),
        )
        if self.size > 1 and needs.window and not apart:
            raise ValueError(
                f"Reduce(heads={heads!r}, rows={rows!r}) needs the weights of all heads on one "
                f"rank: with tensor_parallel_size={self.size} ask for 'kv_mean' or 'kv_max', or "
                f"for sums of means"
            )

    # --- KV heads that several ranks hold ---------------------------------------------------------

    def share(self, kv_heads: int) -> None:
        """Create the groups of ranks that hold the same KV head; all ranks must call this."""
        copies = self.copies(kv_heads)
        if copies == 1 or kv_heads in self._sharing:
            return
        import torch.distributed as dist

        mine = dist.get_process_group_ranks(self.group)
        for first in range(0, self.size, copies):
            if first <= self.index < first + copies:
                some = mine[first : first + copies]
                self._sharing[kv_heads] = dist.new_group(
                    some, timeout=self.timeout, use_local_synchronization=True
                )

    def all_readers(self, own: Tensor, kv_heads: int) -> Tensor:
        """``[n, own query heads, ...]`` → of all query heads that read this rank's KV heads."""
        if self.copies(kv_heads) == 1:
            return own
        return torch.cat(self._gather(own, self._sharing[kv_heads], "policy"), dim=1)

    def own_readers(self, shared: Tensor, kv_heads: int) -> Tensor:
        """The part of ``all_readers`` that is this rank's."""
        copies = self.copies(kv_heads)
        return shared.chunk(copies, dim=1)[self.index % copies]

    def sum_readers(self, own: Tensor, kv_heads: int) -> Tensor:
        """The sum over the ranks that hold the same KV head."""
        if self.copies(kv_heads) == 1:
            return own
        return self._sum(own, self._sharing[kv_heads], "policy")


#: One rank that holds everything.
ALONE = Ranks()


def check_heads(size: int, shape: AttentionShape) -> None:
    """``ValueError`` with the sizes that work, if this number of ranks cannot split these heads."""

    def works(ranks: int) -> bool:
        together = shape.kv_heads % ranks == 0 or ranks % shape.kv_heads == 0
        return shape.heads % ranks == 0 and together

    if not works(size):
        sizes = [str(ranks) for ranks in range(1, shape.heads + 1) if works(ranks)]
        raise ValueError(
            f"tensor_parallel_size={size}: this model's {shape.heads} query heads over "
            f"{shape.kv_heads} KV heads cannot be split; sizes that work: {', '.join(sizes)}"
        )
