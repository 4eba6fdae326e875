"""Plain decoder layers in few steps: fused QKV and gate/up, prepacked weights, few buffers.

A layer is *plain* if it has Llama's structure: RMS norm, attention with rotary positions, RMS norm,
SiLU-gated MLP, all linears plain ``nn.Linear`` (or Phi-3's fused ones); or Gemma 3's: two more
norms before the residual additions, GELU, and norm weights that are stored minus one.  Arithmetic
and rounding are the same as in transformers' layer.  All other layers run through Hugging Face's
module.
"""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyramidinfer.attention import Scale
from pyramidinfer.cache import Pool
from pyramidinfer.cache.native import kernel_number
from pyramidinfer.models.adapters import PLACES, Adapter, Low, Part
from pyramidinfer.models.decode import Decoding, Ropes, Way
from pyramidinfer.models.decoder import Decoder
from pyramidinfer.models.ops import ADD, GATED, GELU, PLAIN, Heads, KernelOps, Ops
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.rotary import Tables
from pyramidinfer.models.routing import LayerCall
from pyramidinfer.models.sharding import RowSplit, SplitEmbedding
from pyramidinfer.models.weights import Rows
from pyramidinfer.native.library import LayerData, StepCall, pointer
from pyramidinfer.types import AttentionShape

__all__ = ["FusedDecoder", "fuse", "why_not"]

