"""Prefix sharing: a request reuses pages of another request's cache with the same first tokens.

A key or value depends only on the tokens before it.  So if a policy keeps every token, the pages of
a prefilled prompt can be used by any other prompt that begins with the same tokens, both while the
request runs and after it has ended, if its cache is held.  Only whole pages are shared, so shared
pages are never written.  Caches of texts that are longer than a layer's sliding window cannot be
shared, because the layer has dropped entries, nor can caches whose keys were rotated by the length
of the text (dynamic scaling).
"""

from __future__ import annotations

from collections.abc import Iterable

from pyramidinfer.engine.conversation import Names
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared

__all__ = ["Lenders"]


class Lenders:
    """Requests with prefilled prompts, by the digests of their pages."""

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
        """Add a request whose prompt is prefilled; remove requests without a cache."""
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
        """The request whose first tokens a request can share, and their number: whole pages, and at
        least one token is left to compute."""
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
        """Whether a prompt in progress will share more than ``length`` tokens with a request, and
        is worth waiting for: at least half of it is shared."""
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
        """Whether two requests have the same prefix to prefill separately."""
        size = one.prefix
        same = size == other.prefix and one.prompt[:size] == other.prompt[:size]
        return same and self.names.realm(one, True) == self.names.realm(other, True)

    def _common(self, request: Request, lender: Request) -> int:
        """Number of common first tokens of two prompts that one can share with the other."""
        pages = 0
        for mine, its in zip(self._wanted(request), self._chain(lender), strict=False):
            if mine != its:
                break
            pages += 1
        return pages * self.page_size if self._is_whole(lender) else 0

    def _wanted(self, request: Request) -> list[bytes]:
        """Digests of the pages of a prompt without its last token."""
        return self._chain(request)[: (len(request.prompt) - 1) // self.page_size]

    def _chain(self, request: Request) -> list[bytes]:
        """Digests of the pages of a prompt, each including all pages before it."""
        if request.chain is None:
            ends = range(self.page_size, len(request.prompt) + 1, self.page_size)
            realm = self.names.realm(request, True)
            request.chain = list(self.names.digests(realm, request.prompt, ends))
        return request.chain

    def _may_share(self, request: Request) -> bool:
        """Whether a request's cache can share its beginning with other requests."""
        return request.owner is not None and request.policy.keeps_all and not self._grows

    def _lends(self, request: Request, length: int) -> bool:
        """Whether a request still has this many tokens."""
        table = request.cache
        return table is not None and length <= table.seen_len and self._is_whole(request)

    def _is_whole(self, request: Request) -> bool:
        """Whether no window has dropped entries; the last token is not fed and does not count."""
        return self._window is None or len(request.text) <= self._window
