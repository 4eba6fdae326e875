"""Quantized weights: encoding and decoding of a linear's or an embedding's numbers.

Here in torch, for backends that only round weights; ``native/coding.h`` has the same rules for the
kernels and makes the same codes.

Every :data:`GROUP` inputs of an output share a scale of 16 bits.  ``int8``: a code of -127..127
times the scale.  ``int4``: a code of 0..15 times the scale, plus the group's minimum, another 16
bits.  Candidates for both cover the group's whole range or slightly less of it; the one with the
smallest square error is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyramidinfer.native.library import FORMATS, SOURCES

__all__ = [
    "CODED",
    "GROUP",
    "TABLE",
    "Coded",
    "Rows",
    "code",
    "coded_bytes",
    "decode",
    "joined_format",
    "round_weights",
    "stored_bytes",
]

#: Inputs of an output that share a scale.
GROUP = 32
#: Format of heads and embeddings, independent of the layers': 4 bits lose too much there
#: (docs/weights.md).
TABLE = "int8"
#: Parts of a format's number (``Format`` in native/matmul.h): codes of 8 bits, or of 4; with a
#: minimum; scales of 32 bits; a scale for each half of a group.
CODES, FOUR, LEAST, FLOATS, HALVES = 1, 2, 4, 8, 16
#: Formats that the kernels read (``by_format`` in ``weights.h``).
CODED = (
    CODES,
    CODES | FOUR | LEAST,
    CODES | LEAST | FLOATS,
    CODES | FOUR | LEAST | FLOATS,
    CODES | HALVES | FLOATS,
    CODES | LEAST | HALVES | FLOATS,
)
#: Shares of a group's range that 4 bits may cover: numbers outside are clipped.
RANGES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)
#: Numbers that are encoded at a time: they fit in the nearest caches.
CHUNK = 1 << 16
#: Bytes of a group: its codes and shared values.
GROUP_BYTES = {"int8": GROUP + 2, "int4": GROUP // 2 + 4}
#: Added to codes of 8 bits, so that bytes are unsigned.
MIDDLE = 128


class Coded(NamedTuple):
    """Weights ``[n, depth]`` in codes ``[n, groups * GROUP]`` (bytes), with scales and, for
    codes of 4 bits, minima, ``[n, groups]`` each, of 16 bits."""

    name: str
    codes: Tensor
    scales: Tensor
    least: Tensor | None
    depth: int


class Rows(NamedTuple):
    """Outputs of a linear whose weights the kernels encode: the addresses of each output's
    ``depth`` numbers (or blocks of a GGUF file), their type, and the format of their codes.

    addresses : ``[n]`` int64;  held : the tensors that the addresses point into.
    """

    addresses: Tensor
    source: int
    format: int
    depth: int
    held: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        each = 4 if self.format & FLOATS else 2
        each *= 2 if self.format & LEAST else 1
        each *= 2 if self.format & HALVES else 1
        codes = GROUP // 2 if self.format & FOUR else GROUP
        return len(self.addresses) * -(-self.depth // GROUP) * (codes + each)

    def numbers(self, at: Tensor) -> Tensor:
        """Weights of outputs ``at`` in float32, from blocks or plain numbers."""
        from gguf import GGMLQuantizationType, quants

        places = ((self.addresses[at] - self.held.data_ptr()) // self.held.stride(0)).tolist()
        found = quants.dequantize(self.held[places].numpy(), GGMLQuantizationType(self.source))
        return torch.from_numpy(found)

    def chunk(self, count: int) -> tuple[Rows, ...]:
        """Split into parts with the same number of outputs."""
        return tuple(self._replace(addresses=each) for each in self.addresses.chunk(count))

    @classmethod
    def of(cls, weights: Tensor, name: str) -> Rows:
        """``[n, depth]`` of any dtype, to be stored in the format ``name``."""
        if weights.dtype not in SOURCES:
            weights = weights.float()
        weights = weights.contiguous()
        at = torch.arange(len(weights)) * (weights.shape[1] * weights.element_size())
        form, source = FORMATS[name], SOURCES[weights.dtype]
        return cls(at + weights.data_ptr(), source, form, weights.shape[1], weights)


def joined_format(formats: list[int]) -> int:
    """The smallest format that holds all of these exactly."""
    if len(set(formats)) == 1:
        return formats[0]
    found = CODES
    for each in formats:
        found |= each & (LEAST | FLOATS | HALVES)
    if all(each & FOUR for each in formats):
        return found | FOUR
    return found | FLOATS if found & (LEAST | HALVES) else found


def code(weights: Tensor, name: str) -> Coded:
    """Encode ``[n, depth]`` of any dtype; the last group is padded with zeros."""
    depth = weights.shape[1]
    parts = [
        (_eight if name == "int8" else _four)(_groups(part))
        for part in torch.split(weights, max(1, CHUNK // depth))
    ]
    codes, scales, *least = (torch.cat(each) for each in zip(*parts, strict=True))
    return Coded(name, codes.flatten(1), scales, least[0] if least else None, depth)


def decode(coded: Coded) -> Tensor:
    """The values of the codes, ``[n, depth]`` in float32."""
    codes = coded.codes.view(*coded.scales.shape, GROUP).float()
    steps = coded.scales.float()[..., None]
    least = -MIDDLE * steps if coded.least is None else coded.least.float()[..., None]
    return (codes * steps + least).flatten(1)[:, : coded.depth]


def stored_bytes(model: Any, weights: str) -> int:
    """Bytes of a model's parameters if linears are stored as ``weights`` (needs no values), without
    the padding of a linear's last panel in the kernels."""
    if weights == "gguf":
        rows = {id(m.weight): m.rows.nbytes for m in model.modules() if hasattr(m, "rows")}
        return int(sum(each.nbytes for each in model.parameters()) + sum(rows.values()))
    coded = {} if weights == "auto" else {id(p): name for p, name in _coded(model, weights)}
    return sum(
        coded_bytes(each, coded[id(each)]) if id(each) in coded else each.nbytes
        for each in model.parameters()
    )


