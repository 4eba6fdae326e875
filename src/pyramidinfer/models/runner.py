"""The layer loop: Hugging Face decoder layers, with tokens dropped between them.

One step packs the newest token of every running request and the chunks of prompts in progress
into one flat row ``[rows, hidden]`` per layer.  Policies, cache and attention meet here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyramidinfer.cache import Pool, Staging, Table
from pyramidinfer.models import rereading
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.batch import Batch, Prefill, Sequence, Work
from pyramidinfer.models.chunks import store_chunks, take_chunks
from pyramidinfer.models.decode import Decoding, Size, Stepped, Way
from pyramidinfer.models.decoder import Decoder
from pyramidinfer.models.device import Device, choose_device
from pyramidinfer.models.evicting import evict
from pyramidinfer.models.families import find_family
from pyramidinfer.models.fingerprint import measure
from pyramidinfer.models.fused import fuse, why_not
from pyramidinfer.models.graphs import DecodeGraphs
from pyramidinfer.models.loading import end_ids
from pyramidinfer.models.lora_modules import read_adapters
from pyramidinfer.models.ranks import ALONE, Ranks
from pyramidinfer.models.rotary import Rotary, count_positions
from pyramidinfer.models.routing import LayerCall, Segment, evaluating
from pyramidinfer.models.selecting import cut_layer, joined_positions, trim
from pyramidinfer.models.stack import Stack
from pyramidinfer.models.stages import Stages
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.models.weights import round_weights
from pyramidinfer.types import AttentionShape

__all__ = ["ModelRunner", "Stepped"]


def _no_span(name: str) -> AbstractContextManager[None]:
    return nullcontext()


READ = 64  # rows of a prompt's logits that are held at a time


class ModelRunner(Stack):
    """A transformers causal language model, driven layer by layer.

    backend : name that selects the implementations for the model's device (``Device``).
    ``ValueError`` for an unsupported family or layer feature.  The model object stays usable and
    in its mode (it runs without dropout even in training mode), unless the engine owns it
    (``own``): then packed weights are freed.  ``ranks``: the ranks that share the layers, if the
    model is one rank's part (``models/sharding.py``); ``shapes`` are of all ranks together.
    ``weights``: how weights of linears are stored (``EngineConfig.weights``). ``stages``: the
    layers of each stage, if there are several (``models/pipeline.py``).
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
        self.span, self.scales = _no_span, [None] * depth
        attentions: list[Any] = [getattr(layer, self.family.attention) for layer in originals]
        self.streaming = Streaming(
            self.rotary,
            plain.kinds,
            [getattr(each, "use_rope", True) for each in attentions],
            self.max_positions,
            self.stages.own,
        )

    def load_adapters(self, modules: Mapping[str, str]) -> dict[str, Adapter]:
        """Load adapters from their folders or hub ids; returns them by name, ready for requests.

        ``ValueError`` for an adapter that cannot be served with this model, which is whole.
        """
        return self.take_adapters(read_adapters(modules, self.body, self.config, self._like))

    def take_adapters(self, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
        """Prepare adapters that have been read and cut to this rank's part."""
        for each in adapters.values():
            self.decoder.take_adapter(each)
        return adapters

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
    def steps_on_buffers(self) -> bool:
        """Whether steps that only decode run on fixed buffers (CUDA graphs, on a GPU)."""
        alone = self.ranks.size == self.stages.size == 1
        return self.decoder.is_fused and self.chosen.replays and alone

    def positions(self, pool: Pool, table: Table, layer: int) -> Tensor:
        """Original positions of a layer's entries in all heads, ``[kv_heads, longest]``, negative
        past the end of a shorter head."""
        return joined_positions(pool, table, layer, self.ranks)

    def graphs(self, pool: Pool) -> DecodeGraphs:
        """Decode steps over this pool, kept as long as the pool."""
        if pool not in self._graphs:
            self._graphs[pool] = DecodeGraphs(pool)
        return self._graphs[pool]

    @torch.inference_mode()
    def forward(self, pool: Pool, batch: Batch) -> Stepped:
        """Run one step.  Decoding sequences must be committed with ``commit`` afterwards."""
        tables = [each.table for each in batch.decode]
        with evaluating(self._given), Staging(pool, tables) as staging:
            return self._forward(pool, batch, staging)

    def _forward(self, pool: Pool, batch: Batch, staging: Staging) -> Stepped:
        decoding = self._claim(pool, batch, staging) if batch.decode else None
        if decoding is not None and decoding.way == "replayed":
            logits = self.graphs(pool).run(decoding, lambda: self._decode(pool, decoding))
            return Stepped(logits[: len(batch.decode)], decoding)
        last: dict[int, Tensor] = {}
        through = self.run(pool, decoding, batch.works, last)
        while any(work.budget > 0 and work.prefill.again is not None for work in batch.works):
            self.run(pool, None, batch.works, last)  # texts whose second pass starts
        return Stepped(self._answers(through, last), decoding)

    def way(self, batch: Batch) -> Way:
        """How a step runs: layer by layer if it has prompts or caches in host memory; else replayed
        if the device supports it and no row has an adapter; else as the decoder does."""
        if batch.works or any(each.table.away is not None for each in batch.decode):
            return "layers"
        plain = all(each.adapter is None for each in batch.decode)
        return "replayed" if self.steps_on_buffers and plain else self.decoder.way

    def _decode(self, pool: Pool, decoding: Decoding) -> Tensor:
        """Logits ``[R, vocab]`` of a decode-only step.  Nothing here waits for the device or
        depends on the contents of its buffers."""
        return self._logits(self.run(pool, decoding))

    def run(
        self,
        pool: Pool,
        decoding: Decoding | None,
        works: Items[Work] = (),
        last: dict[int, Tensor] | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers once, for tokens that sequences feed and for prefill works from
        their current layer.

        entering : ``[R, hidden]`` of the tokens, if they come from another stage.  Returns their
        outputs ``[R, hidden]``; ``last`` receives the outputs of works that finish.
        """
        hidden = self._like.new_empty(0, self.hidden_size) if entering is None else entering
        if decoding is not None:
            if entering is None:
                hidden = self.decoder.embed(decoding.tokens, decoding.plan.positions)
            if decoding.way == "whole":
                return self.decoder.step(pool, decoding, hidden)
        for layer in self.stages.own:
            riding = decoding
            while True:
                start = 0 if riding is None else len(hidden)
                segments, parts = take_chunks(
                    works, layer, start, self.prefill_chunk, self.decoder, self.ranks
                )
                if riding is None and not segments:
                    break
                rows = parts if riding is None else [hidden, *parts]
                if riding is not None and riding.staging is not None:
                    riding.staging.load(layer)
                out = self._run_layer(pool, layer, rows, riding, segments)
                if riding is not None:
                    hidden, riding = out[:start], None
                is_last = layer == self.depth - 1
                store_chunks(segments, out, start, is_last, self._last_only(layer))
            for index, work in enumerate(works):
                if work.prefill.layer == layer and work.prefill.left == 0:
                    with self.span("retain"):
                        tail = self._finish_layer(pool, work.prefill)
                    if tail is not None and last is not None:
                        last[index] = tail
        return hidden

    def _answers(self, through: Tensor, last: dict[int, Tensor]) -> Tensor:
        """Logits of decode rows, then of works that have finished."""
        rows = [each for each in (through, *(last[index] for index in sorted(last))) if len(each)]
        if not rows:
            return self._like.new_empty(0, self.vocab_size)
        return self._logits(torch.cat(rows))

    # --- one layer ----------------------------------------------------------------------------

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
        call = LayerCall(self, pool, layer, decoding, segments, self._last_only(layer))
        out = self.decoder.run(flat, call)
        self.scales[layer] = call.scale
        return out

    def _last_only(self, layer: int) -> bool:
        """Whether a layer returns outputs of last tokens only."""
        last = self.decoder.is_fused and layer == self.depth - 1
        return last and not self.chosen.every_row

    def _finish_layer(self, pool: Pool, prefill: Prefill) -> Tensor | None:
        """Let the policy select the entries that stay and the tokens that go deeper; at the end,
        keep the head's input."""
        table, going = prefill.sequence.table, None
        assert prefill.out is not None
        table.transient_bytes = prefill.transient_bytes
        pool.note_peak(table)
        if prefill.again is None:
            going = cut_layer(self, pool, prefill)
        else:
            rereading.end_layer(self, pool, prefill)
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
            rereading.cut(self, pool, prefill)
        table.transient_bytes, table.seen_len = 0, prefill.end
        pool.note_overhead(table)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)

    # --- decoding -----------------------------------------------------------------------------

    def _claim(self, pool: Pool, batch: Batch, staging: Staging | None = None) -> Decoding:
        """Claim an entry for every token that decoding sequences feed, and fill the inputs of
        the step."""
        sequences, shape, like = batch.decode, self.ranks.own(self.shapes[0]), self._like
        fed = batch.fed or [1] * len(sequences)
        claimed = pool.append_each([each.table for each in sequences], fed)
        size = Size.of(sequences, sum(fed))
        way = self.way(batch)
        if staging:
            width = staging.width(each.table for each in sequences)
            size = size._replace(pages=max(size.pages, width))
        if way == "replayed":
            decoding = self.graphs(pool).step(
                size, lambda size: Decoding(size, pool, shape, like, way)
            )
        else:
            decoding = Decoding(size, pool, shape, like, way)
            decoding.staging = staging
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
            decoding = Decoding(size, pool, self.shapes[0], self._like, self.decoder.way)
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
                trim(self, pool, sequence, layer, table.seen_len, slack=pool.page_size)
        if sequence.policy.evicts:
            if sequence.idle:
                sequence.idle -= 1
            else:
                with self.span("evict"):
                    evict(self, pool, sequence)

    @torch.inference_mode()
    def evict_now(self, pool: Pool, sequence: Sequence) -> None:
        """Between two steps, evict down to budgets that were lowered."""
        held = -1
        while held != int(sequence.table.kept.sum()):
            held = int(sequence.table.kept.sum())
            evict(self, pool, sequence, at_once=True)
        self.stages.sync_lengths(sequence.table.kept)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)

    # --- shared -------------------------------------------------------------------------------

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
