"""The compressed cache of a text, held so that prompts can continue from it."""

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
    """The compressed cache of a text, as returned by ``LLM.prefill``.

    Any number of ``LLM.generate(…, prefix=…)`` calls continue from it, each on a copy that shares
    its pages until they are written.  It holds its memory until ``release``, or the end of a
    ``with`` block.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request

    @property
    def token_ids(self) -> TokenIds:
        """The tokens of the text."""
        return list(self._request.prompt)

    @property
    def policy(self) -> Policy:
        """The policy that compressed it, which also applies to text added to it."""
        return self._request.policy

    @property
    def lora(self) -> str | None:
        """The name of its adapter, which prompts that continue from it also use, or None."""
        adapter = self._request.adapter
        return None if adapter is None else adapter.name

    @property
    def kv(self) -> KVUsage:
        """The size of the held cache."""
        return self._engine.usage(self._request)

    @property
    def metrics(self) -> RequestMetrics:
        """Times and computed tokens of the prefill."""
        return self._engine.metrics(self._request)

    def held_by(self, engine: Engine) -> Request:
        """The request that holds the cache; ``ValueError`` if released, or of another ``LLM``."""
        if self._request.cache is None:
            raise ValueError(
                f"{self!r} was released, so no prompt can continue from it; call prefill again"
            )
        if engine is not self._engine:
            raise ValueError(f"{self!r} belongs to another LLM; use it with the LLM that made it")
        return self._request

    def release(self) -> None:
        """Free the memory.  A second call does nothing."""
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
