"""SnapKV: what the prompt's last queries look at (Li et al., 2404.14469).

After prefill each KV head keeps the window and the entries that the window's queries gave most
attention to, smoothed over neighbours so that clusters stay whole.  Nothing is evicted later.

Deviation: query heads that share a KV head are averaged, since they share its entries (the
official code selects per query head, on repeated keys).  A further text (``extend``) shorter than
the window scores with its own queries only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pyramidinfer.config import check_choice, check_share, check_whole, named_options
from pyramidinfer.policies.base import Forecast, keep_best, pool_neighbours
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Keep, Layers, Needs, Observation, Reduce, State, View

__all__ = ["SnapKV", "WindowRetaining", "check_kernel"]


def check_kernel(kernel: object) -> None:
    """``ValueError`` unless a pooling kernel: odd and above 0."""
    check_whole("kernel", kernel, 1)
    if kernel % 2 == 0:  # type: ignore[operator]
        raise ValueError(f"kernel={kernel!r} must be odd, so that it has a middle")


@dataclass(frozen=True)
class WindowRetaining(Retaining):
    """Retention by pooled window attention per KV head: SnapKV and those built on it.

    window : newest queries that score, and newest entries that stay.
    kernel, pooling : neighbours smoothed over (odd; 1 is off), and ``"mean"`` or ``"max"``.
    adaptive : a layer's entries go to the best scores of all its heads together, so that each KV
        head has a number of its own (Ada-KV, Feng et al., 2407.11550, algorithm 1); else all heads
        keep as many.
    safeguard : share of the even budget that no head falls below with ``adaptive``.
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "mean"
    adaptive: bool = False
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("safeguard", self.safeguard)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive={self.adaptive!r} must be True or False")
        if self.safeguard != WindowRetaining.safeguard and not self.adaptive:
            raise ValueError(
                f"safeguard={self.safeguard} has no effect unless adaptive=True; leave it out"
            )
        check_whole("window", self.window, 1)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, ("mean", "max"))

    def floor(self) -> int:
        return self.window + 1

    def needs(self, view: View) -> Needs:
        if view.phase == "decode" or not self.over(view):
            return Needs()
        return Needs(window=self.window, reduce=Reduce("kv_mean", "sum"), retain=True)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        assert seen.scores is not None
        recent = seen.positions > seen.view.seen_len - 1 - self.window
        context = torch.where(recent, 0.0, seen.scores)  # not smoothed into the context
        pooled = pool_neighbours(context, seen.positions, self.kernel, self.pooling)
        limit: int | torch.Tensor = self.limit(seen.view)
        if self.adaptive:
            limit = self._own_limits(pooled, recent, seen)
        return keep_best(seen, pooled, limit, recent | seen.protected), state

    def _own_limits(self, scores: torch.Tensor, recent: torch.Tensor, seen: Observation
                    ) -> torch.Tensor:  # fmt: skip
        """Entries of each head, ``[kv_heads]``: its part of the layer's best, never less than the
        safeguard, and the window."""
        heads, even = len(scores), self.limit(seen.view) - self.window
        lengths = torch.tensor(seen.view.head_lens, device=scores.device)
        there = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
        context = torch.where(there & ~recent, scores, -torch.inf)
        best = context.flatten().topk(min(heads * even, int(there.sum()))).indices
        won = torch.bincount(best // scores.shape[1], minlength=heads).cpu()
        own = (1 - self.safeguard) * won + self.safeguard * even
        return self.window + own.round().long()

    def over(self, view: View) -> bool:
        held = sum(view.head_lens) / len(view.head_lens) if self.adaptive else view.kept_len
        return view.layers.governed[view.layer] and held > self.limit(view)

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        even = super().forecast(prompt_len, max_new, layers)
        if not self.adaptive:
            return even
        most = [min(prompt_len, layers.kv_heads * (kept - max_new)) + max_new for kept in even.kept]
        total = [layers.kv_heads * (kept + 1) for kept in even.kept]  # each is rounded
        return Forecast(even.reach, most, total=total)


@named_options
@dataclass(frozen=True)
class SnapKV(WindowRetaining):
    """The same budget in every layer.

    capacity : entries per layer (the paper's main setting; not used with ``keep``).
    keep : instead of ``capacity``: see ``Retaining``; generated entries come on top.
    """

    name: ClassVar[str] = "snapkv"

    capacity: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("capacity", self.capacity, 1)

    def entries(self, text_len: int) -> int:
        return self.capacity
