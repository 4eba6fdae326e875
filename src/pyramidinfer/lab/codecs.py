"""``study codecs``: the error of quantized keys and values, by codec.

Compares the codecs of ``pyramidinfer.codec`` with alternatives on the same passages.  A
transformers model reads a passage while every key and value is quantized first, including those of
the current token.  The measure is the divergence of every next-token distribution from that of the
model with unquantized keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pyramidinfer.codec import CODECS, FP8_TOP, WIDEST, Codec, rotate
from pyramidinfer.lab.icr import publish
from pyramidinfer.lab.plans import CodecsPlan
from pyramidinfer.lab.quality import interval
from pyramidinfer.lab.samples import Subject, settings
from pyramidinfer.lab.study import Row, run_cells

__all__ = ["VARIANTS", "CodecsPlan", "Stored", "Variant", "codecs_table", "run_codecs"]

#: First tokens of a text, which are outliers, are left out of means.
SINKS = 8
#: Number of tokens whose distributions are compared at once.
ROWS = 256


@dataclass(frozen=True, slots=True)
class Stored:
    """How one number is stored.

    group : channels that share a scale;  rotated : each ``WIDEST`` channels are rotated by a
    Hadamard matrix;  minimum : codes count from a group's minimum, which is stored in addition to
    the scale, instead of from zero in their middle;  centred : the channel's mean over another text
    is subtracted.
    """

    kv_dtype: str
    group: int = WIDEST
    rotated: bool = True
    minimum: bool = False
    centred: bool = False

    @property
    def codec(self) -> Codec:
        return CODECS[self.kv_dtype]

    def bytes(self, size: int) -> float:
        """Bytes of a key or value of ``size`` numbers, with scales and minima (float16)."""
        groups = size // math.gcd(size, self.group)
        return size * self.codec.bits / 8 + 2 * groups * (1 + self.minimum)

    def read(self, x: Tensor, mean: Tensor) -> Tensor:
        """Store ``[..., size]`` and read it back; ``mean`` is the mean of its channels."""
        if self.centred:
            return replace(self, centred=False).read(x - mean, mean) + mean
        size = x.shape[-1]
        wide, group = (*x.shape[:-1], -1, math.gcd(size, WIDEST)), math.gcd(size, self.group)
        y = x.float().reshape(wide)
        y = rotate(y) if self.rotated else y
        y = self._coded(y.reshape(*x.shape[:-1], -1, group)).reshape(wide)
        return (rotate(y) if self.rotated else y).reshape(x.shape).to(x.dtype)

    def _coded(self, y: Tensor) -> Tensor:
        """Encode groups ``[..., group]`` and decode them."""
        middle = self.codec.middle
        if self.minimum:
            least = y.amin(-1, keepdim=True).half().float()
            scale = _scale((y.amax(-1, keepdim=True) - least) / (2 * middle))
            return _divided(y - least, scale).round().clamp(0, 2 * middle) * scale + least
        top = FP8_TOP if self.codec.is_float else middle
        scale = _scale(y.abs().amax(-1, keepdim=True) / top)
        if self.codec.is_float:
            return _divided(y, scale).clamp(-top, top).to(torch.float8_e4m3fn).float() * scale
        return ((_divided(y, scale) + top).round().clamp(0, 2 * top) - top) * scale


def _scale(wanted: Tensor) -> Tensor:
    """Rounded to float16."""
    return wanted.half().float()


def _divided(y: Tensor, scale: Tensor) -> Tensor:
    """A quotient that is zero if the scale is zero."""
    return torch.where(scale > 0, y / scale, 0.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """How keys and values are stored; None: in 16 bits."""

    name: str
    keys: Stored | None
    values: Stored | None

    def bytes(self, size: int) -> float:
        """Bytes of a key and a value of ``size`` numbers."""
        parts = (self.keys, self.values)
        return sum(2 * size if each is None else each.bytes(size) for each in parts)


def _both(name: str, stored: Stored) -> Variant:
    return Variant(name, stored, stored)


INT4 = Stored("int4")
PLAIN = replace(INT4, rotated=False)
VARIANTS = (
    *(
        _both(f"{name}, {'rotated' if rotated else 'not rotated'}", Stored(name, rotated=rotated))
        for name in CODECS
        for rotated in (False, True)
    ),
    Variant("int4, only keys rotated", INT4, PLAIN),
    Variant("int4, rotated, keys alone", INT4, None),
    Variant("int4, rotated, values alone", None, INT4),
    Variant("int4, rotated, keys less their mean", replace(INT4, centred=True), INT4),
    _both("int4, rotated, a minimum beside each scale", replace(INT4, minimum=True)),
    _both("int4, rotated, a scale per 32", replace(INT4, group=32)),
    _both("int4, not rotated, a minimum beside each scale", replace(PLAIN, minimum=True)),
    _both("int4, not rotated, a scale per 32", replace(PLAIN, group=32)),
)


def run_codecs(plan: CodecsPlan, out: Path, workers: int = 1) -> list[Row]:
    """Measure every variant on every passage and write ``out``; returns one row per variant."""
    plan.check()
    cells = [
        {"passage": passage, "variant": each.name}
        for passage in range(plan.samples)
        for each in VARIANTS
    ]
    found = run_cells("codecs", settings(plan), cells, partial(measure, plan), out, workers)
    rows = [_summary([row for row in found if row["variant"] == each.name]) for each in VARIANTS]
    publish(out, rows)
    return rows


def codecs_table(rows: list[Row]) -> Table:
    """The table in the terminal."""
    table = Table(title="keys and values in few bits")
    table.add_column("stored", overflow="fold")
    for name in ("bytes of an entry", "KL [95 %]", "same next token"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["kl_ci"]
        kl = f"{row['kl']:.4f} [{low:.4f}, {high:.4f}]"
        table.add_row(row["variant"], f"{row['bytes']:g}", kl, f"{row['agreement']:.1%}")
    return table


def measure(plan: CodecsPlan, cell: dict[str, Any]) -> list[Row]:
    """One passage's row of one variant.

    kl : mean over its tokens of the divergence of the next-token distribution from the model's own,
    in nats;  agreement : share of equal next tokens;  bytes : of an entry of a head.
    """
    (variant,) = (each for each in VARIANTS if each.name == cell["variant"])
    whole = _whole(plan, cell["passage"])
    cache = Coded(variant, _means(plan))
    mine = _logits(plan.subject, _passages(plan)[cell["passage"]], cache)
    apart = agreed = 0.0
    for p, q in _pairs(whole, mine):
        apart += float((p.exp() * (p - q)).sum())
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
    return [
        {
            **cell,
            "kl": max(0.0, apart / len(whole)),
            "agreement": agreed / len(whole),
            "tokens": len(whole),
            "bytes": cache.bytes,
        }
    ]


class Coded(DynamicCache):
    """A cache that holds keys and values after quantization.

    means : per layer the means of the channels of keys and of values, ``[kv_heads, 1, size]``.
    """

    def __init__(self, variant: Variant, means: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.variant, self.means, self.bytes = variant, means, 0.0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more: Any, **options: Any
    ) -> Any:
        self.bytes = self.variant.bytes(key_states.shape[-1])
        key_states, value_states = (
            x if how is None else how.read(x, mean)
            for how, x, mean in zip(
                (self.variant.keys, self.variant.values),
                (key_states, value_states),
                self.means[layer_idx],
                strict=True,
            )
        )
        return super().update(key_states, value_states, layer_idx, *more, **options)


class Averaging(DynamicCache):
    """A cache that records the means of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more: Any, **options: Any
    ) -> Any:
        assert layer_idx == len(self.means)
        key, value = (x[0, :, SINKS:].mean(1, keepdim=True) for x in (key_states, value_states))
        self.means.append((key, value))
        return super().update(key_states, value_states, layer_idx, *more, **options)


