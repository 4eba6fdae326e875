"""TOVA: token omission via attention (Oren et al., 2401.06104).

Whenever a layer is over its budget, the entries that the newest query attends to least (averaged
over heads) are evicted: after prefill and at every step.  All heads keep the same tokens.

Deviation: where protected spans fill the budget, other tokens get half of the budget in addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyramidinfer.config import named_options
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Needs, Reduce, View

__all__ = ["TOVA"]


@named_options
@dataclass(frozen=True)
class TOVA(Retaining):
    """The entries that the newest query attends to most.

    capacity : entries per layer (the paper's "multi-state size"; it shows 64 to 2048;
        not used with ``keep``).
    keep : replaces ``capacity``: see ``Retaining``; the budget also holds during generation.
    """

    name: ClassVar[str] = "tova"
    evicts: ClassVar[bool] = True

    capacity: int = 512

    def needs(self, view: View) -> Needs:
        if not self.over(view):
            return Needs()
        limit = self.limit(view)
        rule = Best(limit, room=limit // 2)  # protected spans leave room for others
        return Needs(1, Reduce("mean", "sum"), retain=rule)

    def ring(self, prompt_len: int, max_new: int) -> int:
        return 1
