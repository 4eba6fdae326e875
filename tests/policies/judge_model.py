"""The model that judges run: a Llama in float64, token row by token row, with whole attention rows;
the cache is a dict per layer and KV head.  No code of the package is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny import tiny_model

Kept = list[set[int]]  # per KV head, positions of the entries that stay


class ExactNorm(nn.Module):
    """A norm in float64 throughout; transformers' own goes by way of float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden / size.sqrt() * self.weight


class ExactRotary(nn.Module):
    """Rotary tables in float64 throughout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        halves = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        angles = positions[..., None] * 10_000.0**-halves
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def exact_llama(**changes: Any) -> Any:
    """The tiny Llama with nothing left in float32, so that logits agree to rounding."""
    model = tiny_model("llama", torch.float64, **changes)
    for layer in model.model.layers:
        layer.input_layernorm = ExactNorm(layer.input_layernorm)
        layer.post_attention_layernorm = ExactNorm(layer.post_attention_layernorm)
    model.model.norm = ExactNorm(model.model.norm)
    model.model.rotary_emb = ExactRotary(model.model.layers[0].self_attn.head_dim)
    return model


class Entry(NamedTuple):
    """A token in the cache: its key before rotation and its value, ``[head_dim]`` each."""

    key: Tensor
    value: Tensor


@dataclass
class Seen:
    """One layer's attention, as it was given.

    rows : positions of the queries;  held : per KV head, positions of its entries, ascending;
    weights : per KV head ``[query heads, rows, entries]``, 0 where an entry was still to come.
    """

    layer: int
    rows: list[int]
    held: list[list[int]]
    weights: list[Tensor]
    is_decode: bool


@cache
def hadamard(size: int) -> Tensor:
    """The matrix of ones and minus ones whose rows are at right angles, its own inverse."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / size**0.5


def in_few_bits(vector: Tensor, kv_dtype: str) -> Tensor:
    """What is read of ``[head_dim]`` numbers that were stored in few bits: groups of channels times
    a Hadamard matrix, over a scale each (docs/kv_dtype.md)."""
    if kv_dtype == "auto":
        return vector
    size = next(size for size in (64, 32, 16, 8, 4) if len(vector) % size == 0)
    matrix = hadamard(size)
    top = {"int8": 127.5, "int4": 7.5, "fp8": 448.0}[kv_dtype]
    read = []
    for group in vector.split(size):
        turned = matrix @ group
        scale = (turned.abs().max() / top).half().double()
        if not scale:  # padding: its keys and values are 0
            read.append(torch.zeros_like(group))
            continue
        if kv_dtype == "fp8":  # three bits behind the first, from 2^-6 on
            parts = (turned / scale).clamp(-top, top)
            steps = 2.0 ** (parts.abs().log2().floor().clamp(min=-6) - 3)
            parts = (parts / steps).round() * steps
        else:
            parts = (turned / scale + top).round().clamp(0, 2 * top) - top
        read.append(matrix @ (parts * scale))
    return torch.cat(read)


