"""The record of a finished conversation, independent of its cache's place, and the lookup of
records.

Texts are compared by digests of their beginnings, owners by keyed digests, so that API keys are
never stored.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from pyramidinfer.cache import Exported, Table
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds

__all__ = ["Conversation", "Index", "Names", "Place"]

#: Places of a cache.
Place = Literal["device", "host", "disk"]


@dataclass(slots=True, eq=False, kw_only=True)
class Conversation:
    """A finished text and its cache.

    ``id``: for its owner, and the name of its file;  ``digest``: of realm and text, of
    ``length`` tokens;  ``prefix``: number of tokens that were prefilled separately (0: none);
    ``policy``: None if only its ``mark`` is known (a file of an earlier run);  ``words``: its name
    and ``keep``;  ``size``: bytes it counts for, in any place.

    It is in the pool (``request`` has the cache), in host memory (``exported``) or only on disk;
    one in host memory may also have a file (``has_file``).  ``leaving``: its pages are being copied
    to host memory, ``coming``: back;  ``writing`` and ``reading``: its file is being written or
    read. ``from_disk``: it was read from disk;  ``tried``: ids of requests that it was read for.
    """

    id: str
    owner: str
    digest: bytes
    length: int
    mark: str
    words: tuple[str, float | None]
    policy: Policy | None
    protect: tuple[tuple[int, int], ...]
    is_long: bool
    size: int
    used: float
    pinned: float = 0.0
    prefix: int = 0
    tokens: TokenIds | None = None
    request: Request | None = None
    exported: Exported | None = None
    has_file: bool = False
    file_bytes: int = 0
    leaving: bool = False
    writing: bool = False
    reading: bool = False
    coming: bool = False
    from_disk: bool = False
    tried: set[int] = field(default_factory=set)

    @property
    def place(self) -> Place:
        """The place of its cache."""
        if self.exported is not None:
            return "host"
        return "device" if self.request is not None else "disk"

    @property
    def cache(self) -> Table | Exported:
        """Its cache, if it is in memory."""
        if self.exported is not None:
            return self.exported
        assert self.request is not None
        return self.request.table

    @property
    def is_pinned(self) -> bool:
        """Whether it must not be dropped."""
        return self.pinned > 0 and time.time() < self.pinned

    @property
    def is_prefix(self) -> bool:
        """Whether it is a prefix that was prefilled separately, for many requests to continue
        from."""
        return self.length == self.prefix

    def fits(self, request: Request, mark: str) -> bool:
        """Whether a request of the same realm that begins with its text may reuse it."""
        same = self.mark == mark if self.policy is None else self.policy == request.policy
        spans = request.protected_in(self.length) if self.is_prefix else request.protect
        return same and self.protect == spans and self.prefix == request.prefix


class Names:
    """Digests of owners, texts and policies.

    secret : key for owners' digests (empty: the same in every process);  model : the model of these
    caches;  shares : whether prefixes are shared between owners.
    """

    def __init__(self, secret: bytes = b"", model: str = "", shares: bool = False) -> None:
        self.secret, self.model, self.shares = secret, model, shares
        self.mark = lru_cache(256)(_policy_mark)

    def owner(self, owner: str) -> str:
        """The digest of an owner."""
        return blake2b(owner.encode(), key=self.secret, digest_size=16).hexdigest()

    def realm(self, request: Request, of_prefix: bool = False) -> str:
        """The digest that is common to requests that may reuse this one's cache, or its prefix."""
        return self.realm_of(*request.realm, of_prefix=of_prefix)

    def realm_of(self, owner: str, *rest: str, of_prefix: bool = False) -> str:
        """``realm`` of requests with this realm, a tuple as ``Request.realm`` returns it."""
        if of_prefix and self.shares:
            return self.owner(json.dumps(rest))
        return self.owner(json.dumps([owner, *rest]) if any(rest) else owner)

    def digests(self, realm: str, text: TokenIds, lengths: Iterable[int]) -> Iterator[bytes]:
        """Digests of the first tokens of a realm's text, for ascending lengths.

        realm : a result of ``realm``.
        """
        data, at = np.array(text, dtype=np.int64), 0
        hasher = blake2b(realm.encode(), digest_size=32)
        for length in lengths:
            hasher.update(data[at:length].tobytes())
            at = length
            yield hasher.digest()

    def of(self, request: Request, size: int) -> Conversation:
        """A finished request that has its cache; ``size``: bytes of the cache."""
        assert request.owner is not None
        owner, length = self.owner(request.owner), request.table.seen_len
        realm = self.realm(request, request.prefix == length)
        *_, digest = self.digests(realm, request.text, [length])
        policy, mark = request.policy, self.mark(request.policy)
        what = [self.model, mark or repr(policy), request.protect, digest.hex()]
        whole = json.dumps(what + [request.prefix] * bool(request.prefix))
        return Conversation(
            id=blake2b(whole.encode(), digest_size=16).hexdigest(),
            owner=owner,
            digest=digest,
            length=length,
            mark=mark,
            words=(policy.name, getattr(policy, "keep", None)),
            policy=policy,
            protect=request.protect,
            is_long=request.is_long,
            size=size,
            used=time.time(),
            pinned=request.pinned,
            prefix=request.prefix,
            request=request,
        )


def _policy_mark(policy: Policy) -> str:
    """A digest of a policy with all its options; empty if an option cannot be serialized, so that
    its caches cannot be identified in a later run."""
    try:
        words = json.dumps(_plain(policy), sort_keys=True)
    except TypeError:
        return ""
    return blake2b(words.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """An option as JSON, dataclasses with their type; ``TypeError`` otherwise."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        inside = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
        return [f"{kind.__module__}.{kind.__qualname__}", inside]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return [[_plain(key), _plain(each)] for key, each in value.items()]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{value!r:.60} cannot be written down")


class Index:
    """Conversations by the digests of their texts."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, list[Conversation]] = {}
        self._lengths: Counter[int] = Counter()

    def add(self, one: Conversation) -> None:
        self._by_digest.setdefault(one.digest, []).append(one)
        self._lengths[one.length] += 1

    def remove(self, one: Conversation) -> None:
        found = self._by_digest[one.digest]
        found.remove(one)
        if not found:
            del self._by_digest[one.digest]
        self._lengths[one.length] -= 1
        if not self._lengths[one.length]:
            del self._lengths[one.length]

    def __iter__(self) -> Iterator[Conversation]:
        for found in self._by_digest.values():
            yield from found

    def lengths(self, below: int) -> list[int]:
        """Lengths of texts shorter than this, ascending."""
        return sorted(length for length in self._lengths if length < below)

    def at(self, digest: bytes) -> list[Conversation]:
        """Conversations with this digest, the newest last."""
        return self._by_digest.get(digest, [])
