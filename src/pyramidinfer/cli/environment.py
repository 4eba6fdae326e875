"""Options as environment variables: ``PYRAMIDINFER_KV_MEMORY`` for ``--kv-memory``."""

from __future__ import annotations

import os

from pyramidinfer.options import hint
from pyramidinfer.server.settings import KEYS_VARIABLE

__all__ = ["PREFIX", "check_variables", "register", "variable"]

PREFIX = "PYRAMIDINFER_"
#: Variables that are no options: keys, the cache folder, the chat's history.
OTHERS = {KEYS_VARIABLE, f"{PREFIX}CACHE", f"{PREFIX}CHAT_HISTORY"}
_known: set[str] = set()


def variable(flag: str) -> str:
    """The variable of an option: ``PYRAMIDINFER_KV_MEMORY`` for ``--kv-memory``."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def register(name: str) -> None:
    """Register a variable that a command reads."""
    _known.add(name)


def check_variables() -> None:
    """``ValueError`` with the nearest name for a ``PYRAMIDINFER_`` variable that no command
    reads."""
    known = _known | OTHERS
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise ValueError(f"the environment variable {name} is unknown{hint(name, known)}")
