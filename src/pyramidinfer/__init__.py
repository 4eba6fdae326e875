"""PyramidInfer: an inference engine in which fewer tokens are computed and fewer are kept."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramidinfer.engine.llm import LLM
    from pyramidinfer.engine.prefix import Prefix
    from pyramidinfer.policies import Full, Pyramid, PyramidInfer
    from pyramidinfer.types import (
        KVUsage,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        Score,
        StructuredOutputsParams,
        Trace,
    )

__all__ = [
    "LLM",
    "Full",
    "KVUsage",
    "Prefix",
    "Pyramid",
    "PyramidInfer",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "StructuredOutputsParams",
    "Trace",
]
__version__ = "0.1.0"

#: Where a name is that does not come from ``pyramidinfer.types``.
_PLACES = {
    "LLM": "engine.llm",
    "Prefix": "engine.prefix",
    "Full": "policies",
    "Pyramid": "policies",
    "PyramidInfer": "policies",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch takes seconds, and ``--help`` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES.get(name, 'types')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
