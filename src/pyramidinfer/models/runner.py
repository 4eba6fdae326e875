"""The layer loop: Hugging Face decoder layers, with tokens dropped between them.

One step packs the newest token of every running request and the chunks of prompts in progress
into one flat row ``[rows, hidden]`` per layer.  Policies, cache and attention meet here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.cache import GroupSpec, Place, Pool, Table
from pyramidinfer.codec import find_codec
from pyramidinfer.models import rereading
from pyramidinfer.models.adapters import Adapted, Adapter
from pyramidinfer.models.batch import Batch, Prefill, Sequence, Work
from pyramidinfer.models.decode import Decoding, Size, Stepped
from pyramidinfer.models.device import Device, choose_device
from pyramidinfer.models.evicting import evict, joined_positions, joined_scores, retain
from pyramidinfer.models.families import find_family
from pyramidinfer.models.fingerprint import measure
from pyramidinfer.models.fused import fuse, why_not
from pyramidinfer.models.graphs import DecodeGraphs
from pyramidinfer.models.loading import end_ids
from pyramidinfer.models.lora_modules import read_adapters
from pyramidinfer.models.ranks import ALONE, Ranks
from pyramidinfer.models.rotary import Rotary, Tables, count_positions
from pyramidinfer.models.routing import Decoder, LayerCall, Segment, evaluating
from pyramidinfer.models.stages import Stages
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.models.weights import round_weights
from pyramidinfer.types import AttentionShape, Keep, Layers, Observation, Queries

__all__ = ["ModelRunner", "Stepped"]


def _no_span(name: str) -> AbstractContextManager[None]:
    return nullcontext()


READ = 64  # rows of a prompt's logits that are held at a time


class ModelRunner:
    """A transformers causal language model, driven layer by layer.

    backend : name that selects the implementations for the model's device (``Device``).
    ``ValueError`` for an unsupported family or layer feature.  The model object stays usable and
    in its mode (it runs without dropout even in training mode), unless the engine owns it
    (``own``): then packed weights are freed.  ``ranks``: the ranks that share the layers, if the
    model is one rank's part (``models/sharding.py``); ``shapes`` are of all ranks together.
    ``weights``: how weights of linears are stored (``EngineConfig.weights``). ``stages``: the
    layers of each stage, if there are several (``models/pipeline.py``). ``span``: for profilers; a
    context that is entered around the selection of entries, with the name ``"retain"`` at a layer's
    end in prefill and ``"evict"`` in decode.
    """

    def __init__(
        self,
        model: Any,
        backend: str = "auto",
        prefill_chunk: int = 1024,
        *,
        own: bool = False,
        ranks: Ranks = ALONE,
        stages: Stages | None = None,
        weights: str = "auto",
    ) -> None:
        self.config: Any = model.config
        self.family = find_family(self.config)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.chosen = choose_device(backend, self.device, self.dtype, weights)
        if weights != "auto" and self.chosen.coding == "rounded" and not first.is_meta:
            model = model if own else copy.deepcopy(model)
            round_weights(model, weights)
        self.prefill_chunk, self.ranks, self.weights = prefill_chunk, ranks, weights
        try:
            self.body: Any = model.get_submodule(self.family.body)
            self.head: Any = model.get_output_embeddings()
        except AttributeError:
            self.head = None
        if self.head is None:
            raise ValueError(
                f"{type(model).__name__} has no language model head; give the …ForCausalLM model"
            )
        depth = self.config.num_hidden_layers
        self._given: list[nn.Module] = [] if own else list(model.modules())
        originals = list(self.body.layers)[:depth]
        self.shapes = [self._shape(layer) for layer in originals]
        self.stages = stages or Stages([range(depth)])
        ranks.share(self.kv_heads)
        self.rotary = Rotary(self.family, self.body, self.config)
        self.kinds = list(self.config.layer_types) if self.family.rotary_by_type else [None] * depth
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.max_positions = count_positions(self.family, self.config)
        self._like = torch.empty(0, dtype=self.dtype, device=self.device)
        plain = Decoder(self.body, self.head, self.config, self.rotary, self._like, self.stages.own)
        self.decoder = plain
        self.check_weights(weights, self.chosen)
        packed = weights == "gguf" and self.chosen.coding == "packed" and not first.is_meta
        if packed and not any(hasattr(each, "rows") for each in model.modules()):
            raise ValueError("weights='gguf' is for models loaded from a GGUF file: name the file")
        if (own or weights != "auto") and ranks.fingerprint is None:  # embeddings are freed
            self.ranks = ranks = replace(ranks, fingerprint=measure(self.body))
        own_shapes = list(map(ranks.own, self.shapes))
        self.decoder = fuse(plain, own_shapes, self.chosen.ops, ranks, own=own)
        self._graphs: WeakKeyDictionary[Pool, DecodeGraphs] = WeakKeyDictionary()
        self.end_ids = end_ids(model)
        self.span: Callable[[str], AbstractContextManager[None]] = _no_span
        self.every_output = False  # also the last layer's, though the head reads last tokens only
        self.scales: list[Scale | None] = [None] * depth  # set when a layer has run
        attentions: list[Any] = [getattr(layer, self.family.attention) for layer in originals]
        self.streaming = Streaming(
            self.rotary,
            self.kinds,
            [getattr(each, "use_rope", True) for each in attentions],
            self.max_positions,
            self.stages.own,
        )

    def load_adapters(self, modules: Mapping[str, str]) -> dict[str, Adapter]:
        """Adapters by name, from their folders or hub ids, ready for use by requests.

        ``ValueError`` for an adapter that cannot be served with this model on one rank.
        """
        found = read_adapters(modules, self.body, self.config, self._like)
        for each in found.values():
            self.decoder.take_adapter(each)
        return found

    def check_weights(self, weights: str, chosen: Device) -> None:
        """``ValueError`` if the chosen implementations cannot store this model's weights this way;
        needs no weights."""
        if weights == "auto" or chosen.coding == "rounded":
            return
        if chosen.coding is None:
            why = f"backend {chosen.attention.name!r} multiplies weights in the model's dtype only"
        elif chosen.ops is None:
            why = f"linears of {self.dtype} do not run on the CPU kernels: try dtype='bfloat16'"
        else:
            shapes = list(map(self.ranks.own, self.shapes))
            found = why_not(self.decoder, shapes, chosen.ops, self.ranks)
            if found is None:
                return
            why = f"this model cannot be packed for the CPU kernels ({found})"
        raise ValueError(
            f"weights={weights!r}: {why}. Omit weights, or measure their effect with "
            f"backend='reference', which rounds them and saves no memory"
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weights."""
        return self.decoder.weight_bytes

    @property
    def depth(self) -> int:
        return len(self.shapes)

    @property
    def kv_heads(self) -> int:
        """KV heads of every layer."""
        return self.shapes[0].kv_heads

    @property
    def steps_on_buffers(self) -> bool:
        """Whether steps that only decode run on fixed buffers (CUDA graphs, on a GPU)."""
        alone = self.ranks.size == self.stages.size == 1
        return self.decoder.is_fused and self.chosen.replays and alone

    @property
    def backend(self) -> Backend:
        return self.chosen.attention

    @property
    def places(self) -> list[Place]:
        """Every rank's place in the cache: the ranks of the first stage, then of the next one."""
        return [
            Place(layers, heads)
            for layers in self.stages.layers
            for heads in self.ranks.heads_by_rank(self.kv_heads)
        ]

    @property
    def rank(self) -> int:
        """This rank's number in ``places``."""
        return self.stages.index * self.ranks.size + self.ranks.index

    def positions(self, pool: Pool, table: Table, layer: int) -> Tensor:
        """Original positions of a layer's entries in all heads, ``[kv_heads, longest]``, negative
        past the end of a shorter head."""
        return joined_positions(pool, table, layer, self.ranks)

    def graphs(self, pool: Pool) -> DecodeGraphs:
        """Decode steps over this pool, kept as long as the pool."""
        if pool not in self._graphs:
            self._graphs[pool] = DecodeGraphs(pool)
        return self._graphs[pool]

    def group_specs(self, kv_dtype: str = "auto") -> list[GroupSpec]:
        """Layers grouped by the size of their entries, stored in ``kv_dtype``.  ``ValueError``
        if this model's heads cannot be stored this way."""
        codec = find_codec(kv_dtype)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in enumerate(self.shapes):
            key = (shape.kv_heads, shape.key_dim, shape.value_dim)
            groups.setdefault(key, []).append(layer)
        if codec is not None:
            for _, *sizes in groups:
                for size in sizes:
                    codec.group(size)  # raises if it cannot divide the heads
        return [GroupSpec(tuple(layers), *key, self.dtype, codec) for key, layers in groups.items()]

    def layers_for(self, longest: int) -> Layers:
        """The depth for a request of at most ``longest`` tokens: windows that are longer do not
        count."""
        windows = (shape.window for shape in self.shapes)
        governed = tuple(window is None or window >= longest for window in windows)
        return Layers(governed, self.kv_heads)

    @torch.inference_mode()
    def forward(self, pool: Pool, batch: Batch) -> Stepped:
        """Run one step.  Decoding sequences must be committed with ``commit`` afterwards."""
        with evaluating(self._given):
            return self._forward(pool, batch)

    def _forward(self, pool: Pool, batch: Batch) -> Stepped:
        decoding = self._claim(pool, batch) if batch.decode else None
        if decoding is not None and decoding.fixed:
            logits = self.graphs(pool).run(decoding, lambda: self._decode(pool, decoding))
            return Stepped(logits[: len(batch.decode)], decoding)
        last: dict[int, Tensor] = {}
        through = self._pass(pool, decoding, batch.works, last)
        while any(work.budget > 0 and work.prefill.again is not None for work in batch.works):
            self._pass(pool, None, batch.works, last)  # texts that start to be read again
        rows = [through] if len(through) else []
        rows += [last[index] for index in sorted(last)]
        if not rows:
            return Stepped(through.new_empty(0, self.vocab_size), decoding)
        return Stepped(self._logits(torch.cat(rows)), decoding)

    def _decode(self, pool: Pool, decoding: Decoding) -> Tensor:
        """Logits ``[R, vocab]`` of a decode-only step.  Nothing here waits for the device or
        depends on the contents of its buffers."""
        return self._logits(self._pass(pool, decoding, [], {}))

    def _pass(
        self,
        pool: Pool,
        decoding: Decoding | None,
        works: list[Work],
        last: dict[int, Tensor],
        entering: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers once, for tokens that sequences feed and for prefill works from
        their current layer.

        entering : ``[R, hidden]`` of the tokens, if they come from another stage.  Returns their
        outputs ``[R, hidden]``; ``last`` receives the outputs of works that finish.
        """
        hidden = self._like.new_empty(0, self.hidden_size)
        if decoding is not None:
            if entering is None:
                entering = self._embed(decoding.tokens, decoding.plan.positions)
            hidden = entering
            if not works and (out := self.decoder.step(pool, decoding, hidden)) is not None:
                return out
        for layer in self.stages.own:
            riding = decoding
            while True:
                start = 0 if riding is None else len(hidden)
                segments, parts = self._take(works, layer, start)
                if riding is None and not segments:
                    break
                rows = parts if riding is None else [hidden, *parts]
                out = self._run_layer(pool, layer, rows, riding, segments)
                if riding is not None:
                    hidden, riding = out[:start], None
                self._store(segments, out, start)
            for index, work in enumerate(works):
                if work.prefill.layer == layer and work.prefill.left == 0:
                    with self.span("retain"):
                        tail = self._finish_layer(pool, work.prefill)
                    if tail is not None:
                        last[index] = tail
        return hidden

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens ``[n]`` → ``[n, hidden]``."""
        return self.decoder.embed(ids, positions)

    # --- one layer ----------------------------------------------------------------------------

    def _take(
        self, works: list[Work], layer: int, start: int
    ) -> tuple[list[Segment], list[Tensor]]:
        """Claim the next chunk of every prefill that is at this layer and has budget left."""
        segments, parts = [], []
        for work in works:
            prefill = work.prefill
            count = min(self.prefill_chunk, prefill.left, work.budget)
            if prefill.layer != layer or count <= 0:
                continue
            if prefill.done == 0:
                prefill.needs = prefill.sequence.policy.needs(prefill.view())
                self.ranks.check(prefill.needs)
                prefill.computed.append(prefill.length)
            rows = slice(prefill.done, prefill.done + count)
            if prefill.hidden is None:
                part = self._embed(prefill.entering[rows], prefill.positions[rows])
            else:
                part = prefill.hidden[rows]
            work.budget -= count
            segments.append(Segment(prefill, start, count))
            parts.append(part)
            start += count
        return segments, parts

    def _run_layer(
        self,
        pool: Pool,
        layer: int,
        rows: list[Tensor],
        decoding: Decoding | None,
        segments: list[Segment],
    ) -> Tensor:
        """Decode rows, then those of segments, through one decoder layer: ``[rows, hidden]``."""
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        call = LayerCall(
            pool,
            self.backend,
            layer,
            self.shapes[layer].window,
            decoding,
            segments,
            self.streaming,
            self.ranks,
            self._last_only(layer),
            self._adapted(decoding, segments),
        )
        rope = self._rope(self.kinds[layer], decoding, segments)
        out = self.decoder.layers[layer](flat, rope, call)
        self.scales[layer] = call.scale
        return out

    def _adapted(self, decoding: Decoding | None, segments: list[Segment]) -> Adapted | None:
        """Adapters of decode rows, then of those of segments."""
        riding = None if decoding is None else decoding.adapted
        if not segments:
            return riding
        runs: list[tuple[Adapter | None, int]] = [] if riding is None else riding.runs
        if decoding is not None and riding is None:
            runs = [(None, decoding.size.rows)]
        runs += [(each.prefill.sequence.adapter, each.size) for each in segments]
        return Adapted.of(runs)

    def _rope(
        self, kind: str | None, decoding: Decoding | None, segments: list[Segment]
    ) -> Tables | None:
        """cos and sin of decode rows, then of those of segments; None without rotary positions."""
        parts = [] if decoding is None else [decoding.ropes]
        if segments:
            places, regimes = [], []
            for prefill, _, count in segments:
                rows = slice(prefill.done, prefill.done + count)
                places.append(prefill.positions[rows] - prefill.sequence.offset)
                regime = self.rotary.regime(prefill.sequence.is_long, prefill.end)
                regimes += [regime] * count
            parts.append(self.decoder.ropes(torch.cat(places), regimes))
        ropes = [part[kind] for part in parts if kind in part]
        if len(ropes) < 2:
            return ropes[0] if ropes else None
        cos, sin = (torch.cat(each) for each in zip(*ropes, strict=True))
        return cos, sin

    def _last_only(self, layer: int) -> bool:
        """Whether a layer returns outputs of last tokens only."""
        return self.decoder.is_fused and layer == self.depth - 1 and not self.every_output

    def _store(self, segments: list[Segment], out: Tensor, at: int) -> None:
        """Store a pass's outputs (from row ``at`` on) for the next layer or the head."""
        for segment in segments:
            prefill, _, count = segment
            wanted = len(segment.rows_out(self._last_only(prefill.layer)))
            rows, at = out[at : at + wanted], at + wanted
            end = prefill.done + count
            last_only = prefill.layer == self.depth - 1 and not prefill.gives_all
            if last_only:  # rows that the head does not read are not kept
                if end == prefill.length:
                    prefill.out = rows[-1:].clone()
            elif count == prefill.length:
                prefill.out = rows
            else:
                if prefill.out is None:
                    prefill.out = out.new_empty(prefill.length, out.shape[-1])
                prefill.out[prefill.done : end] = rows
            prefill.done = end

    def _finish_layer(self, pool: Pool, prefill: Prefill) -> Tensor | None:
        """Let the policy select the entries that stay and the tokens that go deeper; at the end,
        keep the head's input."""
        table, going = prefill.sequence.table, None
        assert prefill.out is not None
        table.transient_bytes = prefill.transient_bytes
        pool.note_peak(table)
        if prefill.again is None:
            going = self._keep_layer(pool, prefill)
        else:
            rereading.end_layer(pool, prefill, self.streaming, self.ranks)
        hidden, prefill.out = prefill.out, None
        prefill.hidden = hidden if going is None else hidden[going]
        prefill.queries = prefill.scores = prefill.columns = prefill.moments = None
        prefill.layer, prefill.done = prefill.layer + 1, 0
        if prefill.finished:
            prefill.hidden = None
            if prefill.again is None:
                prefill.answer = hidden if prefill.all_rows else hidden[-1:]
            prefill.read_on()
        table.transient_bytes = prefill.transient_bytes
        pool.note_overhead(table)
        if not prefill.finished:
            return None
        answer, prefill.answer = prefill.answer, None
        self._end_text(pool, prefill)
        if prefill.reader is None or answer is None:
            return answer
        for start in range(0, len(answer), READ):
            prefill.read += prefill.reader(start, self._logits(answer[start : start + READ]))
        return answer[-1:]

    def _end_text(self, pool: Pool, prefill: Prefill) -> None:
        """End a text that is through all layers: cut a text that was read again, close gaps."""
        sequence, table = prefill.sequence, prefill.sequence.table
        if prefill.is_reread:
            rereading.cut(pool, prefill, self.streaming, self.ranks, self.stages.own)
        table.transient_bytes, table.seen_len = 0, prefill.end
        pool.note_overhead(table)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)

    def _keep_layer(self, pool: Pool, prefill: Prefill) -> Tensor | None:
        """Cut a layer that the whole text has passed; returns the rows that go deeper (None:
        all)."""
        sequence, needs, layer = prefill.sequence, prefill.needs, prefill.layer
        table, policy, view = sequence.table, sequence.policy, prefill.view()
        if policy.uses_scores and prefill.columns is not None:
            pool.add_scores(table, layer, prefill.columns)
        scores, columns = joined_scores(pool, table, layer, needs, self.ranks, prefill)
        going = None
        if needs.propagate is not None and layer < self.depth - 1:
            seen = Observation(
                view,
                prefill.positions[None],
                sequence.is_protected(prefill.positions)[None],
                _newest(scores, prefill.length, table.lens(layer)),
                _newest(columns, prefill.length, table.lens(layer)),
                rule=needs.propagate,
                kernels=pool.kernels,
            )
            keep, table.state = policy.propagate(seen, table.state)
            going = None if keep.indices is None else keep.indices[0]
            assert going is None or int(going[-1]) == prefill.length - 1, "the last token must stay"
            assert going is None or not prefill.all_rows or len(going) == prefill.length, "scored"
        if needs.retain is not None:
            queries = self._queries(prefill)
            retain(
                pool, sequence, view, needs, self.streaming, self.ranks, scores, columns, queries
            )
        self._trim(pool, sequence, layer, prefill.end, slack=0)
        table.state = policy.prefilled(prefill.view())
        sequence.idle = 0
        if going is not None:
            prefill.positions = prefill.positions[going]
        return going

    def _queries(self, prefill: Prefill) -> Queries | None:
        """Statistics of the layer's queries, if the policy needs them."""
        if prefill.moments is None:
            return None
        scale = self.scales[prefill.layer]
        assert scale is not None
        own = prefill.moments.queries(scale.scale)
        return Queries(*map(self.ranks.join_queries, own))

    # --- decoding -----------------------------------------------------------------------------

    def _claim(self, pool: Pool, batch: Batch) -> Decoding:
        """Claim an entry for every token that decoding sequences feed, and fill the inputs of
        the step."""
        sequences, shape, like = batch.decode, self.ranks.own(self.shapes[0]), self._like
        fed = batch.fed or [1] * len(sequences)
        claimed = pool.append_each([each.table for each in sequences], fed)
        size = Size.of(sequences, sum(fed))
        plain = all(each.adapter is None for each in sequences)
        if self.steps_on_buffers and not batch.works and plain:
            decoding = self.graphs(pool).step(
                size, lambda size: Decoding(size, pool, shape, like, fixed=True)
            )
        else:
            decoding = Decoding(size, pool, shape, like)
        decoding.fill(sequences, *claimed, fed)
        self._feed(decoding, sequences, batch.tokens, fed)
        return decoding

    def _feed(
        self, decoding: Decoding, sequences: list[Sequence], tokens: Tensor, fed: list[int]
    ) -> None:
        """Give a step its tokens and the angles of their places."""
        regimes = [
            self.rotary.regime(each.is_long, each.table.seen_len + number + 1)
            for each, count in zip(sequences, fed, strict=True)
            for number in range(count)
        ]
        places = decoding.places[: len(tokens)]
        decoding.feed(tokens, self.decoder.ropes(places, regimes))

    @torch.inference_mode()
    def draft(self, pool: Pool, sequences: list[Sequence], tokens: Tensor) -> Tensor:
        """Feed each sequence a token ``[R]`` over the pages that its drafts read: logits ``[R,
        vocab]``.

        The tokens are counted, so that further draft tokens can follow; ``Pool.forget`` removes
        them all.
        """
        with evaluating(self._given):
            ones = [1] * len(sequences)
            claimed = pool.append_each([each.table for each in sequences], ones)
            size = Size.of(sequences, len(sequences))._replace(rings=False, scores=False)
            decoding = Decoding(size, pool, self.shapes[0], self._like)
            decoding.fill(sequences, *claimed, ones, drafts=True)
            self._feed(decoding, sequences, tokens, ones)
            for each in sequences:
                each.table.seen_len += 1
            return self._decode(pool, decoding)

    @torch.inference_mode()
    def commit(self, pool: Pool, sequence: Sequence, decoding: Decoding, row: int) -> None:
        """Count a decoded token (``row`` of its step), store its queries, let the policy evict."""
        self._count(pool, sequence, decoding, row)
        if sequence.policy.streams:
            self._move_places(pool, sequence)

    def accept(
        self, pool: Pool, sequence: Sequence, decoding: Decoding, rows: range, count: int
    ) -> None:
        """Commit the first ``count`` tokens that were fed in ``rows``, and remove the others."""
        pool.retract(sequence.table, sequence.table.kept - (len(rows) - count))
        for row in rows[:count]:
            self.commit(pool, sequence, decoding, row)

    def _move_places(self, pool: Pool, sequence: Sequence) -> None:
        """Close the gaps in a streaming request's positions, and make room for the next token."""
        self.streaming.close_gaps(pool, sequence)
        self.streaming.make_room(pool, sequence, 1)

    def _count(self, pool: Pool, sequence: Sequence, decoding: Decoding, row: int) -> None:
        table = sequence.table
        if table.ring is not None:
            assert decoding.queries is not None and decoding.lse is not None
            table.ring.push(decoding.queries[:, row], decoding.lse[:, row], table.seen_len)
        if sequence.policy.uses_scores:
            decoding.weights.add(table, row)
        table.seen_len += 1
        pool.note_peak(table)
        for layer in self.stages.own:
            if not sequence.layers.governed[layer]:
                self._trim(pool, sequence, layer, table.seen_len, slack=pool.page_size)
        if sequence.policy.evicts:
            if sequence.idle:
                sequence.idle -= 1
            else:
                with self.span("evict"):
                    self._evict(pool, sequence)

    def _evict(self, pool: Pool, sequence: Sequence, at_once: bool = False) -> None:
        evict(pool, sequence, self.backend, self.scales, self.streaming, self.ranks, at_once)

    @torch.inference_mode()
    def evict_now(self, pool: Pool, sequence: Sequence) -> None:
        """Between two steps, evict down to budgets that were lowered."""
        held = -1
        while held != int(sequence.table.kept.sum()):
            held = int(sequence.table.kept.sum())
            self._evict(pool, sequence, True)
        self.stages.sync_lengths(sequence.table.kept)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)

    # --- shared -------------------------------------------------------------------------------

    def _trim(self, pool: Pool, sequence: Sequence, layer: int, position: int, slack: int) -> None:
        """Drop entries that a sliding layer cannot see from ``position`` on (if they are more than
        ``slack``)."""
        window, kept = self.shapes[layer].window, int(sequence.table.longest[layer])
        if window is None or sequence.layers.governed[layer] or kept < window + slack:
            return
        visible = pool.positions(sequence.table, layer) > position - window
        indices = visible.nonzero(as_tuple=True)[1].view(visible.shape[0], -1)
        pool.keep(sequence.table, layer, Keep(indices))

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head: ``[n, hidden]`` → ``[n, vocab]``."""
        return self.ranks.columns(self.decoder.logits(hidden), self.vocab_size)

    def _shape(self, layer: nn.Module) -> AttentionShape:
        attention: Any = getattr(layer, self.family.attention)
        heads = self.config.num_attention_heads
        size = getattr(attention, "head_dim", None) or self.config.hidden_size // heads
        kv_heads = heads
        if self.family.grouped:
            kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        window = self.family.window(self.config, attention)
        return AttentionShape(heads, kv_heads, size, size, window)


def _newest(tensor: Tensor | None, count: int, lens: tuple[int, ...]) -> Tensor | None:
    """Columns of each head's newest ``count`` entries, of a tensor ``[1 or kv_heads, longest]``."""
    if tensor is None or len(set(lens)) == 1:
        return None if tensor is None else tensor[:, -count:]
    ends = torch.tensor(lens, device=tensor.device)[:, None]
    return tensor.gather(1, ends - count + torch.arange(count, device=tensor.device))