@lru_cache(maxsize=1)
def _passages(plan: CodecsPlan) -> list[list[int]]:
    """The measured passages, and one more for means."""
    drawn = plan.subject.corpus().passages(plan.seed, plan.samples + 1, plan.context, 1)
    return [each.context for each in drawn]


@lru_cache(maxsize=1)
def _means(plan: CodecsPlan) -> list[tuple[Tensor, Tensor]]:
    cache = Averaging()
    _logits(plan.subject, _passages(plan)[-1], cache)
    return cache.means


@lru_cache(maxsize=1)  # cells of one passage follow each other
def _whole(plan: CodecsPlan, passage: int) -> Tensor:
    return _logits(plan.subject, _passages(plan)[passage], DynamicCache())


@torch.inference_mode()
def _logits(subject: Subject, ids: list[int], cache: DynamicCache) -> Tensor:
    """``[tokens, vocab]`` logits of a text that is read with this cache."""
    model = subject.loaded().model
    device = next(model.parameters()).device
    logits: Tensor = model(torch.tensor([ids], device=device), past_key_values=cache).logits[0]
    return logits


def _pairs(whole: Tensor, mine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities of both, for some tokens at a time."""
    for at in range(0, len(whole), ROWS):
        p, q = (each[at : at + ROWS].float().log_softmax(-1) for each in (whole, mine))
        yield p, q


def _summary(rows: list[Row]) -> Row:
    """Means over all passages, equally weighted."""
    kl = [row["kl"] for row in rows]
    return {
        "variant": rows[0]["variant"],
        "bytes": rows[0]["bytes"],
        "kl": math.fsum(kl) / len(kl),
        "kl_ci": interval(kl),
        "agreement": math.fsum(row["agreement"] for row in rows) / len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "samples": len(rows),
    }