GELU_TANH = "gelu_pytorch_tanh"
#: Modules that are packed; the second is a linear that is split over ranks.
LINEARS = (nn.Linear, RowSplit)
#: Places of the packed linears of a layer.
_NAMES = {
    "qkv": [f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")],
    "out": ["self_attn.o_proj"],
    "gate_up": [f"mlp.{name}_proj" for name in ("gate", "up", "gate_up")],
    "down": ["mlp.down_proj"],
}
assert tuple(_NAMES) == PLACES


class FusedLayer:
    """One plain layer's weights, packed for ``ops``: this rank's part of them.  ``index``: its
    number among the rank's layers."""

    def __init__(
        self, layer: Any, index: int, shape: AttentionShape, rotated: int, ops: Ops, ranks: Ranks
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.shape, self.ops, self.ranks = index, shape, ops, ranks
        self.epsilon = _epsilon(layer.input_layernorm)
        self.norm1, second = _scale(layer.input_layernorm), layer.post_attention_layernorm
        self.after1: Tensor | None = None
        self.after2: Tensor | None = None
        self.gating = GATED
        if _is_gemma(layer):
            self.after1, second = _scale(second), layer.pre_feedforward_layernorm
            self.after2, self.gating = _scale(layer.post_feedforward_layernorm), GELU
        self.norm2 = _scale(second)
        self.qkv = _pack(ops, _parts(attention, "q_proj", "k_proj", "v_proj", "qkv_proj"), PLAIN)
        self.out = _pack(ops, [attention.o_proj], PLAIN)
        self.gate_up = _pack(ops, _parts(mlp, "gate_proj", "up_proj", "gate_up_proj"), GATED)
        self.down = _pack(ops, [mlp.down_proj], PLAIN)
        sizes = {n: m.out_features for n, m in layer.named_modules() if type(m) in LINEARS}
        #: By place: the linears that are packed there, in order, each with its number of outputs.
        self.linears = [
            {name: sizes[name] for name in names if name in sizes} for names in _NAMES.values()
        ]
        if not getattr(attention, "use_rope", True):
            rotated = 0
        self.heads = Heads(
            shape.heads,
            shape.kv_heads,
            shape.key_dim,
            rotated,
            _norm_of(attention, "q_norm"),
            _norm_of(attention, "k_norm"),
            self.epsilon,
        )
        scaling = getattr(attention, "scaling", None)
        scale = shape.key_dim**-0.5 if scaling is None else float(scaling)
        self.scale = Scale(scale, None, shape.window)

    @property
    def packed(self) -> list[Any]:
        return [self.qkv, self.out, self.gate_up, self.down]

    def __call__(self, flat: Tensor, rope: Tables, call: LayerCall) -> Tensor:
        """Run the flat row ``[rows, hidden]`` through the layer; returns fewer rows if ``call``
        says so.
        rope : float32 cos and sin, each ``[rows, rotated]``."""
        ops, heads, adapted = self.ops, self.heads, call.adapted
        low, *_ = Low.each(adapted, self.index)
        normed = ops.norm(flat, self.norm1, self.epsilon)
        qkv = ops.linear(normed, self.qkv, PLAIN, None, low).view(len(flat), -1, heads.size)
        ops.rotate(qkv, heads, *rope)
        queries, rest = qkv[:, : heads.heads], qkv[:, heads.heads :]
        keys, values = rest.chunk(2, dim=1)
        attended = call(queries, keys, values, self.scale)
        if call.going is not None:
            flat = flat[call.going]
            adapted = adapted and adapted.only(call.going)
        _, out, gate_up, down = Low.each(adapted, self.index)
        middle = self._summed(attended.flatten(1), self.out, flat, self.after1, out)
        normed = ops.norm(middle, self.norm2, self.epsilon)
        inner = ops.linear(normed, self.gate_up, self.gating, None, gate_up)
        return self._summed(inner, self.down, middle, self.after2, down)

    def _summed(
        self, inner: Tensor, weights: Any, residual: Tensor, after: Tensor | None, low: Low | None
    ) -> Tensor:
        """The residual plus the sum over ranks of the linear's outputs for their part ``inner``,
        with the norm ``after`` on the sum, if any."""
        if after is not None:
            added = self.ranks.sum(self.ops.linear(inner, weights, PLAIN, None, low))
            return residual + self.ops.norm(added, after, self.epsilon)
        if self.ranks.index:  # the first rank adds the residual
            return self.ranks.sum(self.ops.linear(inner, weights, PLAIN, None, low))
        return self.ranks.sum(self.ops.linear(inner, weights, ADD, residual, low))

    def pack_low_rank(self, parts: dict[str, Part]) -> list[Any]:
        """The packed parts of an adapter for this layer's linears, by place."""
        packed: list[Any] = []
        for place, (weights, linears) in enumerate(zip(self.packed, self.linears, strict=True)):
            mine, at = [], 0
            for name, size in linears.items():
                if name in parts:
                    mine.append(parts[name]._replace(at=at))
                at += size
            how = GATED if PLACES[place] == "gate_up" else PLAIN
            packed.append(self.ops.pack_low_rank(mine, weights, how) if mine else None)
        return packed


class FusedDecoder(Decoder):
    """All layers of a model and its head, packed for ``ops``."""

    is_fused = True
    layers: dict[int, FusedLayer]

    def __init__(self, plain: Decoder, layers: dict[int, FusedLayer], ops: Ops) -> None:
        super().__init__(plain.body, plain.head, plain.config, plain.rotary, plain.like, plain.own)
        self.layers, self.ops = layers, ops
        self.norm, self.epsilon = _scale(plain.body.norm), _epsilon(plain.body.norm)
        has_head = plain.config.num_hidden_layers == plain.own.stop
        head, table = plain.head, plain.body.embed_tokens
        self.packed_head = _pack_table(ops, head) if has_head else None
        #: The packed embedding, if its rows are codes or shared with the head.
        self.packed_table: Any = None
        if has_head and isinstance(ops, KernelOps) and table.weight is head.weight:
            self.packed_table = self.packed_head
        elif is_coded(ops) and (ops.weights != "gguf" or isinstance(_held(table), Rows)):
            self.packed_table = _pack_table(ops, table)
        self._layers_of: WeakKeyDictionary[Pool, Any] = WeakKeyDictionary()

    @property
    def weight_bytes(self) -> int:
        packed = [each for layer in self.layers.values() for each in layer.packed]
        packed += [self.packed_head, self.packed_table]
        sizes = list(map(packed_bytes, {id(each): each for each in packed}.values()))
        skipped = LINEARS if self.packed_table is None else (*LINEARS, nn.Embedding)
        for module in self.body.modules():
            if not isinstance(module, skipped):
                sizes += [each.nbytes for each in module.parameters(recurse=False)]
        return sum(sizes)

    @property
    def step_bytes(self) -> int:
        """Bytes of linears and head, which a decode step reads once."""
        packed = [each for layer in self.layers.values() for each in layer.packed]
        return sum(map(packed_bytes, [*packed, self.packed_head]))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.packed_table is None:
            return super().embed(ids, positions)
        if not _is_split(table := self.body.embed_tokens):
            return self._rows(ids)
        found: Tensor = table.look_up(ids, self._rows)
        return found

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of this rank's part of the packed embedding."""
        assert isinstance(self.ops, KernelOps)
        rows = self.ops.rows(self.packed_table, ids)
        scale = getattr(_whole_or_part(self.body.embed_tokens), "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)

    def take_adapter(self, adapter: Adapter) -> None:
        packed = []
        for number, layer in self.layers.items():
            packed += layer.pack_low_rank(adapter.parts.get(number, {}))
        adapter.take(packed)
        adapter.parts = {}  # the packed copy has them

    def ropes(self, positions: Tensor, regimes: list[int]) -> Ropes:
        angles = self.rotary.angles
        return {kind: angles(self.like, positions, regimes, kind) for kind in self.rotary.kinds}

    def logits(self, hidden: Tensor) -> Tensor:
        normed = self.ops.norm(hidden, self.norm, self.epsilon)
        logits = self.ops.linear(normed, self.packed_head, PLAIN)
        return self.family.logits(self.config, logits)

    @property
    def way(self) -> Way:
        """All layers run in one call of the C++ kernels, unless ranks meet in every layer."""
        alone = self.layers[self.own.start].ranks.size == 1
        return "whole" if isinstance(self.ops, KernelOps) and alone else "layers"

    def step(self, pool: Pool, decoding: Decoding, hidden: Tensor) -> Tensor:
        ops, plan, own = self.ops, decoding.plan, self.own
        first, here = self.layers[own.start], slice(own.start, own.stop)
        assert isinstance(ops, KernelOps)
        heads, depth, rows = first.heads, len(self.layers), len(hidden)
        tables = [decoding.ropes[kind] for kind in self.rotary.kinds]
        rope = [torch.stack(each) for each in zip(*tables, strict=True)]
        x, lse, addresses = hidden.clone(), decoding.lse, None
        if lse is None:
            lse = torch.empty(depth, rows, heads.heads)
        if decoding.size.scores:
            probs = [lse.new_empty(rows, heads.kv_heads, longest) for longest in plan.longest[here]]
            addresses = (ctypes.c_void_p * depth)(*map(pointer, probs))
            decoding.weights.by_layer.update(zip(own, probs, strict=True))
        longest = torch.tensor(plan.longest[here])
        held = (
            *rope,
            decoding.pages[here],
            decoding.offsets[here],
            plan.tables[here],
            plan.lengths[here],
            plan.positions,
            longest,
            None if decoding.queries is None else decoding.queries[here],
            lse if decoding.lse is None else lse[here],
        )
        call = StepCall(
            self._layer_data(pool),
            depth,
            x.shape[1],
            first.gate_up.columns,
            heads.heads,
            heads.kv_heads,
            heads.size,
            pool.page_size,
            rows,
            plan.tables.shape[3],
            rope[0].shape[-1],
            kernel_number(pool.group(own.start)),
            *map(pointer, held),
            None if addresses is None else ctypes.addressof(addresses),
            None if decoding.adapted is None else ctypes.addressof(decoding.adapted.call),
            pointer(ops.seconds),
        )
        ops.kernels.run_step(ops.kind, ctypes.byref(call), pointer(x))
        return x

    def _layer_data(self, pool: Pool) -> Any:
        """The layers as C structures; created once per pool."""
        if pool not in self._layers_of:
            data = (LayerData * len(self.layers))()
            for index, (number, layer) in enumerate(self.layers.items()):
                group, heads = pool.group(number), layer.heads
                data[index] = LayerData(
                    pointer(layer.norm1),
                    pointer(layer.norm2),
                    pointer(layer.after1),
                    pointer(layer.after2),
                    layer.qkv.data,
                    layer.out.data,
                    layer.gate_up.data,
                    layer.down.data,
                    pointer(group.keys),
                    pointer(group.values),
                    pointer(group.positions),
                    pointer(group.scores),
                    pointer(group.key_scales),
                    pointer(group.value_scales),
                    pointer(heads.query_norm),
                    pointer(heads.key_norm),
                    layer.scale.scale,
                    heads.epsilon,
                    layer.scale.window or 0,
                    self.rotary.kinds.index(self.kinds[number]) if heads.rotated else -1,
                    layer.gating,
                    layer.norm1.dtype == torch.float32,
                )
            self._layers_of[pool] = data
        return self._layers_of[pool]


def fuse(
    plain: Decoder, shapes: list[AttentionShape], ops: Ops | None, ranks: Ranks, *, own: bool
) -> Decoder:
    """The model's layers packed for ``ops``, or the model's own modules if they are not plain or
    packing has no benefit.  ``shapes``: of all layers on this rank.

    ``own`` : the engine owns the model, so packed weights are freed.  Otherwise the model stays
    unchanged, and packed weights take additional memory.
    """
    if ops is None or plain.like.is_meta or why_not(plain, shapes, ops, ranks) is not None:
        return plain
    body, head = plain.body, plain.head
    packed = {}
    if own:
        _unmap([body.norm, *(body.layers[number] for number in plain.own)])
    for number in plain.own:
        layer, index = body.layers[number], number - plain.own.start
        packed[number] = FusedLayer(layer, index, shapes[number], plain.rotary.rotated, ops, ranks)
        if own:
            _free([each for each in layer.modules() if type(each) in LINEARS])
    fused = FusedDecoder(plain, packed, ops)
    if own and (head.weight is not body.embed_tokens.weight or fused.packed_table is not None):
        _free([head])
    if own and fused.packed_table is not None:
        table = _whole_or_part(body.embed_tokens)
        table.weight = _nothing_of(table.weight)
    return fused


def why_not(plain: Decoder, shapes: list[AttentionShape], ops: Ops, ranks: Ranks) -> str | None:
    """The reason why a model's layers cannot be packed for ``ops``, or None; needs no weights."""
    body, head, config, family = plain.body, plain.head, plain.config, plain.family
    if not family.plain:
        return f"layers of {family.title} are not of Llama's kind"
    layers = [body.layers[i] for i in plain.own]
    if not layers:
        return "there is no layer"
    if not all(map(_is_plain, layers)):
        return "its layers have linears of other kinds, weights of several dtypes, or were changed"
    is_gemma = any(map(_is_gemma, layers))
    if is_gemma and not ops.has_gemma:
        return f"layers of {family.title} are packed for the CPU kernels only"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps the logits of attention"
    if type(head) is not nn.Linear or not (_is_untouched(head) and _is_untouched(body.norm)):
        return "its head or last norm was changed"
    inner = ranks.part(config.intermediate_size)
    heads = shapes[0].heads * shapes[0].key_dim
    sizes = (config.hidden_size, inner.stop - inner.start, heads)
    if any(size % ops.multiple for size in sizes):
        return f"sizes {sizes} are not multiples of {ops.multiple}"
    name, wanted = ("hidden_activation", GELU_TANH) if is_gemma else ("hidden_act", "silu")
    if (act := getattr(config, name, None)) != wanted:
        return f"its MLP is gated by {act!r}, not {wanted!r}"
    return None


def is_coded(ops: Ops | None) -> bool:
    """Whether weights are packed as codes."""
    return isinstance(ops, KernelOps) and ops.weights != "auto"


def packed_bytes(packed: Any) -> int:
    """Bytes of a result of ``Ops.pack``; 0 for None."""
    parts = packed if isinstance(packed, tuple) else [packed]
    return sum(each.nbytes for each in parts if each is not None)


def _is_plain(layer: Any) -> bool:
    if not all(map(_is_untouched, layer.modules())) or not _is_uniform(layer):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        *_parts(attention, "q_proj", "k_proj", "v_proj", "qkv_proj"),
        *_parts(mlp, "gate_proj", "up_proj", "gate_up_proj"),
        getattr(attention, "o_proj", None),
        getattr(mlp, "down_proj", None),
    ]
    names = ("input_layernorm", "post_attention_layernorm")
    epsilon = "eps" if _is_gemma(layer) else "variance_epsilon"
    return all(type(each) in LINEARS for each in linears) and all(
        hasattr(getattr(layer, name, None), epsilon) for name in names
    )


def _is_gemma(layer: Any) -> bool:
    """Whether there are also norms after attention and MLP, all of Gemma's kind."""
    return hasattr(layer, "pre_feedforward_layernorm")


def _is_uniform(module: nn.Module) -> bool:
    """Whether all parameters are plain contiguous tensors of one dtype, whose memory can be
    read."""
    parameters = [each.data for each in module.parameters()]
    return len({each.dtype for each in parameters}) == 1 and all(
        type(each) is Tensor and each.is_contiguous() for each in parameters
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module is an unmodified class of torch or transformers."""
    home = type(module).__module__.partition(".")[0]
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    known = home in ("torch", "transformers") or type(module) is RowSplit
    return known and not hooked


def _parts(module: Any, *names: str) -> list[Any]:
    """The existing linears: separate ones, or the fused one (the last name)."""
    if hasattr(module, names[-1]):
        return [getattr(module, names[-1])]
    return [getattr(module, name, None) for name in names[:-1]]


def _norm_of(module: Any, name: str) -> Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else _scale(norm)


def _scale(norm: Any) -> Tensor:
    """A norm's factors; in float32 if its weights are stored minus one (Gemma)."""
    weight: Tensor = norm.weight.data
    return weight if hasattr(norm, "variance_epsilon") else 1.0 + weight.float()


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _pack(ops: Ops, linears: list[Any], how: int) -> Any:
    weights = list(map(_held, linears))
    biases = [None if each.bias is None else each.bias.data for each in linears]
    if how == GATED and len(weights) == 1:
        weights = list(weights[0].chunk(2))
        biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
    return ops.pack(weights, biases, how)


def _pack_table(ops: Ops, table: Any) -> Any:
    bias = getattr(table, "bias", None)
    return ops.pack_table([_held(table)], [None if bias is None else bias.data])


def _is_split(table: nn.Module) -> bool:
    return isinstance(table, SplitEmbedding)


def _whole_or_part(table: Any) -> Any:
    """The embedding with this weight: of the whole vocabulary, or of this rank's part."""
    return table.part if _is_split(table) else table


def _held(module: Any) -> Any:
    """A linear's or an embedding's weights: a tensor, or ``Rows`` of a GGUF file."""
    return getattr(module, "rows", None) or module.weight.data


def _unmap(modules: list[nn.Module]) -> None:
    """Copy the parameters that are not packed (norms): views of them would keep the whole weight
    file mapped into memory."""
    for module in modules:
        for each in module.modules():
            if type(each) not in LINEARS:
                for parameter in each.parameters(recurse=False):
                    parameter.data = parameter.data.clone()


def _free(linears: list[nn.Linear]) -> None:
    for each in linears:
        each.weight = _nothing_of(each.weight)
        each.register_parameter("bias", None)


def _nothing_of(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(0), requires_grad=False)
