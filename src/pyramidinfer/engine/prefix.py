"""A prompt's compressed cache, held so that questions can go on from it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from pyramidinfer.engine.request import Request
from pyramidinfer.policies import Policy
from pyramidinfer.types import KVUsage, RequestMetrics, TokenIds

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["Prefix"]


class Prefix:
    """What ``LLM.prefill`` returns: the beginning of a text, taken in and compressed.

    Any number of ``LLM.generate(…, prefix=…)`` go on from it, each on a copy whose pages are shared
    until they are written.  It holds its memory until ``release``, or the end of a ``with``.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request

    @property
    def token_ids(self) -> TokenIds:
        """The tokens it has taken in."""
        return list(self._request.prompt)

    @property
    def policy(self) -> Policy:
        """What compressed it, and goes on to hold what is added to it."""
        return self._request.policy

    @property
    def lora(self) -> str | None:
        """The adapter that it was taken in with, which what goes on from it runs with, too."""
        adapter = self._request.adapter
        return None if adapter is None else adapter.name

    @property
    def kv(self) -> KVUsage:
        """What is held."""
        return self._engine.usage(self._request)

    @property
    def metrics(self) -> RequestMetrics:
        """What taking it in cost."""
        return self._engine.metrics(self._request)

    def held_by(self, engine: Engine) -> Request:
        """The request that holds the cache; ``ValueError`` if it is released or another model's."""
        if self._request.cache is None:
            raise ValueError(
                f"{self!r} was released, so nothing can go on from it; call prefill again"
            )
        if engine is not self._engine:
            raise ValueError(f"{self!r} is another LLM's; use it with the one that made it")
        return self._request

    def release(self) -> None:
        """Give the memory back; again does nothing."""
        self._engine.release(self._request)

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Prefix({len(self._request.prompt)} tokens, policy {self.policy.name!r})"
