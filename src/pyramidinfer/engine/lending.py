"""Prefixes that requests share: whose cache begins as another request's would.

A key or value depends on the tokens before it alone.  So where a policy keeps every token, the
pages of a prompt that is in serve any other prompt that begins with the same tokens, whether the
request still runs or has ended and its cache is held.  Whole pages are shared, so nobody ever
writes to a shared one.  Layers with a sliding window have dropped what came before it once a text
is longer: such a cache lends nothing.  Neither does one whose keys were rotated by the length of
the text (dynamic scaling).
"""

from __future__ import annotations

from collections.abc import Iterable

from pyramidinfer.engine.conversation import Names
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared

__all__ = ["Lenders"]


class Lenders:
    """Requests whose prompts are in, by what the pages of these are known by."""

    def __init__(self, shared: Shared, names: Names) -> None:
        self.names, self.page_size = names, shared.pool.page_size
        self._grows = shared.runner.rotary.grows_from is not None
        windows = [shape.window for shape in shared.runner.shapes if shape.window is not None]
        self._window = min(windows, default=None)
        self._chains: dict[Request, list[bytes]] = {}
        self._by_page: dict[bytes, list[Request]] = {}

    def __len__(self) -> int:
        return len(self._chains)

    def add(self, request: Request) -> None:
        """A request's prompt is in.  Whoever has no cache any longer is forgotten."""
        for each in [each for each in self._chains if each.cache is None]:
            self._remove(each)
        if request.leads and self._may_share(request) and request not in self._chains:
            self._chains[request] = self._chain(request)
            for digest in self._chains[request]:
                self._by_page.setdefault(digest, []).append(request)

    def _remove(self, request: Request) -> None:
        for digest in self._chains.pop(request):
            lenders = self._by_page[digest]
            lenders.remove(request)
            if not lenders:
                del self._by_page[digest]

    def find(self, request: Request) -> tuple[Request, int] | None:
        """Whose first tokens a request can begin with, and how many; whole pages, and at least one
        token is left to it."""
        found = None
        if self._may_share(request):
            for pages, digest in enumerate(self._wanted(request), 1):
                length = pages * self.page_size
                able = [each for each in self._by_page.get(digest, ()) if self._lends(each, length)]
                able = [each for each in able if each.policy == request.policy]
                if not able:
                    break
                found = able[-1], length
        if found and found[0].prompt[: found[1]] != request.prompt[: found[1]]:
            return None
        return found

    def is_coming(self, request: Request, begun: Iterable[Request], length: int) -> bool:
        """Whether a prompt in progress will lend a request more than ``length`` tokens, and is
        worth waiting for: at least half of it is shared."""
        for each in begun:
            if each.policy != request.policy or each.owner is None or request.owner is None:
                continue
            if each.is_beginning and self._has_prefix_of(each, request):
                return length < request.prefix
            if self._may_share(request) and self._may_share(each):
                common = self._common(request, each)
                if length < common and 2 * common >= len(each.prompt):
                    return True
        return False

    def _has_prefix_of(self, one: Request, other: Request) -> bool:
        """Whether two requests have the same prefix, to be taken in alone."""
        size = one.prefix
        same = size == other.prefix and one.prompt[:size] == other.prompt[:size]
        return same and self.names.realm(one, True) == self.names.realm(other, True)

    def _common(self, request: Request, lender: Request) -> int:
        """Tokens that two prompts have in common, of those that one can lend the other."""
        pages = 0
        for mine, its in zip(self._wanted(request), self._chain(lender), strict=False):
            if mine != its:
                break
            pages += 1
        return pages * self.page_size if self._is_whole(lender) else 0

    def _wanted(self, request: Request) -> list[bytes]:
        """What the pages of a prompt are known by, short of its last token."""
        return self._chain(request)[: (len(request.prompt) - 1) // self.page_size]

    def _chain(self, request: Request) -> list[bytes]:
        """What the pages of a prompt are known by, each with all before it."""
        if request.chain is None:
            ends = range(self.page_size, len(request.prompt) + 1, self.page_size)
            realm = self.names.realm(request, True)
            request.chain = list(self.names.digests(realm, request.prompt, ends))
        return request.chain

    def _may_share(self, request: Request) -> bool:
        """Whether a request's cache can begin with, or be the beginning of, another one's."""
        return request.owner is not None and request.policy.keeps_all and not self._grows

    def _lends(self, request: Request, length: int) -> bool:
        """Whether a request has so many tokens still."""
        table = request.cache
        return table is not None and length <= table.seen_len and self._is_whole(request)

    def _is_whole(self, request: Request) -> bool:
        """Whether no window has left anything behind, and the last token is not fed."""
        return self._window is None or len(request.text) <= self._window
