"""Options as environment variables: ``PYRAMIDINFER_KV_MEMORY`` for ``--kv-memory``."""

from __future__ import annotations

import os

from pyramidinfer.options import hint
from pyramidinfer.server.settings import KEYS_VARIABLE

__all__ = ["PREFIX", "check_variables", "register", "variable"]

PREFIX = "PYRAMIDINFER_"
#: Read elsewhere: keys, the cache folder, the chat's history.
OTHERS = {KEYS_VARIABLE, f"{PREFIX}CACHE", f"{PREFIX}CHAT_HISTORY"}
_known: set[str] = set()


def variable(flag: str) -> str:
    """The variable of an option: ``--kv-memory`` has ``PYRAMIDINFER_KV_MEMORY``."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def register(name: str) -> None:
    """A variable that some command reads."""
    _known.add(name)


def check_variables() -> None:
    """``ValueError`` for a variable with our prefix that no command reads, with the nearest."""
    known = _known | OTHERS
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise ValueError(f"the environment variable {name} is unknown{hint(name, known)}")
