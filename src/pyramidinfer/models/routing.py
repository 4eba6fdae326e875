"""Attention of a Hugging Face layer, routed to pages and backends.

A layer's attention module projects and rotates as usual, then calls the attention function named in
its config.  Our function gets a :class:`LayerCall` as a keyword, so no global state is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pyramidinfer.attention import Scale, ragged
from pyramidinfer.attention.base import Pages, Scored, ScoredPrefill
from pyramidinfer.attention.ragged import Run
from pyramidinfer.cache import Pool, Table
from pyramidinfer.cache.mover import Slots
from pyramidinfer.models.adapters import Adapted, Adapter
from pyramidinfer.models.batch import Moments, Prefill
from pyramidinfer.models.decode import Decoding
from pyramidinfer.models.stack import Stack
from pyramidinfer.types import Needs, Reduce

__all__ = [
    "LayerCall",
    "Segment",
    "evaluating",
    "route",
    "runs_of",
    "scores_by_chunk",
    "shallow",
]

NAME = "pyramidinfer"


class Segment(NamedTuple):
    """``size`` tokens of a prefill in the flat row, from row ``start``."""

    prefill: Prefill
    start: int
    size: int

    def rows_out(self, last_only: bool) -> list[int]:
        """Rows of the flat row whose outputs are needed: all, or that of the text's last token."""
        every = range(self.start, self.start + self.size)
        if not last_only or self.prefill.gives_all:
            return list(every)
        return [every[-1]] if self.size == self.prefill.left else []


