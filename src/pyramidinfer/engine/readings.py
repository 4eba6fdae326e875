"""What is read behind a text once it is in, where its policy asks for that, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyramidinfer.engine.text import head_of
from pyramidinfer.models import Adapter
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds

if TYPE_CHECKING:
    from pyramidinfer.engine.engine import Engine

__all__ = ["is_long", "readings", "readings_for"]


def readings(adapter: Adapter, policy: Policy, new: Sequence[int], length: int, max_new: int,
             head: int = 0) -> list[TokenIds]:  # fmt: skip
    """What is read behind a text of ``length`` tokens that ends with ``new``; see
    ``Policy.readings``."""
    far = is_long(adapter, policy, len(new), length, max_new)
    return policy.readings(new, adapter.streaming.limit(far) - length, head)


def readings_for(engine: Engine, policy: Policy, text: TokenIds, seen: int, max_new: int
                 ) -> list[torch.Tensor]:  # fmt: skip
    """The same for a text of which all but the first ``seen`` tokens are about to be taken in."""
    if not policy.reads_again:
        return []
    head = 0
    if not seen and engine.tokenizer is not None:
        begins = head_of(engine.tokenizer)
        head = len(begins) if text[: len(begins)] == begins else 0
    adapter = engine.adapter
    found = readings(adapter, policy, text[seen:], len(text), max_new, head)
    return [torch.tensor(each, device=adapter.device) for each in found]


def is_long(adapter: Adapter, policy: Policy, new: int, length: int, max_new: int) -> bool:
    """Whether a text of ``length`` tokens, the last ``new`` of them to be taken in, needs the long
    rotary regime: for all that is generated, or to be read again behind itself."""
    rotary = adapter.rotary
    if rotary.long_from is None:
        return False
    if rotary.is_long(min(length + max_new - 1, adapter.max_positions)):  # the last is never fed
        return True
    try:
        policy.readings(range(new), rotary.long_from - length)
    except ValueError:
        return True
    return False
