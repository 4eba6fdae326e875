"""The most memory a request may need, and how much is reserved: admission by reservation.

Every request's forecast is rounded up to pages and added to what is already reserved, so an
admitted request can never run out of memory (``scheduler.py`` describes the alternative).  Query
rings, policy state and the hidden states of prompts in progress count against the same
``kv_memory``.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import numpy as np

from pyramidinfer.cache import Layout, Table
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.engine.checks import ContextLengthError
from pyramidinfer.engine.readings import readings
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.routing import scores_by_chunk
from pyramidinfer.policies import Policy
from pyramidinfer.policies.base import Forecast
from pyramidinfer.types import Layers, Phase, View

__all__ = ["Cost", "Ledger", "for_samples", "full_bytes", "full_lens", "uncoded_bytes"]


class Cost(NamedTuple):
    """An upper bound: pages per group at the worst moment, and all bytes at that moment.

    ``after_prefill``: the bound once the prefill is done (None if this bound already is it);
    ``entries`` per layer and head, and the bytes of ``overhead`` outside pages: the parts of the
    bound after prefill.
    """

    pages: np.ndarray
    bytes: int
    after_prefill: Cost | None = None
    entries: np.ndarray | None = None
    overhead: int = 0

    def plus(self, other: Cost) -> Cost:
        """The sum of both costs."""
        return Cost(self.pages + other.pages, self.bytes + other.bytes)


def for_samples(cost: Cost, samples: int) -> Cost:
    """The cost of several answers to one prompt: one prefills it, then each may hold its own
    cache."""
    after = cost.after_prefill or cost
    pages = np.maximum(cost.pages, after.pages * samples)
    return Cost(pages, max(cost.bytes, after.bytes * samples), after)


class Reserved(Protocol):
    """A request, as far as the ledger needs it."""

    reserved: Cost | None


class Ledger:
    """Reservations in the pool; together they never exceed its capacity (but see ``is_over``)."""

    def __init__(self, layout: Layout, runner: ModelRunner) -> None:
        self.layout, self.runner = layout, runner
        self.pages = np.zeros_like(layout.page_counts)
        self.bytes = 0

    def cost(
        self,
        policy: Policy,
        new: int,
        max_new: int,
        layers: Layers,
        protected: int,
        held: np.ndarray | None = None,
        expected: int | None = None,
        seen: int | None = 0,
        here: np.ndarray | None = None,
    ) -> Cost:
        """The most that ``new`` prompt tokens and ``max_new`` generated ones can need.

        ``held``: entries per layer and head already in the cache (extend);  ``expected``: count
        this many generated tokens instead of ``max_new`` (the ring is sized for ``max_new``);
        ``seen``: the number of tokens before those of the prompt, in the cache or dropped from it;
        None: the prompt is not read again, even if the policy asks for it;  ``here``: the most
        prompt entries per layer and head that stay in the pool, if the others move to host memory
        (``cache/away.py``).
        """
        layout, runner = self.layout, self.runner
        shape = (layers.count, runner.kv_heads)
        base = np.zeros(shape, dtype=np.int64) if held is None else held
        generated, reread = max_new if expected is None else expected, 0
        if seen is not None:
            again = readings(runner, policy, range(new), seen + new, max_new)
            reread = max(map(len, again), default=0)
        forecast = policy.forecast(new, generated, layers)
        reach = np.minimum(np.array(forecast.reach) + protected, new)
        kept, total = base + reach[:, None] + generated, None
        bound: Forecast | None = forecast
        if held is not None:
            bound = policy.forecast_extended(seen + new, generated, layers) if seen else None
        if bound is not None:
            kept = np.minimum(kept, bound.by_head(runner.kv_heads) + protected)
            if bound.total is not None:
                total = np.array(bound.total) + protected * runner.kv_heads
        if here is not None:
            kept = np.minimum(kept, here + generated)
        whole = base + reach[:, None]  # while the prompt is read again
        for layer, sizes in enumerate(runner.shapes):
            if sizes.window is not None and not layers.governed[layer]:
                most = sizes.window + layout.page_size
                kept[layer] = np.minimum(kept[layer], most)
                whole[layer] = np.minimum(whole[layer], most)
        final, before = self._pages(whole if reread else kept, total), self._pages(base)
        arriving = np.maximum(final, self._pages(base + reach[:, None]))
        worst = self._worst(before, arriving, final)
        if reread:
            worst = np.maximum(worst, self._worst(final, self._pages(whole + reread), final))
        lasting, transient = self._overhead(policy, new, max_new, layers, reach, base, reread)
        transient += forecast.working_bytes
        if policy.streams:
            lasting += self._rotated(forecast.anchors + protected)
        size = layout.bytes_of(worst) + lasting + transient
        in_all = None
        if forecast.sum is not None:
            in_all = int(base.sum()) + forecast.sum + protected * base.size
        after = self.decode_cost(kept, lasting, total, in_all)
        if here is not None:
            after = self._with_staging(after, reach)
        return Cost(np.maximum(worst, after.pages), max(size, after.bytes), after)

    def _worst(self, before: np.ndarray, within: np.ndarray, final: np.ndarray) -> np.ndarray:
        """The most pages per group while new tokens go through the layers one by one.  Per layer:
        before they reach it, while they are in it, and afterwards."""
        worst, layers = np.zeros_like(self.layout.page_counts), np.arange(final.shape[1])
        for layer in layers:
            pages = np.where(layers <= layer, final, before)
            pages[:, layer] = within[:, layer]
            worst = np.maximum(worst, self.layout.by_group(pages))
        return worst

    def _with_staging(self, cost: Cost, reach: np.ndarray) -> Cost:
        """A cost with the spare pages for one layer, of ``reach`` ``[layers]`` tokens."""
        layout, spare = self.layout, np.zeros_like(cost.pages)
        for layer, tokens in enumerate(reach.tolist()):
            pages = np.zeros((layout.layers, layout.kv_heads), dtype=np.int64)
            pages[layer] = layout.pages_for(tokens)
            spare = np.maximum(spare, layout.by_group(layout.by_layer(pages)))
        size = cost.bytes + layout.bytes_of(spare)
        return cost._replace(pages=cost.pages + spare, bytes=size)

    def _pages(self, entries: np.ndarray, total: np.ndarray | None = None) -> np.ndarray:
        """Pages by rank and layer, ``[ranks, layers]``, of this many entries per head ``[layers,
        kv_heads]``, which are at most ``total`` per layer."""
        layout = self.layout
        pages = layout.by_layer(layout.pages_for(entries))
        if total is not None:  # every head may have one page that is not full
            pages = np.minimum(pages, total // layout.page_size + layout.heads_by_layer)
        return pages

    def decode_cost(
        self,
        entries: np.ndarray,
        overhead: int,
        total: np.ndarray | None = None,
        in_all: int | None = None,
    ) -> Cost:
        """The cost of this many entries per layer and head, at most ``total`` per layer and
        ``in_all`` together, and ``overhead`` bytes outside pages."""
        layout, pages = self.layout, self._pages(entries, total)
        groups = layout.by_group(pages)
        if in_all is not None:
            heads = layout.by_group(layout.heads_by_layer)
            groups = np.minimum(groups, in_all // layout.page_size + heads)
        size = layout.bytes_of(groups) + overhead
        return Cost(groups, size, None, entries, overhead)

    def scoring_cost(
        self,
        policy: Policy,
        new: int,
        scored: int,
        layers: Layers,
        protected: int,
        held: np.ndarray | None = None,
        seen: int = 0,
    ) -> Cost:
        """The most that a context and a continuation scored on top of its cache can need."""
        context = self.cost(policy, new, 0, layers, protected, held, seen=seen)
        forecast = policy.forecast(new, 0, layers).by_head(self.runner.kv_heads)
        kept = np.minimum(forecast + protected, new)
        extended = self.cost(policy, scored, 0, layers, scored, kept, seen=None)
        pages = np.maximum(context.pages, extended.pages)
        return Cost(pages, max(context.bytes, extended.bytes), extended.after_prefill)

    def prefix_cost(
        self,
        policy: Policy,
        prefix: int,
        new: int,
        max_new: int,
        layers: Layers,
        protected: int,
        expected: int,
    ) -> Cost:
        """The most that a prompt can need if its first ``prefix`` tokens are prefilled separately
        and the ``new`` remaining ones on top of the entries kept of these."""
        own = self.runner.layers_for(prefix + 1)
        first = self.cost(policy, prefix, 1, own, protected)
        assert first.after_prefill is not None and first.after_prefill.entries is not None
        kept = np.minimum(first.after_prefill.entries, prefix)
        rest = self.cost(policy, new, max_new, layers, protected, kept, expected, prefix)
        pages = np.maximum(first.pages, rest.pages)
        return Cost(pages, max(first.bytes, rest.bytes), rest.after_prefill)

    def _overhead(
        self,
        policy: Policy,
        new: int,
        max_new: int,
        layers: Layers,
        reach: np.ndarray,
        base: np.ndarray,
        reread: int,
    ) -> tuple[int, int]:
        """Bytes outside pages: (ring and state, hidden states and window queries of a prompt)."""
        runner, item = self.runner, int(self.runner.dtype.itemsize)
        high = int(accumulate_dtype(runner.dtype).itemsize)
        shapes = list(map(runner.ranks.own, runner.shapes))
        heads = max(shape.heads for shape in shapes)
        key_dim = max(shape.key_dim for shape in shapes)
        most = base.max(1)
        total = new + int(most[layers.first])
        rows = policy.ring(total, max_new)
        ring = rows * (layers.count * heads * (key_dim * item + high) + 8)
        state = policy.start(layers)
        kv_heads = int(max(shape.kv_heads for shape in shapes))

        def going(phase: Phase, reach: np.ndarray, base: np.ndarray) -> int:
            window = columns = moments = 0
            for layer in range(layers.count):
                length, lens = int(reach[layer]), (base[layer] + reach[layer]).tolist()
                view = View(phase, layer, layers, new, length, tuple(lens), total, total, state)
                needs = policy.needs(view)
                if not scores_by_chunk(needs, length):
                    window = max(window, min(needs.window, length))
                columns = max(columns, (bool(needs.window) + needs.column_sums) * max(lens))
                if needs.queries_from is not None:
                    moments = heads * (key_dim * (key_dim + 1) + key_dim // 2)
            hidden = 2 * int(reach[0]) * int(runner.hidden_size) * item
            told = moments * high + 8 * bool(moments)
            return hidden + window * heads * key_dim * item + columns * kv_heads * high + told

        transient = going("extend" if base.any() else "prefill", reach, base)
        if reread:  # the head's input is stored meanwhile if every prompt token is scored
            waiting = new * runner.hidden_size * item
            again = going("reread", np.full(layers.count, reread), base + reach[:, None])
            transient = max(transient, waiting + again)
        return ring + sum(value.nbytes for value in state.values()), transient

    def _rotated(self, count: int) -> int:
        """Bytes of the copies of rotated keys that a streaming request keeps, for ``count``
        tokens."""
        runner = self.runner
        sizes = (runner.ranks.own(runner.shapes[layer]) for layer in runner.streaming.layers)
        keys = sum(shape.kv_heads * shape.key_dim for shape in sizes)
        return count * (keys * int(runner.dtype.itemsize) + 16) + 8

    def fits(self, cost: Cost, instead_of: Cost | None = None) -> bool:
        """Whether ``cost`` can be reserved now, if ``instead_of`` is given back."""
        pages, size = self.pages + cost.pages, self.bytes + cost.bytes
        if instead_of is not None:
            pages, size = pages - instead_of.pages, size - instead_of.bytes
        return size <= self.layout.budget and bool((pages <= self.layout.page_counts).all())

    @property
    def is_over(self) -> bool:
        """Whether more is reserved than the pool has (``admission="overcommit"`` only, before a
        pass begins)."""
        return self.bytes > self.layout.budget or bool((self.pages > self.layout.page_counts).any())

    def ever_fits(self, cost: Cost) -> bool:
        """Whether a request of this cost could be admitted to an empty pool."""
        return self.how_many(cost) > 0

    def how_many(self, cost: Cost) -> int:
        """The number of requests of this cost that an empty pool could admit."""
        wanted = cost.pages > 0
        pages: list[int] = (self.layout.page_counts[wanted] // cost.pages[wanted]).tolist()
        return min([*pages, self.layout.budget // max(cost.bytes, 1)])

    def check_fits(self, cost: Cost, prompt: int, max_new: int, samples: int = 1) -> None:
        """``ContextLengthError`` for a request that could never be admitted."""
        have = self.layout.budget
        if not self.ever_fits(cost):
            each = f" in each of {samples} answers" if samples > 1 else ""
            raise ContextLengthError(
                f"a prompt of {prompt} tokens with {max_new} generated ones{each} needs up to "
                f"{cost.bytes} bytes ({cost.bytes / 2**20:.1f} MiB) of kv_memory; the pool has "
                f"{have} ({have / 2**20:.1f} MiB): raise kv_memory, lower keep or max_tokens, or "
                f"shorten the prompt"
            )

    def held(self, table: Table) -> Cost:
        """The cost of a finished request whose cache is kept."""
        used = self.layout.by_group(self._pages(table.kept))
        beside = table.extra_bytes + self.runner.streaming.copied_elsewhere(table)
        return Cost(used, self.layout.bytes_of(used) + beside)

    def reserve(self, holder: Reserved, cost: Cost | None) -> None:
        """Reserve ``cost`` for a request, replacing its previous reservation."""
        if holder.reserved is not None:
            self.pages -= holder.reserved.pages
            self.bytes -= holder.reserved.bytes
        holder.reserved = cost
        if cost is not None:
            self.pages += cost.pages
            self.bytes += cost.bytes


def full_bytes(layout: Layout, runner: ModelRunner, seen_len: int) -> int:
    """Bytes of pages that a full cache of ``seen_len`` tokens takes, at 16 bits per number if the
    pool quantizes; sliding layers stop at their window."""
    return uncoded_bytes(layout, runner, full_lens(runner, seen_len))


def full_lens(
    runner: ModelRunner, seen_len: int, held: Items[int] | None = None
) -> tuple[int, ...]:
    """Entries per layer that a full cache of ``seen_len`` tokens holds in every KV head.

    Sliding layers stop at their window and drop older entries several at a time: ``held`` is how
    many they hold now, which a full cache would hold as well.
    """
    held = held or (0,) * runner.depth
    return tuple(
        seen_len if shape.window is None else max(min(seen_len, shape.window - 1), now)
        for shape, now in zip(runner.shapes, held, strict=True)
    )


def uncoded_bytes(layout: Layout, runner: ModelRunner, lens: Items[int]) -> int:
    """Bytes of pages of a cache with this many entries per layer in every KV head, at 16 bits per
    number if the pool quantizes."""
    return sum(
        int(layout.pages_for(entries)) * shape.kv_heads * int(size)
        for entries, shape, size in zip(lens, runner.shapes, layout.uncoded_page_bytes, strict=True)
    )
