"""A model split over ranks: each keeps its part of the heads, of the MLP and of the vocabulary.

The split of each linear follows transformers' plan of the model (``base_model_tp_plan``), or the
family's plan in ``models/families.py`` if transformers has none or one that gathers all heads on
every rank.  ``colwise``: outputs are split;  ``rowwise``: inputs are split, and the ranks' outputs
are summed, with the bias once;  ``packed``: the stacked outputs of several linears, each of them
split; ``norm``: a norm over a split row.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyramidinfer.models.adapters import Adapter, Part
from pyramidinfer.models.families import find_family
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.types import AttentionShape

#: Words of a weight that are summed together (``weights_mark``).
PART = 64

__all__ = ["RowSplit", "SplitEmbedding", "plan_of", "split_adapter", "split_model", "weights_mark"]

#: Values in transformers' plans for modules that every rank keeps whole.
WHOLE = ("replicated_with_grad_allreduce", "sequence_parallel")


class RowSplit(nn.Linear):
    """A linear of which this rank has some input columns; its outputs are summed over the ranks.

    The first rank adds the bias.  ``summed`` is the output of the whole model's linear.
    """

    def __init__(self, whole: nn.Linear, columns: slice, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns.stop - columns.start, whole.out_features
        self.weight = _kept(whole.weight[:, columns])
        bias = whole.bias if ranks.index == 0 else None
        self.register_parameter("bias", None if bias is None else _kept(bias))
        self.ranks = ranks

    def partial(self, inputs: Tensor) -> Tensor:
        """This rank's part of the sum."""
        return F.linear(inputs, self.weight, self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.ranks.sum(self.partial(inputs))


class SplitEmbedding(nn.Module):
    """An embedding of which this rank has some rows; ``whole`` is cut to these rows."""

    def __init__(self, whole: nn.Embedding, ranks: Ranks) -> None:
        super().__init__()
        part = ranks.part(whole.num_embeddings)
        self.first, self.count = part.start, part.stop - part.start
        whole.weight = _kept(whole.weight[part])
        whole.padding_idx = None
        self.part, self.ranks = whole, ranks

    @property
    def weight(self) -> Tensor:
        return self.part.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.part)

    def look_up(self, ids: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """The embedding, computed with a function that returns this rank's rows (counted from its
        first)."""
        local = ids - self.first
        mine = (local >= 0) & (local < self.count)
        found = rows(torch.where(mine, local, 0))
        return self.ranks.sum(torch.where(mine[..., None], found, 0), "embedding")


class SplitNorm(nn.Module):
    """A root mean square norm over a row of which every rank has a part."""

    def __init__(self, whole: Any, part: slice, size: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.epsilon = _kept(whole.weight[part]), whole.variance_epsilon
        self.size, self.ranks = size, ranks

    def forward(self, row: Tensor) -> Tensor:
        wide = row.float()  # as transformers' norm, in every dtype
        squares = self.ranks.sum(wide.pow(2).sum(-1, keepdim=True))
        normed = wide * torch.rsqrt(squares / self.size + self.epsilon)
        out: Tensor = (self.weight * normed).to(row.dtype)
        return out


def plan_of(config: Any) -> dict[str, str]:
    """How the linears of the model's body are split, by pattern of their names."""
    family = find_family(config)
    plan = dict(getattr(config, "base_model_tp_plan", None) or {}) | family.split
    if not plan:
        raise ValueError(f"{family.title} has no plan for tensor parallelism")
    return plan


def weights_mark(model: nn.Module) -> str:
    """A mark that shows whether two ranks loaded the same weights: sums of every tensor's bits, and
    of its parts weighted by place."""
    digest = hashlib.sha256()
    tensors = dict(model.named_parameters())
    for name, module in model.named_modules():
        if (rows := getattr(module, "rows", None)) is not None:  # rows of a GGUF file
            tensors[f"{name}.rows"] = rows.held
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().contiguous().view(torch.uint8).flatten()
        words = bits[: len(bits) // 4 * 4].view(torch.int32)
        parts = words[: len(words) // PART * PART].view(-1, PART).sum(1, dtype=torch.int64)
        places = torch.arange(1, len(parts) + 1)
        rest = int(words[len(parts) * PART :].sum(dtype=torch.int64))
        total = int((parts * places).sum()), rest, int(bits[len(words) * 4 :].sum())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def split_model(model: Any, shape: AttentionShape, ranks: Ranks) -> None:
    """Cut a loaded model, in place, to this rank's part.

    shape : of the whole model's attention layers.
    """
    config = model.config
    body, family = model.get_submodule(find_family(config).body), find_family(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    plan = plan_of(config)
    for name, module in list(body.named_modules()):
        found = _how(plan, name)
        if found is not None and name.startswith("layers."):
            _split(body, name, module, found, shape, ranks)
    for layer in body.layers:
        _tell_heads(getattr(layer, family.attention), ranks.own(shape))
    replaced = SplitEmbedding(embedding, ranks)
    for name, module in list(model.named_modules()):
        for child, each in list(module._modules.items()):
            if each is embedding and name != "" and not isinstance(module, SplitEmbedding):
                module._modules[child] = replaced
    head.weight = embedding.weight if tied else _kept(head.weight[ranks.part(head.out_features)])
    if head.bias is not None:
        head.bias = _kept(head.bias[ranks.part(head.out_features)])
    head.out_features = len(head.weight)


def split_adapter(
    adapter: Adapter, config: Any, shape: AttentionShape, ranks: Ranks, layers: Iterable[int]
) -> None:
    """Cut an adapter of the whole model, in place, to this rank's layers and its part of them.

    ``down`` is cut like the inputs of its linear and ``up`` like the outputs, so that the adapter's
    outputs are split, and summed, together with the linear's own outputs.
    """
    plan = plan_of(config) if ranks.size > 1 else {}
    adapter.parts = {
        layer: {
            place: _split_part(part, f"layers.{layer}.{place}", plan, shape, ranks)
            for place, part in adapter.parts.get(layer, {}).items()
        }
        for layer in layers
    }


def _split_part(
    part: Part, name: str, plan: dict[str, str], shape: AttentionShape, ranks: Ranks
) -> Part:
    how = _how(plan, name)
    if how is None:
        return part
    if how == "rowwise":
        columns = _rows(name, part.down.shape[1], shape, ranks)[0]
        return part._replace(down=part.down[:, columns].clone())
    rows = _rows(name, len(part.up), shape, ranks, packed=how == "packed")
    return part._replace(up=torch.cat([part.up[each] for each in rows]))


def _how(plan: dict[str, str], name: str) -> str | None:
    """How a module is split by the plan; None if every rank keeps it whole."""
    for pattern, how in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
            return None if how in WHOLE else how
    return None


def _split(
    body: nn.Module, name: str, module: Any, how: str, shape: AttentionShape, ranks: Ranks
) -> None:
    """Cut one module; ``ValueError`` for an unknown split."""
    if how == "rowwise":
        columns = _rows(name, module.in_features, shape, ranks)[0]
        parent, _, leaf = name.rpartition(".")
        body.get_submodule(parent)._modules[leaf] = RowSplit(module, columns, ranks)
    elif how in ("colwise", "packed"):
        rows = _rows(name, module.out_features, shape, ranks, packed=how == "packed")
        module.weight = _kept(torch.cat([module.weight[each] for each in rows]))
        if module.bias is not None:
            module.bias = _kept(torch.cat([module.bias[each] for each in rows]))
        module.out_features = len(module.weight)
    elif how == "norm":
        (part,) = _rows(name, len(module.weight), shape, ranks)
        copies = ranks.copies(shape.kv_heads) if _is_kv(name) else 1
        parent, _, leaf = name.rpartition(".")
        whole = len(module.weight) * copies  # each copy of a KV head adds its squares to the sum
        body.get_submodule(parent)._modules[leaf] = SplitNorm(module, part, whole, ranks)
    else:
        raise ValueError(f"{name} has the split {how!r}, which this engine does not support")


def _is_kv(name: str) -> bool:
    return name.rpartition(".")[2] in ("k_proj", "v_proj", "k_norm")


def _rows(
    name: str, size: int, shape: AttentionShape, ranks: Ranks, *, packed: bool = False
) -> list[slice]:
    """This rank's outputs (or, of a rowwise one, inputs) of a linear with ``size`` of them."""
    own, leaf = ranks.own_heads(shape.kv_heads), name.rpartition(".")[2]
    kv = slice(own.start * shape.key_dim, own.stop * shape.key_dim)
    if ".mlp." in f".{name}." or leaf in ("fc1", "fc2"):
        if not packed:
            return [ranks.part(size)]
        gate = ranks.part(size // 2)
        return [gate, slice(size // 2 + gate.start, size // 2 + gate.stop)]
    if _is_kv(name):
        return [kv]
    heads = ranks.part(shape.heads)
    if not packed:  # query heads with their parts
        each = size // shape.heads
        return [slice(heads.start * each, heads.stop * each)]
    queries, keys = shape.heads * shape.key_dim, shape.kv_heads * shape.key_dim
    return [
        slice(heads.start * shape.key_dim, heads.stop * shape.key_dim),
        *(slice(at + kv.start, at + kv.stop) for at in (queries, queries + keys)),
    ]


def _tell_heads(attention: Any, own: AttentionShape) -> None:
    """Set an attention module's number of heads, if it has such attributes."""
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = own.heads
    for name, count in (("num_heads", own.heads), ("num_key_value_heads", own.kv_heads)):
        if hasattr(attention, name):
            setattr(attention, name, count)


def _kept(part: Tensor) -> nn.Parameter:
    """A part of a weight in its own memory, so that the rest can be freed."""
    return nn.Parameter(part.detach().clone(), requires_grad=False)
