"""SnapKV: what the prompt's last queries attend to (Li et al., 2404.14469).

After prefill each KV head keeps the window (the newest tokens) and the entries that the window's
queries attend to most.  Scores are pooled over neighbours so that clusters stay whole.  Nothing is
evicted during generation.

Deviation: query heads that share a KV head are averaged, since they share its entries (the
official code selects per query head, on repeated keys).  A further text (``extend``) that is
shorter than the window is scored by its own queries only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyramidinfer.config import check_choice, check_whole, named_options
from pyramidinfer.policies.retaining import Adaptive
from pyramidinfer.types import Best, Needs, Observation, Reduce, View

__all__ = ["SnapKV", "WindowRetaining", "check_kernel"]

SCORES = Reduce("kv_mean", "sum")


def check_kernel(kernel: object) -> None:
    """Raise ``ValueError`` unless ``kernel`` is odd and above 0."""
    check_whole("kernel", kernel, 1)
    if kernel % 2 == 0:  # type: ignore[operator]
        raise ValueError(f"kernel={kernel!r} must be an odd number above 0")


@dataclass(frozen=True)
class WindowRetaining(Adaptive):
    """Retention by pooled window attention per KV head: SnapKV and the methods built on it.

    window : number of newest queries that score; the newest ``window`` entries always stay.
    kernel, pooling : neighbours that scores are pooled over (odd; 1 turns pooling off), and how:
        ``"mean"`` or ``"max"``.
    """

    window: int = 32
    kernel: int = 7
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("window", self.window, 1)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, ("mean", "max"))

    def floor(self) -> int:
        return self.window + 1

    def needs(self, view: View) -> Needs:
        if view.phase == "decode" or not self.over(view):
            return Needs()
        rule = Best(
            self.limit(view),
            "own",
            self.kernel,
            self.pooling,
            recent=self.window,
            safeguard=self.competing,
        )
        return Needs(self.window, SCORES, retain=rule)

    def score(self, seen: Observation) -> Tensor:
        """The window's own entries are left out of the pooling."""
        assert seen.scores is not None
        recent = seen.positions > seen.view.seen_len - 1 - self.window
        return torch.where(recent, 0.0, seen.scores)


@named_options
@dataclass(frozen=True)
class SnapKV(WindowRetaining):
    """The same budget in every layer.

    capacity : entries per layer (the paper's main setting; not used with ``keep``).
    keep : replaces ``capacity``: see ``Retaining``; generated entries are kept in addition.
    """

    name: ClassVar[str] = "snapkv"

    capacity: int = 1024
