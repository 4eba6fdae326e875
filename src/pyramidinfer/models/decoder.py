"""A model's decoder layers and its head, called layer by layer or in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyramidinfer.cache import Pool
from pyramidinfer.models.adapters import Adapted, Adapter, Part, add_parts
from pyramidinfer.models.decode import Decoding, Ropes, Way
from pyramidinfer.models.families import find_family
from pyramidinfer.models.ranks import ALONE
from pyramidinfer.models.rotary import Rotary, Tables
from pyramidinfer.models.routing import LayerCall, route, shallow
from pyramidinfer.models.sharding import RowSplit

__all__ = ["Decoder"]


class AdaptedLinear(nn.Module):
    """A linear of a model that also adds the rows' adapters, before a sum over ranks."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.partial, self.ranks = linear, linear.__call__, ALONE
        if isinstance(linear, RowSplit):
            self.partial, self.ranks = linear.partial, linear.ranks
        self.parts: dict[Adapter, Part] = {}
        self.adapted: Adapted | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.partial(x)
        if self.adapted is not None:
            for adapter, rows in self.adapted.rows(x.device):
                if adapter in self.parts:
                    add_parts(
                        out.view(-1, out.shape[-1]),
                        x.view(-1, x.shape[-1]),
                        rows,
                        [self.parts[adapter]],
                    )
        return self.ranks.sum(out)


class ModuleLayer:
    """A Hugging Face decoder layer that attends through the given call."""

    def __init__(self, layer: nn.Module, attention: str) -> None:
        self.module = route(layer, attention)
        self.adapted: dict[str, AdaptedLinear] = {}  # by name: linears with adapters

    def take_parts(self, adapter: Adapter, parts: dict[str, Part]) -> None:
        """Let linears of the copied layer add an adapter's parts; the given layer does not
        change."""
        for name, part in parts.items():
            if name not in self.adapted:
                *inside, leaf = name.split(".")
                module = self.module
                for step in inside:
                    module._modules[step] = shallow(module.get_submodule(step))
                    module = module.get_submodule(step)
                self.adapted[name] = AdaptedLinear(module.get_submodule(leaf))
                module._modules[leaf] = self.adapted[name]
            self.adapted[name].parts[adapter] = part

    def __call__(self, flat: Tensor, rope: Tables | None, call: LayerCall) -> Tensor:
        for linear in self.adapted.values():
            linear.adapted = call.adapted
        extra = {} if rope is None else {"position_embeddings": (rope[0][None], rope[1][None])}
        out: Tensor = self.module(flat[None], attention_mask=None, layer_call=call, **extra)
        if call.scale is None:
            raise ValueError(f"layer {call.layer} did not call the given attention function")
        return out[0]


class Decoder:
    """A model's decoder layers and its head: its own modules, or (``FusedDecoder``) packed weights.

    layers : by number, those in ``own``; each takes the flat row ``[rows, hidden]``, the rows' cos
    and sin (None where there are no rotary positions) and the ``LayerCall`` to attend through, and
    returns the flat row's outputs.
    ``is_fused``: a layer returns only the rows that its call needs, and reads nothing from the
    device, so that a step may be captured in a CUDA graph.
    """

    is_fused = False
    layers: Mapping[int, Callable[[Tensor, Any, LayerCall], Tensor]]

    def __init__(
        self, body: Any, head: Any, config: Any, rotary: Rotary, like: Tensor, own: range
    ) -> None:
        """like : a tensor of the model's dtype on its device."""
        self.family, self.body, self.head, self.config = find_family(config), body, head, config
        self.rotary, self.like, self.own = rotary, like, own
        #: Kinds of rotary positions, by layer.
        self.kinds: list[str | None] = [None] * config.num_hidden_layers
        if self.family.rotary_by_type:
            self.kinds = list(config.layer_types)
        self.layers = {i: ModuleLayer(body.layers[i], self.family.attention) for i in own}

    def take_adapter(self, adapter: Adapter) -> None:
        """Prepare an adapter for the rows that use it."""
        for number, layer in self.layers.items():
            assert isinstance(layer, ModuleLayer)
            layer.take_parts(adapter, adapter.parts.get(number, {}))

    @property
    def way(self) -> Way:
        """How decode-only steps run."""
        return "layers"

    def run(self, flat: Tensor, call: LayerCall) -> Tensor:
        """Run the flat row ``[rows, hidden]`` through the layer of the call."""
        return self.layers[call.layer](flat, self._rope(call), call)

    def _rope(self, call: LayerCall) -> Tables | None:
        """cos and sin of decode rows, then of those of segments; None without rotary positions."""
        parts, kind = [] if call.decoding is None else [call.decoding.ropes], self.kinds[call.layer]
        if call.segments:
            places, regimes = [], []
            for prefill, _, count in call.segments:
                rows = slice(prefill.done, prefill.done + count)
                places.append(prefill.positions[rows] - prefill.sequence.offset)
                regime = self.rotary.regime(prefill.sequence.is_long, prefill.end)
                regimes += [regime] * count
            parts.append(self.ropes(torch.cat(places), regimes))
        ropes = [part[kind] for part in parts if kind in part]
        if len(ropes) < 2:
            return ropes[0] if ropes else None
        cos, sin = (torch.cat(each) for each in zip(*ropes, strict=True))
        return cos, sin

    def ropes(self, positions: Tensor, regimes: list[int]) -> Ropes:
        """cos and sin of rows at rotary positions ``[n]``, each in its regime."""
        return self.rotary.tables(self.like, positions, regimes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in use; tied weights count once."""
        found = [*self.body.parameters(), *self.head.parameters()]
        return sum(each.nbytes for each in {id(each): each for each in found}.values())

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens ``[n]`` → ``[n, hidden]``."""
        return self.family.embed(self.body, self.config, ids[None], positions[None])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: ``[n, hidden]`` → ``[n, vocab]``."""
        normed = self.family.finish(self.body, self.config, hidden)
        return self.family.logits(self.config, self.head(normed))

    def step(self, pool: Pool, decoding: Decoding, hidden: Tensor) -> Tensor:
        """Run the decode rows ``[R, hidden]`` through all layers in one call, if ``way`` is
        ``"whole"``."""
        raise NotImplementedError
