"""Readings after a prefilled text that its policy requests, and their positions."""

from __future__ import annotations

from collections.abc import Sequence

from pyramidinfer.models import ModelRunner
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds

__all__ = ["is_long", "readings"]


def readings(
    runner: ModelRunner,
    policy: Policy,
    new: Sequence[int],
    length: int,
    max_new: int,
    head: int = 0,
) -> list[TokenIds]:
    """The readings after a text of ``length`` tokens that ends with ``new``; see
    ``Policy.readings``."""
    far = is_long(runner, policy, len(new), length, max_new)
    return policy.readings(new, runner.streaming.limit(far) - length, head)


def is_long(runner: ModelRunner, policy: Policy, new: int, length: int, max_new: int) -> bool:
    """Whether a text of ``length`` tokens, of which the last ``new`` are still to be prefilled,
    needs the long rotary regime, including generated tokens and readings after it."""
    rotary = runner.rotary
    if rotary.long_from is None:
        return False
    if rotary.is_long(min(length + max_new - 1, runner.max_positions)):  # the last is never fed
        return True
    try:
        policy.readings(range(new), rotary.long_from - length)
    except ValueError:
        return True
    return False