class Reader:
    """One request on an ``exact_llama`` under one method of its subclass ``Judge``.

    ``options`` are the method's own; ``protect`` positions always stay; ``kv_dtype``: how rotated
    keys, and values, are stored.
    """

    def __init__(
        self,
        model: Any,
        method: str,
        keep: float | None = None,
        protect: Iterable[int] = (),
        kv_dtype: str = "auto",
        **options: Any,
    ) -> None:
        self.method, self.keep, self.protect, self.options = method, keep, set(protect), options
        self.kv_dtype = kv_dtype
        self.weights = {name: weight.detach() for name, weight in model.state_dict().items()}
        config = model.config
        self.depth, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads, self.eps = config.num_key_value_heads, config.rms_norm_eps
        self.group = self.heads // self.kv_heads
        dim = config.hidden_size // self.heads
        self.frequencies = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
        self.cache: list[list[dict[int, Entry]]] = [
            [{} for _ in range(self.kv_heads)] for _ in range(self.depth)
        ]
        self.seen = self.text = 0  # tokens processed; tokens when text was last taken in
        self.pinned: dict[int, int] = {}  # entries of a layer when text was last taken in
        self.new = 0  # tokens of the text last taken in
        self.memory: dict[tuple[int, int], Any] = {}  # of H2O, Scissorhands and Pyramid
        self.looked: list[dict[int, float]] = []  # Pyramid's scores of the layer at hand
        self.queries = torch.empty(0)  # [rows, heads, head_dim] of the layer at hand, not rotated

    # --- the model ----------------------------------------------------------------------------

    def read(self, tokens: list[int]) -> Tensor:
        """Take in a prompt, or a further turn on top of the cache: logits after its end."""
        self.new, self.text = len(tokens), self.seen + len(tokens)
        logits = self._forward(tokens, is_decode=False)
        if self.method == "kvzip":
            self._zip(tokens, **self.options)
        return logits

    def decode(self, token: int) -> Tensor:
        """Logits after one more token."""
        return self._forward([token], is_decode=True)

    def positions(self) -> list[list[list[int]]]:
        """Per layer and KV head, positions in the cache, ascending."""
        return [[sorted(head) for head in layer] for layer in self.cache]

    def lengths(self) -> list[list[int]]:
        """Per layer and KV head, entries in the cache."""
        return [[len(head) for head in layer] for layer in self.cache]

    def truncate(self, seen: int) -> None:
        """Forget every token from this position on."""
        self.seen = seen
        for layer in self.cache:
            for head in layer:
                for position in [each for each in head if each >= seen]:
                    del head[position]

    @torch.no_grad()
    def _forward(self, tokens: list[int], is_decode: bool) -> Tensor:
        rows = list(range(self.seen, self.seen + len(tokens)))
        self.seen += len(tokens)
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.depth):
            hidden, seen = self._layer(layer, hidden, rows, is_decode)
            propagate = getattr(self, f"{self.method}_going", None)
            going = rows if propagate is None else propagate(seen, **self.options)
            kept: Kept | None = getattr(self, self.method)(seen, **self.options)
            if kept is not None:
                for head, stays in zip(self.cache[layer], kept, strict=True):
                    for position in head.keys() - stays:
                        del head[position]
            hidden = hidden[[rows.index(position) for position in going]]
            rows = going
        normed = self._norm(hidden[-1], "model.norm")
        return normed @ self.weights["lm_head.weight"].T

    def _layer(
        self, layer: int, hidden: Tensor, rows: list[int], is_decode: bool
    ) -> tuple[Tensor, Seen]:
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.input_layernorm")
        queries, keys, values = (
            self._linear(normed, f"{name}.self_attn.{kind}_proj").unflatten(1, (heads, -1))
            for kind, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        out, self.queries = torch.zeros_like(queries), queries
        held_by_head, weights_by_head = [], []
        for kv_head in range(self.kv_heads):
            entries = self.cache[layer][kv_head]
            for row, position in enumerate(rows):
                key = self._turn(keys[row : row + 1, kv_head], [position])
                key = self._turn(in_few_bits(key[0], self.kv_dtype)[None], [-position])
                value = in_few_bits(values[row, kv_head], self.kv_dtype)
                entries[position] = Entry(key[0], value)
            held = sorted(entries)
            places = self._places(held)
            rotated = self._turn(torch.stack([entries[each].key for each in held]), places)
            for at, (position, place) in enumerate(zip(held, places, strict=True)):
                if place != position:  # moved, and stored there
                    rotated[at] = in_few_bits(rotated[at], self.kv_dtype)
            stacked = torch.stack([entries[each].value for each in held])
            weights = torch.zeros(self.group, len(rows), len(held), dtype=torch.float64)
            own = [held.index(position) for position in rows]
            for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                asking = self._turn(queries[:, head], [places[at] for at in own])
                for row, at in enumerate(own):  # it sees itself and all before it
                    logits = rotated[: at + 1] @ asking[row] / asking.shape[1] ** 0.5
                    weights[head % self.group, row, : at + 1] = torch.softmax(logits, -1)
                out[:, head] = weights[head % self.group] @ stacked
            held_by_head.append(held)
            weights_by_head.append(weights)
        hidden = hidden + self._linear(out.flatten(1), f"{name}.self_attn.o_proj")
        normed = self._norm(hidden, f"{name}.post_attention_layernorm")
        inner = F.silu(self._linear(normed, f"{name}.mlp.gate_proj"))
        inner = inner * self._linear(normed, f"{name}.mlp.up_proj")
        hidden = hidden + self._linear(inner, f"{name}.mlp.down_proj")
        return hidden, Seen(layer, rows, held_by_head, weights_by_head, is_decode)

    def _places(self, held: list[int]) -> list[int]:
        """Rotary positions of the entries: their own, or places in the cache (StreamingLLM), whose
        newest entry is where it is in the text."""
        first = self.seen - len(held)
        return list(range(first, self.seen)) if self.method == "streaming_llm" else held

    def _turn(self, vectors: Tensor, places: list[int]) -> Tensor:
        """``[n, head_dim]`` rotated to ``n`` places."""
        angles = torch.tensor(places, dtype=torch.float64)[..., None] * self.frequencies
        left, right = vectors.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        size = hidden.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden / size.sqrt() * self.weights[f"{name}.weight"]

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return hidden @ self.weights[f"{name}.weight"].T

    # --- what methods share ---------------------------------------------------------------------

    def _budget(self, published: int) -> int:
        """Entries per layer: ``keep`` as a share of the text, or what the paper says."""
        return published if self.keep is None else round(self.keep * self.text)

    def _best(
        self,
        held: list[list[int]],
        scores: list[dict[int, float]],
        count: int,
        always: list[set[int]],
    ) -> Kept:
        """Per head: what always stays, then the highest scores; ties go to the earlier token."""
        forced = [each | (self.protect & set(h)) for each, h in zip(always, held, strict=True)]
        count = max(count, *(len(each) for each in forced))
        kept = []
        for positions, score, stays in zip(held, scores, forced, strict=True):
            rest = [position for position in positions if position not in stays]
            rest.sort(key=lambda position: (-score[position], position))
            kept.append(stays | set(rest[: count - len(stays)]))
        return kept

    def _rising(self, layer: int, first: float, last: float, most: int) -> int:
        """Budgets evenly from ``first`` to ``last``; what is cut off at ``most`` goes to the
        other end."""
        low, high = sorted((first, last))
        if high > most:
            low, high = min(most, low + high - most), most
        first, last = (low, high) if first <= last else (high, low)
        return round(first + (last - first) * layer / (self.depth - 1))

    def _smoothed(
        self, positions: list[int], scores: dict[int, float], kernel: int, pooling: str
    ) -> dict[int, float]:
        """Scores of the neighbours that are there, averaged (zeros beyond the ends) or maxed."""
        smoothed = {}
        for index, position in enumerate(positions):
            near = positions[max(0, index - kernel // 2) : index + kernel // 2 + 1]
            found = [scores[each] for each in near]
            smoothed[position] = sum(found) / kernel if pooling == "mean" else max(found)
        return smoothed
