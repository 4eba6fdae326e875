"""The header of a GGUF file: metadata and the table of tensors, without reading weights.

Layout (little-endian): ``GGUF``, version u32, tensors u64, keys u64; for each key its name, type
and value; for each tensor its name, dimensions (fastest first), type and offset; then, aligned, the
data.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pyramidinfer.models.folder import check_pointer

__all__ = ["Header", "Tensor", "read_header"]

#: Value type → struct's letter; 8 is a string, 9 an array.
LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
FLOAT32 = 0
#: Longer arrays (such as a vocabulary) are skipped.
SHORT = 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: shape in torch's order, ggml's type, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """metadata : every key with its value, long arrays left out;  tensors : by ggml's name."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """A value of the model's own keys (``attention.key_length``), None if absent."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def floats(self, name: str) -> np.ndarray:
        """A float32 tensor's values."""
        tensor = self.tensors[name]
        if tensor.kind != FLOAT32:
            raise ValueError(f"{str(self.file)!r}: {name} is not float32")
        return np.fromfile(self.file, "<f4", tensor.count, offset=tensor.start)


def read_header(file: Path) -> Header:
    """``ValueError`` if the file is missing, not a GGUF, a part of one, or truncated."""
    if not file.is_file():
        raise ValueError(f"GGUF file {str(file)!r} does not exist")
    check_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{str(file)!r} is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).header(file)
            except (struct.error, IndexError):
                raise ValueError(
                    f"{str(file)!r} is truncated: its {size} bytes end before its tensors begin"
                ) from None
    if header.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{str(file)!r} is one of {header.metadata['split.count']} parts; join them first "
            f"(llama-gguf-split --merge)"
        )
    ends = [_end(file, name, tensor) for name, tensor in header.tensors.items()]
    if max(ends, default=0) > size:
        raise ValueError(
            f"{str(file)!r} is truncated: it has {size} bytes, its tensors reach to {max(ends)}"
        )
    return header


def _end(file: Path, name: str, tensor: Tensor) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except ValueError:
        raise ValueError(f"{str(file)!r}: {name} has an unknown type, {tensor.kind}") from None
    return tensor.start + tensor.count // block * size


class _Reader:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self, file: Path) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(
                f"{str(file)!r} has GGUF version {version}; supported are 2 and 3, little-endian"
            )
        tensors, keys = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(keys):
            name = self.text()
            metadata[name] = self.value(self.number("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError(
                f"{str(file)!r} does not say its model's family (general.architecture)"
            )
        found = []
        for _ in range(tensors):
            name = self.text()
            shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
            found.append((name, shape, self.number("I"), self.number("Q")))
        step = metadata.get("general.alignment", 32)
        first = -(-self.at // step) * step
        return Header(
            file,
            {key: value for key, value in metadata.items() if value is not None},
            {name: Tensor(shape, kind, first + at) for name, shape, kind, at in found},
        )

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value; None for a long array."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(LETTERS[kind] if kind in LETTERS else _unknown(kind))
        inner, count = self.number("I"), self.number("Q")
        if count > SHORT and inner in LETTERS:
            self.at += count * struct.calcsize("<" + LETTERS[inner])
            return None
        values = [self.value(inner) for _ in range(count)]
        return values if count <= SHORT else None


def _unknown(kind: int) -> str:
    raise ValueError(f"the GGUF file's metadata has a value of unknown type {kind}")
