"""Pick an attention backend by name."""

from __future__ import annotations

from pyramidinfer.attention.base import Backend
from pyramidinfer.attention.reference import ReferenceBackend

__all__ = ["available_backends", "select_backend"]

BACKENDS = {"reference": ReferenceBackend}


def available_backends() -> list[str]:
    return sorted(BACKENDS)


def select_backend(name: str = "reference") -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown: use one of {sorted(BACKENDS)}")
    return BACKENDS[name]()
