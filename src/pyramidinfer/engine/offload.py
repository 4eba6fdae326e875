"""The host memory tier: caches of conversations, which may be evicted, and of preempted requests,
which may not.

The least recently used caches are evicted first.  An evicted cache is lost unless it is on disk.
So once caches without a file fill more than half of the limit, the oldest of them are written in
advance, and later evictions do not wait for the disk.
"""

from __future__ import annotations

from collections.abc import Callable

from pyramidinfer.engine.conversation import Conversation
from pyramidinfer.engine.disk import DiskStore

__all__ = ["HostStore"]


class HostStore:
    """Conversations in at most ``limit`` bytes, ordered from the least recently used.

    ``others`` returns the bytes of the limit that preempted requests use;  ``lost`` is called for
    caches that are evicted without a file;  ``disk``: the disk tier, if there is one.
    """

    def __init__(self, limit: int, disk: DiskStore | None) -> None:
        self.limit, self.disk = limit, disk
        self.others: Callable[[], int] = lambda: 0
        self.lost: Callable[[Conversation], None] = lambda one: None
        self.bytes = 0  # of conversations, including those that are being read
        self._held: dict[Conversation, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> list[Conversation]:
        """The conversations held, in the order of eviction."""
        return list(self._held)

    def put(self, one: Conversation) -> None:
        """Add a cache for which there is room."""
        self._held[one] = None
        self.bytes += one.size
        self._write_ahead()

    def remove(self, one: Conversation) -> None:
        """Remove a cache; callers that still have it may use it."""
        del self._held[one]
        self.bytes -= one.size
        one.exported = None

    def make_room(self, size: int, must: bool = False) -> bool:
        """Evict conversations until ``size`` bytes are free; False, and nothing is evicted, if that
        is not possible.

        must : for a preempted request: evict all that can be evicted even if that is not enough,
        and wait for files that are being written.
        """
        room = self.limit - self.others() - size
        if self.bytes <= room:
            return True
        if must and self.disk is not None and any(one.writing for one in self._held):
            self.disk.drain()
            self.disk.note_done()
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
        """Write the oldest caches to disk if more than half of the limit has no file."""
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
