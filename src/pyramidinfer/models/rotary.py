"""Rotary tables for rows of different requests, each in its own regime.

Long-rope (Phi-3) picks its frequencies by the sequence's length: short up to
``original_max_position_embeddings``, long beyond.  transformers looks at the largest position it
is given, so requests packed in one row would choose for each other; here the regime is a
property of the request, fixed at admission by the length it may reach.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyramidinfer.models.families import Family

__all__ = ["Rotary"]

Tables = tuple[Tensor, Tensor]


class Rotary:
    """Cosines and sines of the family's own rotary module, row by row."""

    def __init__(self, family: Family, body: nn.Module, config: Any) -> None:
        self.module: Any = copy.deepcopy(body.rotary_emb) if family.rotary else None
        self.kinds: list[str | None] = [None]
        if family.rotary_by_type:
            self.kinds = sorted(set(config.layer_types))
        self.long_from: int | None = None
        parameters = getattr(config, "rope_parameters", None) or {}
        if parameters.get("rope_type") == "longrope":
            self.long_from = int(parameters["original_max_position_embeddings"])
        #: angles go by position alone, so that those worked out once stay right
        self.is_fixed = parameters.get("rope_type", "default") not in ("longrope", "dynamic")
        self._known: Tables | None = None
        self._longest = int(config.max_position_embeddings)

    def is_long(self, longest: int) -> bool:
        """Whether a request that may reach ``longest`` tokens uses the long regime."""
        return self.long_from is not None and longest > self.long_from

    def tables(self, like: Tensor, positions: Tensor, is_long: Tensor) -> dict[str | None, Tables]:
        """(cos, sin) ``[1, n, dim]`` per layer type for positions ``[n]``; dtype of ``like``."""
        if self.module is None:
            return {}
        return {kind: self._one(like, positions, is_long, kind) for kind in self.kinds}

    @property
    def turned(self) -> int:
        """Numbers of a head that have an angle."""
        return 0 if self.module is None else 2 * int(self.module.inv_freq.shape[0])

    def angles(self, like: Tensor, positions: Tensor, is_long: Tensor) -> Tables:
        """float32 (cos, sin) ``[n, turned]``, rounded as the dtype of ``like`` has them.

        For families with one kind of table.  Fixed angles are worked out once for all positions
        (on a CPU for those that came up so far and as many again).
        """
        if not self.is_fixed:
            cos, sin = self._one(like, positions, is_long, None)
            return cos[0].float().contiguous(), sin[0].float().contiguous()
        most = int(positions.max()) + 1 if like.is_cpu else self._longest  # no look at a GPU
        if self._known is None or most > len(self._known[0]):
            every = torch.arange(2 * most if like.is_cpu else most, device=positions.device)
            cos, sin = self.module(like, every[None])
            self._known = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._known[0][positions], self._known[1][positions]

    def _one(self, like: Tensor, positions: Tensor, is_long: Tensor, kind: str | None) -> Tables:
        arguments = () if kind is None else (kind,)
        if self.long_from is None or not bool(is_long.any()):
            cos, sin = self.module(like, positions[None], *arguments)
            return cos, sin
        # One position in the long range makes transformers choose the long frequencies for all.
        far = torch.tensor([self.long_from], device=positions.device)
        cos, sin = self.module(like, torch.cat([positions, far])[None], *arguments)
        cos, sin = cos[:, :-1], sin[:, :-1]
        if not bool(is_long.all()):
            near = torch.where(is_long, 0, positions)
            short_cos, short_sin = self.module(like, near[None], *arguments)
            choose = is_long[None, :, None]
            cos, sin = torch.where(choose, cos, short_cos), torch.where(choose, sin, short_sin)
        return cos, sin
