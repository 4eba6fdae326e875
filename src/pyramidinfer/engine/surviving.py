"""Which tokens of a finished conversation are still in the cache, per layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyramidinfer.engine.conversation import Conversation
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.request import realm_of
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds

__all__ = ["Survival", "survival"]


class Survival(NamedTuple):
    """The part of its text that a cache still holds.

    id : the cache's id;  tokens : the number of tokens in its text;  width : tokens per column (the
    last column may have fewer);  layers : ``[layers][columns]``, the percentage of a column's
    entries that the heads of the layer hold, from 0 (none) to 100 (all of them in every head).
    """

    id: str
    tokens: int
    width: int
    layers: list[list[int]]


def survival(
    engine: Engine,
    owner: str,
    text: TokenIds,
    policy: Policy,
    columns: int,
    lora: str | None = None,
    salt: str = "",
    prefix: int = 0,
) -> Survival | None:
    """How much remains of ``text`` in the cache that a request with this owner, policy and text
    would reuse (the one for its longest prefix), in at most ``columns`` columns.  None if there is
    no such cache.  Call it in the engine's thread.

    ``lora``, ``salt`` and ``prefix`` are those of the request, as in :meth:`Engine.make`.
    ``ValueError`` if the cache cannot be read: it is on disk, or split over several ranks.
    """
    runner = engine.runner
    if runner.ranks.size * runner.stages.size > 1:
        raise ValueError(
            "which tokens survive can be shown on one rank only: every rank holds a part of the "
            "cache; omit tensor_parallel_size and pipeline_parallel_size"
        )
    engine.conversations.poll()
    realm = realm_of(owner, salt, engine.adapter(lora))
    found = _held(engine, realm, text, policy, prefix)
    if found is None:
        return None
    if found.place == "disk":
        raise ValueError("this conversation's cache is on disk; its next turn brings it back")
    width = -(-found.length // columns)
    count = -(-found.length // width)
    layers = []
    for layer in range(runner.depth):
        heads = runner.shapes[layer].kv_heads
        held = torch.bincount(_positions(engine, found, layer) // width, minlength=count)
        whole = torch.full_like(held, width * heads)
        whole[-1] = (found.length - width * (count - 1)) * heads
        shares = (100 * held / whole).round().long()
        # 0 stands for exactly none and 100 for exactly all, so other shares are rounded away from
        # both
        shares = shares.clamp(held.gt(0).long(), 100 - held.lt(whole).long())
        layers.append(shares.tolist())
    return Survival(found.id, found.length, width, layers)


def _held(
    engine: Engine, realm: tuple[str, ...], text: TokenIds, policy: Policy, prefix: int
) -> Conversation | None:
    """The cache of this realm, policy and prefix whose text is the longest prefix of ``text``."""
    names, index = engine.conversations.names, engine.conversations.index
    mark = names.mark(policy)
    best = None
    for digest in names.digests(names.realm_of(*realm), text, index.lengths(len(text) + 1)):
        for one in index.at(digest):
            same = one.mark == mark if one.policy is None else one.policy == policy
            if one.prefix == prefix and same:
                best = one
    return best


def _positions(engine: Engine, one: Conversation, layer: int) -> Tensor:
    """Positions of all entries of a layer's heads, in any order, in host memory."""
    if one.exported is not None:
        one.exported.wait()
        return one.exported.entries[layer][2].long()
    assert one.request is not None
    table = one.request.table
    table.wait()
    found = engine.runner.positions(engine.pool, table, layer)
    return found[found >= 0].cpu()
