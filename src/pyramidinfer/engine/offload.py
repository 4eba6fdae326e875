"""Caches in host memory: conversations, which give way, and preempted requests, which do not.

What must go from here, the least recently used first, is on disk already or is lost: once more than
half of the room is filled by caches without a file, the oldest of them are written in advance, so
that nobody waits for a disk later.
"""

from __future__ import annotations

from collections.abc import Callable

from pyramidinfer.engine.conversation import Conversation
from pyramidinfer.engine.disk import DiskStore

__all__ = ["HostStore"]


class HostStore:
    """Conversations in no more than ``limit`` bytes, the least recently used in front.

    ``others`` tells how many bytes of the limit preempted requests take;  ``lost`` is told of
    caches that go for want of room;  ``disk``: where they go then, if there is one.
    """

    def __init__(self, limit: int, disk: DiskStore | None) -> None:
        self.limit, self.disk = limit, disk
        self.others: Callable[[], int] = lambda: 0
        self.lost: Callable[[Conversation], None] = lambda one: None
        self.bytes = 0  # of conversations, those that are being read included
        self._held: dict[Conversation, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> list[Conversation]:
        """The one that goes first in front."""
        return list(self._held)

    def put(self, one: Conversation) -> None:
        """Hold a cache for which there is room."""
        self._held[one] = None
        self.bytes += one.size
        self._write_ahead()

    def remove(self, one: Conversation) -> None:
        """Hold a cache no longer; whoever has it may still use it."""
        del self._held[one]
        self.bytes -= one.size
        one.exported = None

    def make_room(self, size: int, must: bool = False) -> bool:
        """Let conversations go until so many bytes are free; False, and none goes, where that
        cannot be.

        must : for a preempted request: all that can go does, and files that are being written are
        waited for.
        """
        room = self.limit - self.others() - size
        if self.bytes <= room:
            return True
        if must and self.disk is not None and any(one.writing for one in self._held):
            self.disk.drain()
            self.disk.settle()
        able = [one for one in self._held if _may_go(one)]
        if not must and self.bytes - sum(one.size for one in able) > room:
            return False
        for one in sorted(able, key=lambda one: not one.has_file):
            if self.bytes <= room:
                break
            self.remove(one)
            if not one.has_file:
                self.lost(one)
        return self.bytes <= room

    def _write_ahead(self) -> None:
        """Have the oldest written where too many could not go without being lost."""
        if self.disk is None:
            return
        bare = [one for one in self._held if not (one.has_file or one.writing)]
        left = sum(one.size for one in bare)
        for one in bare:
            if left <= self.limit // 2:
                break
            self.disk.write(one)
            left -= one.size


def _may_go(one: Conversation) -> bool:
    if one.leaving or one.writing or one.coming:
        return False
    return one.has_file or not one.is_pinned