def coded_bytes(weights: Tensor, name: str) -> int:
    """Bytes of ``[n, depth]`` as codes (no values needed)."""
    return len(weights) * -(-weights.shape[1] // GROUP) * GROUP_BYTES[name]


@torch.no_grad()
def round_weights(model: Any, weights: str) -> None:
    """Round all linears, the head and the embedding to the values of their codes, in place: the
    numbers change, their memory does not.  Weights of a GGUF file do not change."""
    if weights == "gguf":
        return
    for parameter, name in list(_coded(model, weights)):
        for part in torch.split(parameter.data, max(1, CHUNK // parameter.shape[1])):
            part.copy_(decode(code(part, name)))


def _coded(model: Any, weights: str) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters that are stored as codes, with their formats; a tied parameter occurs once."""
    tables = {id(each.weight) for each in _tables(model)}
    seen: set[int] = set()
    for module in [*_tables(model), *(m for m in model.modules() if isinstance(m, nn.Linear))]:
        parameter = module.weight
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter, TABLE if id(parameter) in tables else weights


def _tables(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _groups(part: Tensor) -> Tensor:
    """``[n, depth]`` → ``[n, groups, GROUP]`` in float32."""
    padded = F.pad(part.float(), (0, -part.shape[1] % GROUP))
    return padded.view(len(part), -1, GROUP)


def _eight(groups: Tensor) -> tuple[Tensor, Tensor]:
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups * _inverse(scales)[..., None]).round_().clamp_(-127, 127)
    return (codes + MIDDLE).to(torch.uint8), scales


def _four(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best: list[Tensor] = []
    for share in RANGES:
        least, scales = (middle - half * share).half(), (half * (2 * share / 15)).half()
        codes = (groups - least[..., None].float()).mul_(_inverse(scales)[..., None])
        codes.round_().clamp_(0, 15)
        off = codes * scales[..., None].float() + (least[..., None].float() - groups)
        found = [off.double().square_().sum(-1), codes, scales, least]
        if not best:
            best = found
            continue
        better = found[0] < best[0]
        best = [
            torch.where(better if new.ndim == 2 else better[..., None], new, old)
            for new, old in zip(found, best, strict=True)
        ]
    _, codes, scales, least = best
    return codes.to(torch.uint8), scales, least


def _inverse(scales: Tensor) -> Tensor:
    """1 divided by the stored scales; 0 for 0."""
    wide = scales.float()
    return torch.where(wide > 0, 1 / wide, 0)
