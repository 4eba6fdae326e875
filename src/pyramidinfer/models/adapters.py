"""Low-rank adapters that are served with the base model, one per request (LoRA, as saved by peft).

An adapter adds ``scale · up · (down · x)`` to the outputs of some linears for an input ``x``.  The
base's weights do not change, so rows of one step may each use a different adapter, or none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.native.library import AdaptedData, LowRankData, pointer

__all__ = ["PLACES", "Adapted", "Adapter", "Low", "LowRank", "Part", "add_parts"]

#: The linears of a layer that is packed, in their order in an adapter.
PLACES = ("qkv", "out", "gate_up", "down")


class Part(NamedTuple):
    """An adapter's matrices for one linear: down ``[rank, in]``, up ``[out, rank]``; ``at``: index
    of the linear's first output among the outputs that are packed together."""

    down: Tensor
    up: Tensor
    scale: float
    at: int = 0


class LowRank:
    """Parts of one packed linear in the order in which the kernels read them (``lowrank.h``)."""

    def __init__(
        self,
        parts: list[Part],
        columns: list[range],
        half: int,
        depth: int,
        lanes: int,
        deep: int,
        dtype: torch.dtype,
    ) -> None:
        """columns : contiguous outputs in each half of a panel, at most ``half``;  lanes : numbers
        per vector;  deep : inputs that are multiplied at once."""
        ranks = [len(each.down) for each in parts]
        self.rank = -(-sum(ranks) // lanes) * lanes
        wide = -(-depth // deep) * deep
        down, self.scales = torch.zeros(self.rank, wide), torch.zeros(self.rank)
        halves, ups, filled = np.zeros((len(columns), 3), dtype=np.int64), [], 0
        starts = np.cumsum([0, *ranks]).tolist()
        for part, first, rank in zip(parts, starts, ranks, strict=False):
            down[first : first + rank, :depth] = part.down
            self.scales[first : first + rank] = part.scale
        for number, wanted in enumerate(columns):
            near = [i for i, each in enumerate(parts) if _overlap(each, wanted)]
            if not near:
                continue
            first, stop = starts[near[0]], starts[near[-1] + 1]
            up = torch.zeros(stop - first, half)
            for i in near:
                both, part = _overlap(parts[i], wanted), parts[i]
                rows = slice(starts[i] - first, starts[i + 1] - first)
                here = slice(both.start - wanted.start, both.stop - wanted.start)
                up[rows, here] = part.up[both.start - part.at : both.stop - part.at].T.float()
            halves[number] = first, stop - first, filled
            ups.append(up)
            filled += up.numel()
        blocks = down.view(-1, lanes, wide // deep, deep).transpose(1, 2)
        self.down = blocks.contiguous().to(dtype)
        self.up = torch.cat([each.flatten() for each in ups]).to(dtype)
        self.halves = torch.from_numpy(halves)

    @property
    def nbytes(self) -> int:
        held = (self.down, self.up, self.scales, self.halves)
        return sum(each.nbytes for each in held)

    @property
    def data(self) -> Any:
        return LowRankData(*map(pointer, (self.down, self.scales, self.up, self.halves)), self.rank)


def _overlap(part: Part, wanted: range) -> range:
    return range(max(part.at, wanted.start), min(part.at + len(part.up), wanted.stop))


class Adapter:
    """One adapter, read and checked (``models/lora_modules.py``).

    name : used in requests;  path : as given;  mark : a digest of its weights, which identifies its
    caches;  parts : by layer, and by the linear's place in it (``self_attn.q_proj``).
    """

    def __init__(self, name: str, path: str, mark: str, parts: dict[int, dict[str, Part]]) -> None:
        self.name, self.path, self.mark, self.parts = name, path, mark, parts
        #: By layer and place (``PLACES``): the parts of a packed linear in the format of ops, or
        #: None.
        self.packed: list[Any] = []
        #: The same in the format of the kernels.
        self.data: Any = None

    def __repr__(self) -> str:
        return f"Adapter({self.name!r})"

    @property
    def rank(self) -> int:
        """The maximum rank that the kernels support."""
        return max((each.rank for each in self.packed if isinstance(each, LowRank)), default=0)

    def take(self, packed: list[Any]) -> None:
        """Keep the packed parts, one for every packed linear of this rank; it may have none."""
        self.packed = packed
        if all(each is None or isinstance(each, LowRank) for each in packed):
            none = LowRankData(None, None, None, None, 0)
            each_data = [none if each is None else each.data for each in packed]
            self.data = (LowRankData * len(packed))(*each_data)


class Adapted:
    """The adapter of each row of a flat row.  ``group`` ``[rows]``: a row's number in
    ``adapters``, -1 for none."""

    def __init__(self, adapters: list[Adapter], group: np.ndarray) -> None:
        self.adapters, self.group = adapters, group
        self._call: Any = None
        self._held: tuple[Any, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[tuple[Adapter | None, int]]) -> Adapted | None:
        """The given number of rows for each, in order; None if no row has an adapter."""
        runs = list(runs)
        numbers: dict[Adapter, int] = {}
        for adapter, _ in runs:
            if adapter is not None:
                numbers.setdefault(adapter, len(numbers))
        if not numbers:
            return None
        each = [-1 if adapter is None else numbers[adapter] for adapter, _ in runs]
        return cls(list(numbers), np.repeat(np.array(each, np.int32), [n for _, n in runs]))

    @property
    def runs(self) -> list[tuple[Adapter | None, int]]:
        """The arguments of ``of``, one row each."""
        return [(None if number < 0 else self.adapters[number], 1) for number in self.group]

    def only(self, rows: Tensor) -> Adapted:
        """The adapters of a subset of the rows."""
        return Adapted(self.adapters, self.group[rows.cpu().numpy()])

    def rows(self, device: torch.device) -> list[tuple[Adapter, Tensor]]:
        """Each adapter with its rows."""
        found = [(each, np.flatnonzero(self.group == i)) for i, each in enumerate(self.adapters)]
        return [(each, torch.from_numpy(rows).to(device)) for each, rows in found if len(rows)]

    @property
    def call(self) -> Any:
        """The same for the kernels; valid as long as this object."""
        if self._call is None:
            members = [np.flatnonzero(self.group == i) for i in range(len(self.adapters))]
            starts = np.cumsum([0, *map(len, members)], dtype=np.int64)
            inside, group = np.concatenate(members), np.ascontiguousarray(self.group)
            each = (ctypes.c_void_p * len(self.adapters))(
                *(ctypes.addressof(adapter.data) for adapter in self.adapters)
            )
            self._held = each, starts, inside, group
            self._call = AdaptedData(
                ctypes.addressof(each),
                starts.ctypes.data,
                inside.ctypes.data,
                group.ctypes.data,
                len(self.adapters),
                max(adapter.rank for adapter in self.adapters),
            )
        return self._call


class Low(NamedTuple):
    """Adapters of a linear's rows; ``number``: index of the linear among the rank's packed
    linears."""

    adapted: Adapted
    number: int

    @classmethod
    def each(cls, adapted: Adapted | None, layer: int) -> list[Low | None]:
        """One for each of a layer's ``PLACES``; layers are counted from the rank's first."""
        if adapted is None:
            return [None] * len(PLACES)
        return [cls(adapted, layer * len(PLACES) + place) for place in range(len(PLACES))]


def add_parts(out: Tensor, x: Tensor, rows: Tensor, parts: Iterable[Part]) -> None:
    """Add an adapter's part to the outputs ``[n, out]`` for ``x`` ``[n, in]`` in these rows."""
    some = x[rows]
    for down, up, scale, at in parts:
        found = (some @ down.T) @ up.T * scale
        out[rows, at : at + len(up)] += found
