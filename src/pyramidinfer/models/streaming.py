"""Positions inside the cache: keys are rotated so that the kept tokens look contiguous.

A request of a streaming policy (StreamingLLM) feeds each new token at the rotary position
``place in the text - offset``.  Entries older than a dropped one are further back than their
place in the cache, so their keys are rotated forward to close the gap: always from a copy of the
original key, so that rounding errors do not add up.  When rotary positions reach the model's last
one, all keys are rotated back and the offset grows, so a text can have any length.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from pyramidinfer.cache import Pool, Table
from pyramidinfer.models.batch import OFFSET, Sequence
from pyramidinfer.models.rotary import Rotary

__all__ = ["Streaming"]

#: State: places in the text of the rotated entries, and the rotary positions of their copies.
PLACES, ROTARY = "streaming.places", "streaming.rotary"
#: State: copies of a layer's keys; prefix of the layer's number.
KEYS = "streaming.keys."


class Streaming:
    """Rotates keys of one model.  ``kinds``: rotary kind per layer; ``rotates``: whether the model
    has rotary positions;  ``own``: layers whose keys are on this rank."""

    def __init__(
        self,
        rotary: Rotary,
        kinds: list[str | None],
        rotates: list[bool],
        max_positions: int,
        own: range,
    ) -> None:
        self.rotary, self.kinds, self.max_positions, self.own = rotary, kinds, max_positions, own
        self.layers = [layer for layer, turns in enumerate(rotates) if turns]

    @property
    def is_possible(self) -> bool:
        """Whether keys can be rotated: not with learned positions, or if every key was rotated by
        different frequencies (dynamic scaling)."""
        return self.rotary.module is not None and self.rotary.grows_from is None

    def close_gaps(self, pool: Pool, sequence: Sequence) -> None:
        """Rotate the entries that are older than a dropped one to their place in the cache."""
        table, first = sequence.table, sequence.layers.first
        kept = int(table.longest[first])
        here = [layer for layer in self.own if sequence.layers.governed[layer]]
        if not self.is_possible or not kept or not here:
            return
        places = pool.positions(table, here[0])[0].sort().values.cpu()  # the same in all layers
        base = table.seen_len - sequence.offset - kept  # rotary position of the cache's start
        rank = torch.arange(kept)
        before = places - sequence.offset != rank + base  # older than a gap
        if not before.any():
            return
        self._copy_new(pool, sequence, places[before])
        known, rotary = table.state[PLACES], table.state[ROTARY]
        target = (rank + base)[torch.searchsorted(places, known)]
        for layer in self._governed(sequence):
            copies = table.state[_keys(layer)]
            rotated = self.rotate(copies, target - rotary, layer, sequence)
            pool.rewrite_keys(table, layer, known, rotated)

    def make_room(self, pool: Pool, sequence: Sequence, count: int) -> None:
        """Rotate all keys back if ``count`` more tokens would exceed the model's positions."""
        table = sequence.table
        reached = table.seen_len - sequence.offset
        if not self.is_possible or reached + count <= self.limit(sequence.is_long):
            return
        back = reached - int(table.longest[sequence.layers.first])
        if back <= 0:
            return
        rotated = table.state.get(PLACES, torch.zeros(0, dtype=torch.int64))
        for layer in self._here():
            places = pool.positions(table, layer)[0].cpu()
            governed = sequence.layers.governed[layer]
            others = places[~torch.isin(places, rotated)] if governed else places
            keys = pool.keys_at(table, layer, others)
            by = torch.full_like(others, -back)
            pool.rewrite_keys(table, layer, others, self.rotate(keys, by, layer, sequence))
        table.state = {**table.state, OFFSET: torch.tensor(sequence.offset + back)}
        self.close_gaps(pool, sequence)

    def limit(self, is_long: bool) -> int:
        """Rotary positions that a request of this regime can use."""
        if self.rotary.long_from is None or is_long:
            return self.max_positions
        return min(self.max_positions, self.rotary.long_from)

    def forget(self, table: Table) -> None:
        """Drop copies of tokens from ``table.seen_len`` on, which were just removed."""
        state = dict(table.state)
        if PLACES not in state:
            return
        stays = state[PLACES] < table.seen_len
        state[PLACES], state[ROTARY] = state[PLACES][stays], state[ROTARY][stays]
        for layer in self.layers:
            if _keys(layer) in state:
                state[_keys(layer)] = state[_keys(layer)][:, stays.to(state[_keys(layer)].device)]
        table.state = state

    def rotate(self, keys: Tensor, by: Tensor, layer: int, sequence: Sequence) -> Tensor:
        """Keys ``[kv_heads, n, key_dim]`` moved on by ``by`` ``[n]`` rotary positions."""
        wide = keys.float() if keys.dtype != torch.float64 else keys
        return _rotated(wide, *self._angles(wide, by, layer, sequence)).to(keys.dtype)

    def turns(self, layer: int) -> bool:
        """Whether a layer's vectors can be rotated from one place to another."""
        return layer in self.layers and self.is_possible

    def pairs(self, like: Tensor, layer: int) -> int:
        """Number of a head's channel pairs that can be rotated: channel ``f`` with ``f +
        pairs``."""
        if not self.turns(layer):
            return 0
        start = torch.zeros(1, dtype=torch.int64, device=like.device)
        cos, _ = self.rotary.tables(like, start, [0])[self.kinds[layer]]
        return cos.shape[-1] // 2

    def unrotated(
        self, queries: Tensor, positions: Tensor, layer: int, sequence: Sequence, length: int
    ) -> Tensor:
        """Queries ``[heads, n, key_dim]`` of these rotary positions, in a text of this length, with
        the rotation undone, in float32 or wider."""
        wide = queries.float() if queries.dtype != torch.float64 else queries
        if not self.turns(layer):
            return wide
        return _rotated(wide, *self._angles(wide, -positions, layer, sequence, length))

    def mean_rotation(
        self, like: Tensor, ahead: Items[int], layer: int, sequence: Sequence, length: int
    ) -> Tensor:
        """``[key_dim, key_dim]``: a vector times this is the mean of the vector rotated to the
        places ``ahead`` of a text of this length, 1 for the next token's; the identity without
        rotation.

        like : any tensor of that size, dtype and device.  Places may be far beyond the model's
        last position and keep the request's frequencies, so angles are computed from those of one
        step.
        """
        unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        if not self.turns(layer):
            return unit
        step = torch.ones(1, dtype=torch.int64)
        cos, sin = self._angles(like, step, layer, sequence, length)
        places = torch.tensor(ahead, dtype=torch.float64, device=like.device)
        places += length - 1 - sequence.offset
        angles = places[:, None] * torch.atan2(sin, cos).double()
        return _rotated(unit, angles.cos().mean(0), angles.sin().mean(0)).to(like.dtype)

    def _angles(
        self, like: Tensor, by: Tensor, layer: int, sequence: Sequence, length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[n, rotated]`` of ``by`` ``[n]`` positions, of length 1 together."""
        steps = torch.cat([by, by.new_zeros(1)]).to(like.device)  # the last one has the scaling
        regimes = [self.rotary.regime(sequence.is_long, length)] * len(steps)
        cos, sin = self.rotary.tables(like, steps, regimes)[self.kinds[layer]]
        scale = cos[-1, 0]
        return cos[:-1] / scale, sin[:-1] / scale

    def copied_elsewhere(self, table: Table) -> int:
        """Upper bound on the bytes of copies of rotated keys that other ranks have of their
        layers."""
        here = [each.nbytes for name, each in table.state.items() if name.startswith(KEYS)]
        if not here or len(self._here()) == len(self.layers):
            return 0
        return here[0] * len(self.layers) - sum(here)

    def _here(self) -> list[int]:
        return [layer for layer in self.layers if layer in self.own]

    def _governed(self, sequence: Sequence) -> list[int]:
        return [layer for layer in self._here() if sequence.layers.governed[layer]]

    def _copy_new(self, pool: Pool, sequence: Sequence, places: Tensor) -> None:
        """Store copies of keys that are rotated for the first time."""
        table, state = sequence.table, dict(sequence.table.state)
        known = state.get(PLACES, torch.zeros(0, dtype=torch.int64))
        new = places[~torch.isin(places, known)]
        if not len(new):
            return
        rotary = state.get(ROTARY, known)
        order = torch.cat([known, new]).argsort()
        state[PLACES] = torch.cat([known, new])[order]
        state[ROTARY] = torch.cat([rotary, new - sequence.offset])[order]
        for layer in self._governed(sequence):
            keys = pool.keys_at(table, layer, new)
            if _keys(layer) in state:
                keys = torch.cat([state[_keys(layer)], keys], dim=1)
            state[_keys(layer)] = keys[:, order.to(keys.device)]
        table.state = state


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    part = vectors[..., :size]
    half = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], dim=-1)
    return torch.cat([part * cos + half * sin, vectors[..., size:]], dim=-1)


def _keys(layer: int) -> str:
    return f"{KEYS}{layer}"
