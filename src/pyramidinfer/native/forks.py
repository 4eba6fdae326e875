"""A child forked while a model is loaded: OpenMP's threads stay behind, and waiting for them would
never end.  So such a child computes on one thread, with the same results."""

from __future__ import annotations

import os
from functools import cache

import torch

__all__ = ["set_threads", "watch_forks"]

_forked = False


@cache
def watch_forks() -> None:
    """From now on, forked children use one thread."""
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)


def set_threads(count: int) -> None:
    """Threads of whoever calls, as far as this process may have them."""
    torch.set_num_threads(1 if _forked else count)
