"""Rotary tables for rows of different requests, each in its own regime.

Some frequencies depend on a text's length: long-rope (Phi-3) has short ones up to
``original_max_position_embeddings`` and long ones beyond it; dynamic scaling grows with the length
of the text.  transformers uses the largest position in its input, so requests packed in one row
would affect each other; here, every row has the text length for its frequencies.  For long-rope, it
is fixed at admission by the length that the request may reach; for dynamic scaling, it is the
length of the text when the token is fed, as in transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyramidinfer.models.families import Family

__all__ = ["Rotary", "Tables", "count_positions"]

Tables = tuple[Tensor, Tensor]


class Rotary:
    """Cosines and sines of the family's rotary module, row by row."""

    def __init__(self, family: Family, body: nn.Module, config: Any) -> None:
        self.module: Any = copy.deepcopy(body.rotary_emb) if family.rotary else None
        self.kinds: list[str | None] = [None]
        if family.rotary_by_type:
            self.kinds = sorted(set(config.layer_types))
        scales = rope_scales(config)
        types = {scale.get("rope_type", "default") for scale in scales}
        self.long_from: int | None = None
        for scale in scales:
            if scale.get("rope_type") == "longrope":
                self.long_from = int(scale["original_max_position_embeddings"])
        #: frequencies scale with the text beyond this length
        self.grows_from: int | None = None
        if "dynamic" in types:
            self.grows_from = int(config.max_position_embeddings)
        #: angles depend on the position only, so they can be cached
        self.is_fixed = self.long_from is None and self.grows_from is None
        self._known: dict[str | None, Tables] = {}
        self._longest = count_positions(family, config)

    def is_long(self, longest: int) -> bool:
        """Whether a request that may reach ``longest`` tokens uses the long regime."""
        return self.long_from is not None and longest > self.long_from

    def regime(self, is_long: bool, length: int) -> int:
        """The text length for a token's frequencies; 0: those of short texts.

        is_long : of its request;  length : of the text, including the tokens fed in the same pass.
        """
        if self.long_from is not None:
            return self.long_from + 1 if is_long else 0
        return length if self.grows_from is not None and length > self.grows_from else 0

    def tables(
        self, like: Tensor, positions: Tensor, regimes: list[int]
    ) -> dict[str | None, Tables]:
        """(cos, sin) ``[n, dim]`` per layer type for positions ``[n]``, each in its regime.

        like : a tensor of the requested dtype."""
        if self.module is None:
            return {}
        return {kind: self._one(like, positions, regimes, kind) for kind in self.kinds}

    @property
    def rotated(self) -> int:
        """Number of rotated channels of a head."""
        if self.module is None:
            return 0
        kind = self.kinds[0]
        frequencies = getattr(self.module, "inv_freq" if kind is None else f"{kind}_inv_freq")
        return 2 * int(frequencies.shape[0])

    def angles(
        self, like: Tensor, positions: Tensor, regimes: list[int], kind: str | None = None
    ) -> Tables:
        """float32 (cos, sin) ``[n, rotated]`` of a kind of layer, rounded to the dtype of
        ``like``.  Fixed angles are computed once for all positions (on a CPU, for twice the
        positions used so far).
        """
        if not self.is_fixed:
            cos, sin = self._one(like, positions, regimes, kind)
            return cos.float().contiguous(), sin.float().contiguous()
        most = int(positions.max()) + 1 if like.is_cpu else self._longest  # no read from a GPU
        if kind not in self._known or most > len(self._known[kind][0]):
            every = torch.arange(2 * most if like.is_cpu else most, device=positions.device)
            cos, sin = self._one(like, every, [], kind)
            self._known[kind] = cos.float().contiguous(), sin.float().contiguous()
        cos, sin = self._known[kind]
        return cos[positions], sin[positions]

    def _one(self, like: Tensor, positions: Tensor, regimes: list[int], kind: str | None) -> Tables:
        arguments = () if kind is None else (kind,)
        if self.is_fixed:
            cos, sin = self.module(like, positions[None], *arguments)
            return cos[0], sin[0]
        found: Tables | None = None
        lengths = torch.tensor(regimes, device=positions.device)
        for length in set(regimes):
            rows = lengths == length
            here = torch.where(rows, positions, 0)
            if self.grows_from is not None:  # reset the longest text seen so far
                self.module(like, torch.zeros_like(here[None, :1]), *arguments)
            if length:  # transformers selects by the largest position
                here = torch.cat([here, here.new_tensor([length - 1])])
            cos, sin = (each[0, : len(rows)] for each in self.module(like, here[None], *arguments))
            if found is not None:
                choose = rows[:, None]
                cos, sin = torch.where(choose, cos, found[0]), torch.where(choose, sin, found[1])
            found = cos, sin
        assert found is not None, "no rows"
        return found


def rope_scales(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of every kind of layer."""
    scale = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in scale.values() if isinstance(each, dict)]
    return nested or [scale]


def count_positions(family: Family, config: Any) -> int:
    """Number of positions of a model: the config's, or that of its rotary scale if it is larger.

    Configs of Gemma 3, and scales that name the original length, include the scale already; others
    give the length before scaling.  Long-rope's factor follows from the config's length.
    """
    plain = most = int(config.max_position_embeddings)
    for scale in rope_scales(config):
        original = scale.get("original_max_position_embeddings")
        if scale.get("rope_type") not in ("yarn", "linear", "dynamic", "llama3"):
            continue
        if original is None and family.rotary_by_type:
            continue
        most = max(most, int((scale.get("factor") or 1) * (original or plain)))
    return most
