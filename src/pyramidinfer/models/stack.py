"""State that a model's layers share: sizes, implementations, and the ranks that split them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.cache import GroupSpec, Place
from pyramidinfer.codec import find_codec
from pyramidinfer.models.device import Device
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.stages import Stages
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.types import AttentionShape, Layers

__all__ = ["Stack"]


class Stack:
    """A model's layers, as attention, eviction and memory use them; base class of ``ModelRunner``.

    shapes : of every layer, of all ranks together;  chosen : the implementations for the model's
    device;  ranks, stages : this rank's part of the layers;  scales : of every layer's logits,
    None until the layer has run;  span : for profilers: a context that is entered around the
    selection of entries, with the name ``"retain"`` at a layer's end in prefill and ``"evict"`` in
    decode.
    """

    dtype: torch.dtype
    shapes: list[AttentionShape]
    chosen: Device
    ranks: Ranks
    stages: Stages
    streaming: Streaming
    scales: list[Scale | None]
    span: Callable[[str], AbstractContextManager[None]]

    @property
    def depth(self) -> int:
        return len(self.shapes)

    @property
    def kv_heads(self) -> int:
        """KV heads of every layer."""
        return self.shapes[0].kv_heads

    @property
    def backend(self) -> Backend:
        return self.chosen.attention

    @property
    def places(self) -> list[Place]:
        """Every rank's place in the cache: the ranks of the first stage, then of the next one."""
        return [
            Place(layers, heads)
            for layers in self.stages.layers
            for heads in self.ranks.heads_by_rank(self.kv_heads)
        ]

    @property
    def rank(self) -> int:
        """This rank's number in ``places``."""
        return self.stages.index * self.ranks.size + self.ranks.index

    def scale(self, layer: int) -> Scale:
        """The scale of the logits of a layer that has run."""
        scale = self.scales[layer]
        assert scale is not None
        return scale

    def group_specs(self, kv_dtype: str = "auto") -> list[GroupSpec]:
        """Layers grouped by the size of their entries, stored in ``kv_dtype``.  ``ValueError``
        if this model's heads cannot be stored this way."""
        codec = find_codec(kv_dtype)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in enumerate(self.shapes):
            key = (shape.kv_heads, shape.key_dim, shape.value_dim)
            groups.setdefault(key, []).append(layer)
        if codec is not None:
            for _, *sizes in groups:
                for size in sizes:
                    codec.group(size)  # raises if it cannot divide the heads
        return [GroupSpec(tuple(layers), *key, self.dtype, codec) for key, layers in groups.items()]

    def layers_for(self, longest: int) -> Layers:
        """The depth for a request of at most ``longest`` tokens: windows that are longer do not
        count."""
        windows = (shape.window for shape in self.shapes)
        governed = tuple(window is None or window >= longest for window in windows)
        return Layers(governed, self.kv_heads)
