"""Recompression: entries of held caches are selected again, by what the model needs to repeat the
text.

The entries of a conversation's cache were selected by the attention of its last question, but later
turns ask different questions.  Recompression prefills the whole text of a held cache again and
reads it after itself, as in KVzip (Kim et al., 2505.23416), so the scores do not depend on a
question. Every head of every layer then keeps as many entries as before, those with the best
scores, so bytes, reservations and the state of the conversation's policy do not change.  Tokens at
the start and end of the text that all heads held stay (the policy's first tokens, its newest
window, generated tokens), and heads that held the same tokens still do.

Caches without dropped tokens do not change, nor caches whose entries cannot be exchanged one by
one: policies with running scores (h2o), with positions inside the cache (streaming_llm), or that
read texts again themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.reuse import Conversations
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.batch import Batch, Prefill, Sequence, Work
from pyramidinfer.policies import Forecast, KVzip, Policy
from pyramidinfer.types import Best, Keep, Layers, Needs, Observation, State, TokenIds, View

__all__ = ["Recompression", "Recompressor", "recompress"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recut(Policy):
    """Lets a text be read again like ``reader``, and keeps a given number of entries in every head.

    counts : entries, ``[layers][kv_heads]``;  shared : by layer, whether all heads keep the same
    tokens;  sinks, recent : first and newest tokens that stay in every head.
    """

    name: ClassVar[str] = "recut"

    reader: KVzip
    counts: tuple[tuple[int, ...], ...]
    shared: tuple[bool, ...]
    sinks: int
    recent: int

    def readings(self, text: Items[int], room: int, head: int = 0) -> list[TokenIds]:
        return self.reader.readings(text, room, head)

    def needs(self, view: View) -> Needs:
        needs = self.reader.needs(view)
        if view.new_len or needs.retain is None:
            return needs
        heads = 1 if self.shared[view.layer] else len(view.head_lens)
        counts = self.counts[view.layer][:heads]
        rule = Best(counts, "own", sinks=self.sinks, recent=self.recent)
        return Needs(retain=rule)

    def score(self, seen: Observation) -> Tensor:
        found = seen.view.state[f"scores.{seen.view.layer}"].to(seen.positions.device)
        scores = found.gather(1, seen.positions)  # every head holds the whole text
        return scores.amax(0, keepdim=True) if self.shared[seen.view.layer] else scores

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        if seen.view.new_len:
            return self.reader.retain(seen, state)
        return super().retain(seen, state)

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        heads = [
            [(count if governed else prompt_len) + max_new for count in counts]
            for counts, governed in zip(self.counts, layers.governed, strict=True)
        ]
        working = self.reader.forecast(prompt_len, max_new, layers).working_bytes
        reach, most = [prompt_len] * layers.count, list(map(max, heads))
        return Forecast(reach, most, heads, working_bytes=working)


class _Found(NamedTuple):
    """The entries of a held cache: by layer, whether its heads keep the same tokens; the number of
    first and newest tokens that all heads have; whether any head could keep different others."""

    shared: tuple[bool, ...]
    sinks: int
    recent: int
    is_free: bool


def _look(shared: Shared, held: Sequence, layers: Layers, protected: Tensor) -> _Found:
    """See ``_Found``; of the layers that are ``governed``."""
    length, cut, same = held.table.seen_len, [], []
    for layer, governed in enumerate(layers.governed):
        places = shared.runner.positions(shared.pool, held.table, layer)
        there = torch.zeros(len(places), length + 1, dtype=torch.bool, device=places.device)
        there.scatter_(1, torch.where(places < 0, length, places), True)
        there = there[:, :length]
        same.append(bool((there == there[:1]).all()))
        if governed:
            cut.append(there[~there.all(1)])
    rows = torch.cat(cut) if cut else torch.zeros(0, length, dtype=torch.bool)
    if not len(rows):
        return _Found(tuple(same), 0, 0, False)
    sinks, recent = (int(each.int().cumprod(1).sum(1).min()) for each in (rows, rows.flip(1)))
    fixed = protected.to(rows.device).clone()
    fixed[:sinks] = fixed[length - recent :] = True
    return _Found(tuple(same), sinks, recent, bool((rows.sum(1) > fixed.sum()).any()))


class Recompression:
    """The recompression of a held cache, into a new cache that replaces the old one at the end.

    It only uses free memory, which is ``reserved`` for it as for a request.  ``work``: layer-tokens
    computed so far.  ``ValueError`` with the reason if the cache is not recompressed.
    """

    def __init__(
        self, shared: Shared, conversations: Conversations, reader: KVzip, held: Request
    ) -> None:
        self.shared, self.conversations, self.reader = shared, conversations, reader
        self.held, self.work = held, 0
        self.reserved: Cost | None = None
        runner, length = shared.runner, held.table.seen_len
        text = held.text[:length]
        protected = torch.zeros(length, dtype=torch.bool, device=runner.device)
        for start, stop in held.protect:
            protected[start:stop] = True
        layers = runner.layers_for(length + 1)
        policy = self._policy(layers, protected)
        cost = shared.ledger.cost(policy, length, 1, layers, int(protected.sum()))
        if is_long(runner, policy, length, length, 1) != held.is_long:
            raise ValueError("its rotary positions would differ after reading it again")
        if not shared.ledger.fits(cost):
            raise ValueError(f"it temporarily needs {cost.bytes} bytes, more than are free")
        again = shared.readings(policy, text, 0, 1)
        tokens, reach = torch.tensor(text, device=runner.device), [length] * layers.count
        table = shared.pool.new_table(length)
        sequence = Sequence(
            policy=policy,
            cache=table,
            layers=layers,
            protected=protected,
            is_long=held.is_long,
            adapter=held.adapter,
        )
        self.prefill = Prefill(sequence, tokens, 0, reach, readings=again)
        shared.ledger.reserve(self, cost)

    def _policy(self, layers: Layers, protected: Tensor) -> _Recut:
        """The policy that selects the entries; ``ValueError`` if there is nothing to select."""
        held, reader = self.held, self.reader
        old = held.policy
        if old.reads_again or old.uses_scores or old.streams:
            raise ValueError(f"entries of policy {old.name!r} cannot be exchanged")
        if held.prefix == held.table.seen_len:
            raise ValueError("others go on from this prefix as from one that they take in anew")
        if held.table.seen_len < reader.min_text:
            raise ValueError(f"its text has fewer than {reader.min_text} tokens")
        found = _look(self.shared, held, layers, protected)
        if not found.is_free:
            raise ValueError("no head could keep different entries")
        counts = tuple(held.table.lens(layer) for layer in range(layers.count))
        return _Recut(reader, counts, found.shared, found.sinks, found.recent)

    def step(self) -> bool:
        """Take one chunk through one layer; True when the new cache has replaced the old one.

        If anything is raised, the old cache stays and the new one is freed.
        """
        shared, budget = self.shared, self.shared.config.prefill_chunk
        work = Work(self.prefill, budget)
        nothing = torch.empty(0, dtype=torch.int64, device=shared.runner.device)
        try:
            stepped = shared.runner.forward(shared.pool, Batch([], nothing, [work]))
            self.work += budget - work.budget
            if not self.prefill.finished:
                return False
            if not bool(stepped.logits.isfinite().all()):
                raise FloatingPointError("the model's logits are not finite numbers")
        except BaseException:
            self.drop()
            raise
        self._exchange()
        return True

    def drop(self) -> None:
        """Free its memory; the held cache is unchanged, or already replaced."""
        table = self.prefill.sequence.table
        if self.held.cache is not table:
            self.shared.pool.release(table)
        self.shared.ledger.reserve(self, None)

    def _exchange(self) -> None:
        old, table = self.held.table, self.prefill.sequence.table
        table.state, table.ring, table.peak_bytes = old.state, old.ring, old.peak_bytes
        self.shared.pool.note_overhead(table)
        self.conversations.exchange(self.held, table)
        self.shared.ledger.reserve(self, None)


def recompress(
    shared: Shared, conversations: Conversations, reader: KVzip, request: Request
) -> bool:
    """See :meth:`Engine.recompress`."""
    if request.cache is None or not request.ended:
        raise ValueError(f"request {request.id} holds no cache; add it with hold=True")
    try:
        recompression = Recompression(shared, conversations, reader, request)
    except ValueError as error:
        log.debug("the cache of request %d is left alone: %s", request.id, error)
        return False
    try:
        while not recompression.step():
            pass
    except BaseException:  # between two steps; a failed step has freed its memory
        if recompression.reserved is not None:
            recompression.drop()
        raise
    return True


class Recompressor:
    """Recompresses caches of finished conversations while the engine is idle.

    The most recently finished conversation comes first; each is tried once, and again only if it
    was interrupted.  ``done``: number of recompressed caches;  ``tokens``: computed for it, also
    without success, as a mean over layers.  ``ValueError`` for an engine that holds no
    conversations.
    """

    def __init__(self, shared: Shared, conversations: Conversations, reader: KVzip) -> None:
        if not shared.config.reuse_share:
            raise ValueError(
                "compress_idle needs conversations whose caches are held: give the engine a "
                "reuse_share above 0"
            )
        self.shared, self.conversations, self.reader = shared, conversations, reader
        self.done, self.tokens = 0, 0.0
        self._now: Recompression | None = None
        self._tried: set[Request] = set()

    def step(self) -> bool:
        """Check a cache, or take one chunk through one layer; False if nothing is left."""
        now, self._now = self._now, None
        if now is None:
            return self._begin()
        before = now.work
        try:
            ended = now.step()
        finally:
            self.tokens += (now.work - before) / self.shared.runner.depth
        if ended:
            self.done += 1
            log.debug("the cache of request %d was recompressed", now.held.id)
        else:
            self._now = now
        return True

    def _begin(self) -> bool:
        held = self.conversations.held
        self._tried.intersection_update(held)
        request = next((each for each in reversed(held) if each not in self._tried), None)
        if request is None:
            return False
        self._tried.add(request)
        try:
            self._now = Recompression(self.shared, self.conversations, self.reader, request)
        except ValueError as error:
            log.debug("the cache of request %d is left alone: %s", request.id, error)
        return True

    def drop(self) -> None:
        """Stop the current cache, if any; it starts again later."""
        if self._now is not None:
            self._tried.remove(self._now.held)
            self._now.drop()
            self._now = None
