"""Stored answers of ``/v1/responses``, separate for each API key."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

from pyramidinfer.server.protocol_responses import Item

__all__ = ["ResponseStore", "Stored"]

#: Limits per API key; the least recently used answers are removed first.
MOST_RESPONSES, MOST_BYTES = 1000, 32 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer as it was sent, and the items of its conversation, including the answer."""

    response: dict[str, Any]
    items: list[Item]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        texts = [json.dumps(self.response), *(each.model_dump_json() for each in self.items)]
        object.__setattr__(self, "size", sum(map(len, texts)))


class ResponseStore:
    """A store with a maximum number and size of answers per owner, in memory only."""

    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._of: defaultdict[str, OrderedDict[str, Stored]] = defaultdict(OrderedDict)
        self._bytes: defaultdict[str, int] = defaultdict(int)

    def put(self, owner: str, stored: Stored) -> None:
        """Store an answer; the newest one is kept even if it is too large."""
        held = self._of[owner]
        held[stored.response["id"]] = stored
        self._bytes[owner] += stored.size
        while len(held) > 1 and (len(held) > self.most or self._bytes[owner] > self.most_bytes):
            _, oldest = held.popitem(last=False)
            self._bytes[owner] -= oldest.size

    def get(self, owner: str, id: str) -> Stored | None:
        """An owner's answer, which becomes the most recently used one."""
        held = self._of.get(owner)
        if held is None or id not in held:
            return None
        held.move_to_end(id)
        return held[id]

    def delete(self, owner: str, id: str) -> bool:
        """Delete an answer; returns whether it existed."""
        found = self._of[owner].pop(id, None) if owner in self._of else None
        if found is not None:
            self._bytes[owner] -= found.size
        return found is not None
