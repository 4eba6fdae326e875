"""Reads a grammar in a separate process first: some small grammars crash the process that reads
them (nested too deeply) or keep it busy for ever.

This file is run as a script and imports nothing of this package.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

__all__ = ["survives"]

SECONDS = 3  # of CPU time
MEMORY = 2**30
STACK = 2**20  # smaller than the stack of any thread in the server
PATIENCE = 120.0  # seconds of wall time; long, because the machine may be busy


@lru_cache(64)
def survives(grammar: str, library: str) -> bool:
    """Whether reading a grammar finishes, successfully or with an error, within the limits above.

    False also for a grammar that names a special token: the trial's vocabulary lacks it, so the
    grammar is not read completely.  ``library``: the folder that contains llguidance.  ``OSError``
    if no process can be started.
    """
    command = [sys.executable, "-I", "-S", __file__, library]
    with suppress(subprocess.TimeoutExpired):
        return not subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=PATIENCE
        ).returncode
    return False


def _read(grammar: str, ended: threading.Event) -> None:
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if "unknown special token" in matcher.get_error():
        return
    if not matcher.is_error():
        matcher.compute_bitmask()
    ended.set()


def _main() -> int:
    import resource

    for bound, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):  # some systems lack some of these limits
            resource.setrlimit(bound, (most, most))
    threading.stack_size(STACK)
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(sys.stdin.buffer.read().decode(), ended))
    thread.start()
    thread.join()
    return not ended.is_set()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.exit(_main())
