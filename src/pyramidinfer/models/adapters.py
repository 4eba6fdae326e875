"""Low-rank adapters that are served beside the base model, one a request (LoRA, as peft saves it).

An adapter adds ``scale · up · (down · x)`` to what some linears give of ``x``.  The base's weights
stay as they are, so rows of one step may each have another adapter, or none.
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
    """What an adapter adds to one linear: down ``[rank, in]``, up ``[out, rank]``; ``at``: where
    the linear's outputs begin among those that are packed together."""

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
        """columns : outputs that each half of a panel has, at most ``half``, as they lie side by
        side;  lanes : numbers of a vector;  deep : inputs that are multiplied at once."""
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

    name : what requests ask for;  path : as it was given;  mark : a digest of what it adds, which
    its caches go by;  parts : by layer, and by the linear's place in it (``self_attn.q_proj``).
    """

    def __init__(self, name: str, path: str, mark: str, parts: dict[int, dict[str, Part]]) -> None:
        self.name, self.path, self.mark, self.parts = name, path, mark, parts
        #: By layer and place (``PLACES``): what ops made of the parts of a packed linear, or None.
        self.packed: list[Any] = []
        #: The same for the kernels.
        self.data: Any = None

    def __repr__(self) -> str:
        return f"Adapter({self.name!r})"

    @property
    def rank(self) -> int:
        """The highest that the kernels work with."""
        return max((each.rank for each in self.packed if isinstance(each, LowRank)), default=0)

    def take(self, packed: list[Any]) -> None:
        """Go on with what was packed, one for every linear of the model."""
        self.packed = packed
        if any(isinstance(each, LowRank) for each in packed):
            none = LowRankData(None, None, None, None, 0)
            each_data = [none if each is None else each.data for each in packed]
            self.data = (LowRankData * len(packed))(*each_data)


class Adapted:
    """Which rows of a flat row have which adapter.  ``group`` ``[rows]``: a row's number in
    ``adapters``, -1 for none."""

    def __init__(self, adapters: list[Adapter], group: np.ndarray) -> None:
        self.adapters, self.group = adapters, group
        self._call: Any = None
        self._held: tuple[Any, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[tuple[Adapter | None, int]]) -> Adapted | None:
        """So many rows of each, one after the other; None where nobody has an adapter."""
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
        """As ``of`` takes them, a row each."""
        return [(None if number < 0 else self.adapters[number], 1) for number in self.group]

    def only(self, rows: Tensor) -> Adapted:
        """Of these rows."""
        return Adapted(self.adapters, self.group[rows.cpu().numpy()])

    def rows(self, device: torch.device) -> list[tuple[Adapter, Tensor]]:
        """Every adapter with its rows."""
        found = [(each, np.flatnonzero(self.group == i)) for i, each in enumerate(self.adapters)]
        return [(each, torch.from_numpy(rows).to(device)) for each, rows in found if len(rows)]

    @property
    def call(self) -> Any:
        """The same for the kernels; it lives as long as this."""
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
    """Adapters of a linear's rows; ``number``: its own among the model's packed linears."""

    adapted: Adapted
    number: int

    @classmethod
    def each(cls, adapted: Adapted | None, layer: int) -> list[Low | None]:
        """One for each of a layer's ``PLACES``."""
        if adapted is None:
            return [None] * len(PLACES)
        return [cls(adapted, layer * len(PLACES) + place) for place in range(len(PLACES))]


def add_parts(out: Tensor, x: Tensor, rows: Tensor, parts: Iterable[Part]) -> None:
    """Add to the outputs ``[n, out]`` of ``x`` ``[n, in]`` in these rows what an adapter does."""
    some = x[rows]
    for down, up, scale, at in parts:
        found = (some @ down.T) @ up.T * scale
        out[rows, at : at + len(up)] += found
