"""Lists, pins and deletes an owner's held caches."""

from __future__ import annotations

import time
from typing import NamedTuple

from pyramidinfer.engine.conversation import Conversation, Place
from pyramidinfer.engine.reuse import Conversations

__all__ = ["Held", "delete", "listed", "pin"]


class Held(NamedTuple):
    """A held cache as reported to its owner; times are seconds since 1970."""

    id: str
    tokens: int
    bytes: int
    where: Place
    policy: str
    keep: float | None
    last_used: float
    pinned_until: float | None


def listed(conversations: Conversations, owner: str) -> list[Held]:
    """An owner's caches, the most recently used first."""
    conversations.poll()
    mine = [one for one in conversations.index if one.owner == conversations.names.owner(owner)]
    return [_told(one) for one in sorted(mine, key=lambda one: -one.used)]


def pin(conversations: Conversations, owner: str, id: str, ttl: float) -> Held:
    """Keep a cache, or its continuation, from being dropped for this many seconds.

    ``KeyError`` if the owner has no cache with this id;  ``ValueError`` if pinned caches would
    exceed their limit.
    """
    if conversations.shared.config.offload_lossless:
        raise ValueError(
            "nothing can be pinned with offload_lossless: lossless requests need the host memory"
        )
    found = _owned(conversations, owner, id)
    if not conversations.host.limit:
        raise ValueError(
            "nothing can be pinned without host memory that it can move to: start with "
            "host_kv_memory (serve --host-kv-memory)"
        )
    taken = conversations.pinned_bytes() - sum(one.size for one in found if one.is_pinned)
    size = sum(one.size for one in found)
    if taken + size > conversations.pin_limit:
        raise ValueError(
            f"a cache of {size} bytes cannot be pinned next to {taken} bytes: together they may "
            f"take {conversations.pin_limit}, half of host_kv_memory; wait, or delete a pinned one"
        )
    for one in found:
        one.pinned = time.time() + ttl
    return _told(found[-1])


def delete(conversations: Conversations, owner: str, id: str) -> None:
    """Drop a cache in all places; ``KeyError`` if the owner has no cache with this id."""
    for one in _owned(conversations, owner, id):
        conversations.discard(one)


def _owned(conversations: Conversations, owner: str, id: str) -> list[Conversation]:
    conversations.poll()
    mine = conversations.names.owner(owner)
    found = [one for one in conversations.index if one.id == id and one.owner == mine]
    if not found:
        raise KeyError(id)
    return found


def _told(one: Conversation) -> Held:
    name, keep = one.words
    pinned = one.pinned if one.is_pinned else None
    return Held(one.id, one.length, one.size, one.place, name, keep, one.used, pinned)