@dataclass(eq=False)
class LayerCall:
    """One pass of the flat row through one layer: decode rows first, then segments.

    last_only : of a segment, only its text's last token has an output (in the last layer of a
    prompt, where nothing reads the others);  scale, going : set by the call: the scale of logits,
    and the rows of the flat row that have outputs (None: all).
    """

    stack: Stack
    pool: Pool
    layer: int
    decoding: Decoding | None
    segments: list[Segment]
    last_only: bool = False
    scale: Scale | None = None
    going: Tensor | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, scale: Scale) -> Tensor:
        """queries ``[T, H, D]``, keys ``[T, K, D]``, values ``[T, K, V]`` → ``[T, H, V]``."""
        self.scale = scale
        outs = []
        if self.last_only and self.segments:
            self.going = self._last_rows(queries.device)
        if self.decoding:
            outs.append(self._decode(self.decoding, queries, keys, values, scale))
        for prefill, start, size in self.segments:
            rows = slice(start, start + size)
            outs.append(self._prefill(prefill, queries[rows], keys[rows], values[rows], scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @cached_property
    def adapted(self) -> Adapted | None:
        """Adapters of the flat row's rows."""
        riding = None if self.decoding is None else self.decoding.adapted
        if not self.segments:
            return riding
        runs: list[tuple[Adapter | None, int]] = [] if riding is None else riding.runs
        if self.decoding is not None and riding is None:
            runs = [(None, self.decoding.size.rows)]
        runs += [(each.prefill.sequence.adapter, each.size) for each in self.segments]
        return Adapted.of(runs)

    def _last_rows(self, device: torch.device) -> Tensor:
        rows = list(range(self.decoding.size.rows)) if self.decoding else []
        for segment in self.segments:
            rows += segment.rows_out(True)
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def _decode(
        self, decoding: Decoding, queries: Tensor, keys: Tensor, values: Tensor, scale: Scale
    ) -> Tensor:
        layer, pool, plan, rows = self.layer, self.pool, decoding.plan, slice(decoding.size.rows)
        slots = Slots(decoding.pages[layer], decoding.offsets[layer])
        pool.write(layer, slots, keys[rows], values[rows], plan.positions)
        group = pool.group(layer)
        pages = Pages(
            group.keys,
            group.values,
            group.positions,
            group.key_scales,
            group.value_scales,
            group.spec.codec,
        )
        attended = self.stack.backend.run(
            plan, layer, queries[rows], pages, scale, probs=decoding.size.scores
        )
        if attended.probs is not None:
            found = self.stack.ranks.sum_readers(attended.probs, pool.layout.kv_heads)
            attended = attended._replace(probs=found)
        decoding.note(layer, queries[rows], attended)
        return attended.out

    def _prefill(
        self, prefill: Prefill, queries: Tensor, keys: Tensor, values: Tensor, scale: Scale
    ) -> Tensor:
        table, layer, count = prefill.sequence.table, self.layer, queries.shape[0]
        # Attend to entries as the codec stores them, so that results do not depend on chunks.
        held = bool(self.pool.lens(table)[layer].any())
        held = held or self.pool.group(layer).spec.codec is not None
        new = prefill.positions[prefill.done : prefill.done + count]
        self.pool.write(layer, self.pool.append(table, layer, count), keys, values, new)
        every, positions = slice(0, keys.shape[1]), new.expand(keys.shape[1], -1)
        runs = [Run(every, keys.transpose(0, 1), values.transpose(0, 1), positions)]
        if held:
            runs = runs_of(self.pool, table, layer)
        if prefill.needs.queries_from is not None:
            self._count_in(prefill, queries, new, prefill.needs.queries_from)
        last_only = self.last_only and not prefill.gives_all  # nothing reads the others' outputs
        summing = self.stack.backend.prefill_scored
        if summing is not None and not last_only and self._sums_up(prefill):
            return self._attend_summing(summing, prefill, queries, runs, new, scale)
        self._observe(prefill, queries, new, runs, scale)
        if last_only:
            if count < prefill.left:
                return queries.new_empty(0, *queries.shape[1:])
            queries, new = queries[-1:], new[-1:]
        return ragged.attend(self.stack.backend, runs, queries, new, scale)

    def _count_in(self, prefill: Prefill, queries: Tensor, positions: Tensor, first: int) -> None:
        """Add queries ``[n, H, D]`` of tokens from ``first`` on to the moments of their layer."""
        counting = positions >= first
        places = positions[counting] - prefill.sequence.offset
        unrotated = self.stack.streaming.unrotated(
            queries[counting].transpose(0, 1), places, self.layer, prefill.sequence, prefill.end
        )
        found = Moments.of(unrotated, self.stack.streaming.pairs(queries, self.layer))
        prefill.moments = found if prefill.moments is None else prefill.moments.plus(found)

    def _sums_up(self, prefill: Prefill) -> bool:
        """Whether the window's weights are only summed, so that attention can sum them in the same
        pass."""
        needs = prefill.needs
        linear = needs.reduce.heads.endswith("mean") and needs.reduce.rows in ("mean", "sum")
        alone = self.stack.ranks.copies(self.stack.kv_heads) == 1  # else other tokens need them too
        asked = bool(needs.window) and not (needs.remember or needs.column_sums)
        return linear and alone and asked

    def _attend_summing(
        self,
        summing: ScoredPrefill,
        prefill: Prefill,
        queries: Tensor,
        runs: list[Run],
        q_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        """``prefill`` that also adds the weights of this chunk's window queries to the scores."""
        needs, count = prefill.needs, len(queries)
        window = min(needs.window, prefill.length)
        first = max(0, prefill.length - window - prefill.done)  # first window row in this chunk
        if first >= count:
            return ragged.attend(self.stack.backend, runs, queries, q_pos, scale)
        ramp = torch.linspace(1.0, needs.reduce.newest_weight, needs.window, device=queries.device)
        end = needs.window - (
            prefill.length - prefill.done - count
        )  # newer ones come in later chunks
        ramp = ramp[end - (count - first) : end]
        if needs.reduce.rows == "mean":
            ramp = ramp / needs.window
        out, scored = ragged.attend_scored(summing, runs, queries, q_pos, scale, needs.reduce, ramp)
        scores = scored.scores
        if prefill.scores is not None:
            scores[:, : prefill.scores.shape[1]] += prefill.scores
        prefill.scores, ring = scores, prefill.sequence.table.ring
        if prefill.done + count == prefill.length and ring is not None:
            ring.queries[self.layer, :1], ring.lse[self.layer, :1] = queries[-1:], scored.lse[-1:]
            if self.layer == prefill.sequence.layers.first:
                ring.begin(prefill.positions[-1:])
        return out

    def _observe(
        self, prefill: Prefill, queries: Tensor, q_pos: Tensor, runs: list[Run], scale: Scale
    ) -> None:
        """At the end of this layer, collect the policy's observations and the ring's rows."""
        needs, count = prefill.needs, queries.shape[0]
        ring = prefill.sequence.table.ring if prefill.again is None else None
        is_last = prefill.done + count == prefill.length
        if needs.column_sums:
            readers = self.stack.ranks.all_readers(queries, self.stack.kv_heads)
            found = ragged.column_sums(self.stack.backend, runs, readers, q_pos, scale)
            if prefill.columns is not None:
                found[:, : prefill.columns.shape[1]] += prefill.columns
            prefill.columns = found
        window, newest = min(needs.window, prefill.length), None
        if window and scores_by_chunk(needs, prefill.length):
            found = self._scored(runs, queries, q_pos, scale, needs.reduce, count).scores
            if prefill.scores is not None:
                known = found[:, : prefill.scores.shape[1]]
                torch.maximum(known, prefill.scores, out=known)
            prefill.scores = found
        elif window:
            if prefill.queries is None:
                prefill.queries = queries.new_empty(window, *queries.shape[1:])
            begin = max(0, prefill.length - window - prefill.done)  # first window row in this chunk
            if begin < count:
                at = prefill.done + begin - (prefill.length - window)
                prefill.queries[at : at + count - begin] = queries[begin:]
            if is_last:
                assert prefill.queries is not None
                newest_at = prefill.positions[-window:]
                scored = self._scored(
                    runs, prefill.queries, newest_at, scale, needs.reduce, needs.window
                )
                prefill.scores, newest = scored.scores, scored.lse
        if is_last and ring is not None:
            if newest is None:
                reduce = Reduce("kv_mean")
                newest = self._scored(runs, queries[-1:], q_pos[-1:], scale, reduce, 1).lse
            rows = min(window, ring.capacity) if needs.remember else 1
            last = queries if rows == 1 else prefill.queries
            assert last is not None
            ring.queries[self.layer, :rows] = last[-rows:]
            ring.lse[self.layer, :rows] = newest[-rows:]
            if self.layer == prefill.sequence.layers.first:
                ring.begin(prefill.positions[-rows:])

    def _scored(
        self,
        runs: list[Run],
        queries: Tensor,
        q_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        rows: int,
    ) -> Scored:
        """``Backend.window_scores``: by all queries that read this rank's KV heads; returns
        the log-sum-exps of its own."""
        kv_heads = self.stack.kv_heads
        readers = self.stack.ranks.all_readers(queries, kv_heads)
        found = ragged.window_scores(
            self.stack.backend, runs, readers, q_pos, scale, reduce, rows=rows
        )
        return found._replace(lse=self.stack.ranks.own_readers(found.lse, kv_heads))


def scores_by_chunk(needs: Needs, length: int) -> bool:
    """Whether the window is all of ``length`` tokens and the maximum counts, so that a chunk's
    queries need not be kept."""
    flat = needs.reduce.rows == "max" and needs.reduce.newest_weight == 1
    return flat and needs.window >= length and not needs.remember


def runs_of(pool: Pool, table: Table, layer: int, values: bool = True) -> list[Run]:
    """A layer's entries, in runs of heads of equal length; keys only if ``values`` is false."""
    positions = pool.positions(table, layer)
    return [
        Run(
            heads,
            pool.keys(table, layer, heads),
            pool.values(table, layer, heads) if values else None,
            positions[heads, : int(pool.lens(table)[layer, heads.start])],
        )
        for heads in pool.runs(table, layer)
    ]


def route(layer: nn.Module, attention: str) -> nn.Module:
    """A copy of a decoder layer that shares every weight but attends through our function.

    The given layer does not change.  ``ValueError`` if it has hooks (device maps, offloading),
    which would bypass our attention.
    """
    for module in (layer, getattr(layer, attention)):
        if "forward" in vars(module) or hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{type(module).__name__} was hooked (a device map or offloading); load the model "
                f"whole on one device"
            )
    AttentionInterface.register(NAME, _attend)
    routed, inner = shallow(layer), shallow(getattr(layer, attention))
    config: Any = copy.copy(inner.config)
    config._attn_implementation = NAME
    inner.config = config
    routed._modules[attention] = inner
    return routed


def shallow(module: nn.Module) -> nn.Module:
    """A copy of a module, for inference, with the same submodules and weights."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.training = False
    return twin


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Disable dropout in all modules; each gets its mode back afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layer_call: LayerCall | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[1, heads, T, dim]`` in, ``[1, T, heads, dim]`` out."""
    if layer_call is None:
        raise ValueError(f"attention implementation {NAME!r} works only inside its own engine")
    given = {name for name, item in others.items() if item is not None and item is not False}
    if attention_mask is not None:
        given.add("attention_mask")
    if dropout:
        given.add("dropout")
    if sliding_window not in (None, layer_call.stack.shapes[layer_call.layer].window):
        given.add("sliding_window")
    if given:
        raise ValueError(
            f"{type(module).__name__} uses attention features that this engine does not support: "
            f"{', '.join(sorted(given))}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer_call(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        Scale(scale, softcap, layer_call.stack.shapes[layer_call.layer].window),
    )
    return out[None], None
