"""Which tokens of a finished conversation are still held, layer by layer."""

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
    """What a held cache has of its text.

    id : the cache's;  tokens : those of the text it is of;  width : tokens of a column, of which
    the last may have fewer;  layers : ``[layers][columns]``, percent of a column's entries that the
    heads of the layer hold, from 0 (none) to 100 (all of them in every head).
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
    """What is held of the longest beginning of ``text`` that a request of this owner and policy
    would take up, in at most ``columns`` columns; None where there is none.  In the engine's
    thread.

    ``lora``, ``salt`` and ``prefix`` are the request's, as :meth:`Engine.make` takes them.
    ``ValueError`` where it cannot be looked at: on disk, or on several ranks.
    """
    runner = engine.runner
    if runner.ranks.size * runner.stages.size > 1:
        raise ValueError("what survives can be looked at on one rank only")
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
        # one entry of a thousand is not none, and all but one are not all
        shares = shares.clamp(held.gt(0).long(), 100 - held.lt(whole).long())
        layers.append(shares.tolist())
    return Survival(found.id, found.length, width, layers)


def _held(
    engine: Engine, realm: tuple[str, ...], text: TokenIds, policy: Policy, prefix: int
) -> Conversation | None:
    """The longest text held of this realm, policy and prefix that the given one begins with."""
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
