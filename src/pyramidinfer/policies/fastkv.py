"""FastKV: one layer that drops tokens, and cache budgets apart from it (Jo et al., 2502.01068).

After one middle layer only the tokens that the window attends to most go deeper, which saves
prefill compute.  Every layer's cache is cut to its budget by SnapKV's scores, which saves memory.
Both shares are set independently.

Deviation: where ``keep`` is above ``propagate_ratio``, the propagated share rises to ``keep``, so
that deep layers can fill their budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.base import Forecast
from pyramidinfer.policies.snapkv import SCORES, WindowRetaining
from pyramidinfer.types import Best, Layers, Needs, Observation, View

__all__ = ["FastKV"]


@named_options
@dataclass(frozen=True)
class FastKV(WindowRetaining):
    """Drop tokens after one layer, cut the cache of every layer.

    layer : the layer after which tokens are dropped.  None: just before the middle (15 of 32).  If
        it has a sliding window shorter than the text, the nearest earlier layer without one.
    propagate_ratio : share of the new tokens that goes deeper; at least ``keep``.
    retain_ratio : share of the text that each layer's cache keeps (not used with ``keep``).
    keep : replaces ``retain_ratio``: see ``Retaining``; generated entries are kept in addition.
    """

    name: ClassVar[str] = "fastkv"
    computes_less: ClassVar[bool] = True

    window: int = 8
    layer: int | None = None
    propagate_ratio: float = 0.2
    retain_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_whole("layer", self.layer, 0)
        check_share("propagate_ratio", self.propagate_ratio)
        check_share("retain_ratio", self.retain_ratio)

    def check(self, layers: Layers) -> None:
        if self.layer is not None and self.layer >= layers.count:
            raise ValueError(
                f"layer={self.layer}: the model has {layers.count} layers, 0 to {layers.count - 1}"
            )

    def entries(self, text_len: int) -> int:
        return round(self.retain_ratio * text_len)

    def needs(self, view: View) -> Needs:
        if view.phase == "decode" or not view.layers.governed[view.layer]:
            return Needs()
        needs, count = super().needs(view), self._count(view.new_len)
        if view.layer != self._at(view.layers) or count >= view.new_len:
            return needs
        rule = Best(count, "own", self.kernel, self.pooling, recent=self.window)
        return replace(needs, window=self.window, reduce=SCORES, propagate=rule)

    def score(self, seen: Observation) -> Tensor:
        """Tokens that go deeper are chosen by the mean score of all heads."""
        found = super().score(seen)
        return found.mean(0, keepdim=True) if len(seen.positions) == 1 else found

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        going = max(0, min(prompt_len, self._count(prompt_len)))
        reach = [prompt_len if i <= self._at(layers) else going for i in range(layers.count)]
        whole = super().forecast(prompt_len, max_new, layers)
        kept = [min(n, r + max_new) for n, r in zip(whole.kept, reach, strict=True)]
        return whole._replace(reach=reach, kept=kept)

    def _at(self, layers: Layers) -> int:
        """The layer that drops tokens: the requested one, or the nearest earlier governed layer."""
        wanted = max(0, layers.count // 2 - 1) if self.layer is None else self.layer
        eligible = [layer for layer in range(wanted + 1) if layers.governed[layer]]
        return eligible[-1] if eligible else layers.count

    def _count(self, length: int) -> int:
        return max(self.window + 1, int(length * max(self.propagate_ratio, self.keep or 0.0)))
