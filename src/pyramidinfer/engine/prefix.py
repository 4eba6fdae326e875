"""A prompt's compressed cache, held so that questions can continue on it."""

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
    """The result of ``LLM.prefill``: the prefilled and compressed beginning of a text.

    Any number of ``LLM.generate(…, prefix=…)`` continue on it, each on a copy whose pages are
    shared until they are written.  It holds its memory until ``release``, or the end of a ``with``.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request

    @property
    def token_ids(self) -> TokenIds:
        """The prefilled tokens."""
        return list(self._request.prompt)

    @property
    def policy(self) -> Policy:
        """The policy that compressed it, which also applies to tokens added to it."""
        return self._request.policy

    @property
    def lora(self) -> str | None:
        """The adapter of its prefill, which also applies to requests that continue on it."""
        adapter = self._request.adapter
        return None if adapter is None else adapter.name

    @property
    def kv(self) -> KVUsage:
        """The held cache."""
        return self._engine.usage(self._request)

    @property
    def metrics(self) -> RequestMetrics:
        """The cost of its prefill."""
        return self._engine.metrics(self._request)

    def held_by(self, engine: Engine) -> Request:
        """The request that holds the cache; ``ValueError`` if it is released or another model's."""
        if self._request.cache is None:
            raise ValueError(
                f"{self!r} was released and cannot be used any more; call prefill again"
            )
        if engine is not self._engine:
            raise ValueError(f"{self!r} belongs to another LLM; use it with the one that made it")
        return self._request

    def release(self) -> None:
        """Free its memory; a second call has no effect."""
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
