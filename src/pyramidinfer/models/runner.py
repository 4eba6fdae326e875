"""The layer loop: Hugging Face decoder layers, with tokens dropped between them.

One step packs the newest token of every running request and the chunks of prompts in progress
into one flat row ``[1, rows, hidden]`` per layer.  Policies, cache and attention meet here.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.cache import GroupSpec, Pool
from pyramidinfer.models import rereading
from pyramidinfer.models.batch import Batch, Prefill, Sequence, Work
from pyramidinfer.models.evicting import evict, observe
from pyramidinfer.models.families import find_family
from pyramidinfer.models.fused import Fused, Ropes, fuse
from pyramidinfer.models.graphs import DecodeGraphs, Frame, Size
from pyramidinfer.models.loading import end_ids
from pyramidinfer.models.rotary import Rotary, count_positions
from pyramidinfer.models.routing import Decoding, LayerCall, Segment, evaluating, route
from pyramidinfer.models.streaming import Streaming
from pyramidinfer.types import AttentionShape, Keep, Layers, Observation, Queries

__all__ = ["ModelRunner", "Stepped"]

READ = 64  # logits of a prompt that are held at a time


class Stepped(NamedTuple):
    """Logits ``[decode + finished works, vocab]`` in the batch's order, and the decode rows."""

    logits: Tensor
    decoding: Decoding | None


class ModelRunner:
    """A transformers causal language model, driven layer by layer.

    ``ValueError`` for an unsupported family or layer feature.  The model object stays usable and
    in its mode (it runs without dropout even in training mode), unless it is given away (``own``):
    then weights that are packed are freed.
    """

    def __init__(
        self, model: Any, backend: Backend, prefill_chunk: int = 1024, *, own: bool = False
    ) -> None:
        self.config: Any = model.config
        self.family = find_family(self.config)
        self.backend, self.prefill_chunk = backend, prefill_chunk
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
        self.layers = [route(layer, self.family.attention) for layer in originals]
        self.shapes = [self._shape(layer) for layer in originals]
        self.rotary = Rotary(self.family, self.body, self.config)
        self.kinds = list(self.config.layer_types) if self.family.rotary_by_type else [None] * depth
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.max_positions = count_positions(self.family, self.config)
        self.fused: Fused | None = None
        if self.family.plain:
            self.fused = fuse(
                self.body,
                self.head,
                self.config,
                self.shapes,
                self.rotary,
                backend,
                self.dtype,
                self.device,
                own=own,
            )
        self._graphs: WeakKeyDictionary[Pool, DecodeGraphs] = WeakKeyDictionary()
        self.end_ids = end_ids(model)
        self.every_output = False  # the last layer's too, though the head reads last tokens alone
        self.scales: list[Scale | None] = [None] * depth  # known once a layer has run
        attentions: list[Any] = [getattr(layer, self.family.attention) for layer in originals]
        self.streaming = Streaming(
            self.rotary,
            self.kinds,
            [getattr(each, "use_rope", True) for each in attentions],
            self.max_positions,
        )

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def kv_heads(self) -> int:
        """KV heads of every layer."""
        return self.shapes[0].kv_heads

    @property
    def steps_on_buffers(self) -> bool:
        """Whether steps that only decode run on fixed buffers (CUDA graphs, on a GPU)."""
        return self.fused is not None and self.backend.name == "triton"

    def graphs(self, pool: Pool) -> DecodeGraphs:
        """Decode steps over this pool, kept for as long as it."""
        if pool not in self._graphs:
            self._graphs[pool] = DecodeGraphs(self.device, self.rotary.rotated)
        return self._graphs[pool]

    def group_specs(self) -> list[GroupSpec]:
        """Layers grouped by the size of their entries."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in enumerate(self.shapes):
            key = (shape.kv_heads, shape.key_dim, shape.value_dim)
            groups.setdefault(key, []).append(layer)
        return [GroupSpec(tuple(layers), *key, self.dtype) for key, layers in groups.items()]

    def layers_for(self, longest: int) -> Layers:
        """The depth as a request of at most ``longest`` tokens has it: a window it cannot
        outgrow is no window."""
        windows = (shape.window for shape in self.shapes)
        governed = tuple(window is None or window >= longest for window in windows)
        return Layers(governed, self.kv_heads)

    @torch.inference_mode()
    def forward(self, pool: Pool, batch: Batch) -> Stepped:
        """Run one step.  Decoding sequences are to be committed with ``commit`` afterwards."""
        with evaluating(self._given):
            return self._forward(pool, batch)

    def _forward(self, pool: Pool, batch: Batch) -> Stepped:
        if batch.decode and not batch.works and self.steps_on_buffers:
            return Stepped(
                *self.graphs(pool).step(pool, batch, self._frame_angles, self._run_frame)
            )
        decoding = self._start_decode(pool, batch)
        hidden, tables = None, None
        if decoding:
            positions = decoding.plan.positions
            hidden = self.family.embed(self.body, self.config, batch.tokens[None], positions[None])
            offsets = torch.tensor([each.offset for each in batch.decode]).to(self.device)
            tables = self._angles(hidden, positions - offsets, self.regimes(batch.decode))
            if not batch.works and self.fused is not None and self.fused.steps_whole:
                out = self.fused.step(pool, decoding, hidden[0], tables[None])
                return Stepped(self._logits(out), decoding)
        last: dict[int, Tensor] = {}
        through = self._all_layers(pool, batch.works, last, hidden, tables, decoding)
        while any(work.budget > 0 and work.prefill.again is not None for work in batch.works):
            self._all_layers(pool, batch.works, last)  # texts that begin to be read again
        rows = [] if through is None else [through[0]]
        rows += [last[index] for index in sorted(last)]
        if not rows:
            nothing = torch.empty(0, self.vocab_size, dtype=self.dtype, device=self.device)
            return Stepped(nothing, decoding)
        return Stepped(self._logits(torch.cat(rows)), decoding)

    def _all_layers(
        self,
        pool: Pool,
        works: list[Work],
        last: dict[int, Tensor],
        hidden: Tensor | None = None,
        tables: dict[str | None, Ropes] | None = None,
        decoding: Decoding | None = None,
    ) -> Tensor | None:
        """All layers once, for decode rows ``hidden`` and for works from where each stands.

        Gives what becomes of the rows; ``last`` takes outputs of the works that come to their end.
        """
        for layer in range(self.depth):
            riding = hidden
            while True:
                start = 0 if riding is None else riding.shape[1]
                segments, parts = self._take(works, layer, start)
                if riding is None and not segments:
                    break
                rope = tables.get(self.kinds[layer]) if tables and riding is not None else None
                out = self._run_layer(pool, layer, riding, rope, decoding, segments, parts)
                if riding is not None:
                    hidden, riding = out[:, :start], None
                self._store(segments, out[0], start)
            for index, work in enumerate(works):
                if work.prefill.layer == layer and work.prefill.left == 0:
                    tail = self._finish_layer(pool, work.prefill)
                    if tail is not None:
                        last[index] = tail
        return hidden

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
                prefill.computed.append(prefill.length)
            rows = slice(prefill.done, prefill.done + count)
            if prefill.hidden is None:
                ids, positions = prefill.entering[rows], prefill.positions[rows]
                part = self.family.embed(self.body, self.config, ids[None], positions[None])[0]
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
        riding: Tensor | None,
        rope: Any,
        decoding: Decoding | None,
        segments: list[Segment],
        parts: list[Tensor],
    ) -> Tensor:
        """The flat row through one decoder layer, ``[1, rows, hidden]``."""
        row = [riding[0]] if riding is not None else []
        flat = torch.cat([*row, *parts]) if len(row) + len(parts) > 1 else [*row, *parts][0]
        extra: dict[str, Any] = {}
        if self.rotary.module is not None:
            if segments:
                rope = self._rope(flat, rope, segments, self.kinds[layer])
            extra["position_embeddings"] = rope
        active = decoding if riding is not None else None
        window = self.shapes[layer].window
        call = LayerCall(
            pool,
            self.backend,
            layer,
            window,
            active,
            segments,
            self.streaming,
            self._last_only(layer),
        )
        if self.fused is not None:
            fused = self.fused.layers[layer]
            self.scales[layer] = fused.scale
            return fused(flat, rope, call)[None]
        out: Tensor = self.layers[layer](flat[None], attention_mask=None, layer_call=call, **extra)
        if call.scale is None:
            raise ValueError(f"layer {layer} did not call the attention function it was given")
        self.scales[layer] = call.scale
        return out

    def _rope(self, like: Tensor, rope: Any, segments: list[Segment], kind: str | None) -> Any:
        """cos and sin of the decode rows (``rope``) followed by those of the segments."""
        positions = torch.cat(
            [
                prefill.positions[prefill.done : prefill.done + count] - prefill.sequence.offset
                for prefill, _, count in segments
            ]
        )
        regimes = torch.cat(
            [
                torch.full((count,), self.rotary.regime(prefill.sequence.is_long, prefill.end))
                for prefill, _, count in segments
            ]
        ).to(self.device)
        cos, sin = self._angles(like, positions, regimes)[kind]
        if rope is None:
            return cos, sin
        return torch.cat([rope[0], cos], dim=-2), torch.cat([rope[1], sin], dim=-2)

    def regimes(self, decode: list[Sequence]) -> Tensor:
        """Rotary regimes ``[R]`` of the tokens that decoding sequences feed."""
        regimes = [self.rotary.regime(each.is_long, each.table.seen_len + 1) for each in decode]
        return torch.tensor(regimes).to(self.device)

    def _angles(self, like: Tensor, positions: Tensor, regimes: Tensor) -> dict[str | None, Ropes]:
        """cos and sin per layer type, as the layers take them (``[n, dim]`` where fused)."""
        if self.fused is not None:
            return {None: self.rotary.angles(like, positions, regimes)}
        return self.rotary.tables(like, positions, regimes)

    def _last_only(self, layer: int) -> bool:
        """Whether a layer gives outputs of last tokens only."""
        return self.fused is not None and layer == self.depth - 1 and not self.every_output

    def _store(self, segments: list[Segment], out: Tensor, at: int) -> None:
        """Put a pass's outputs (from row ``at`` on) where the next layer or the head reads them."""
        for segment in segments:
            prefill, _, count = segment
            wanted = len(segment.rows_out(self._last_only(prefill.layer)))
            rows, at = out[at : at + wanted], at + wanted
            end = prefill.done + count
            last_only = prefill.layer == self.depth - 1 and not prefill.gives_all
            if last_only:  # what the head will not read is not kept
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
        """Ask the policy what stays and what goes deeper; what the head reads at the end."""
        sequence, table, going = prefill.sequence, prefill.sequence.table, None
        assert prefill.out is not None
        table.transient_bytes = prefill.transient_bytes
        pool.note_peak(table)
        if prefill.again is None:
            going = self._keep_layer(pool, prefill)
        else:
            rereading.end_layer(pool, prefill, self.streaming)
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
        if prefill.is_reread:
            rereading.cut(pool, prefill, self.streaming)
        answer, prefill.answer = prefill.answer, None
        table.transient_bytes, table.seen_len = 0, prefill.end
        pool.note_overhead(table)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)
        if prefill.reader is None or answer is None:
            return answer
        for start in range(0, len(answer), READ):
            prefill.reader(self._logits(answer[start : start + READ]))
        return answer[-1:]

    def _keep_layer(self, pool: Pool, prefill: Prefill) -> Tensor | None:
        """What stays of a layer that the whole text is through; rows that go deeper (None: all)."""
        sequence, needs, layer = prefill.sequence, prefill.needs, prefill.layer
        table, policy, view = sequence.table, sequence.policy, prefill.view()
        if needs.slot_scores and prefill.columns is not None:
            pool.add_scores(table, layer, prefill.columns)
        going = None
        if needs.propagate and layer < self.depth - 1:
            seen = Observation(
                view,
                prefill.positions[None],
                sequence.is_protected(prefill.positions)[None],
                _newest(prefill.scores, prefill.length, table.lens(layer)),
                _newest(prefill.columns, prefill.length, table.lens(layer)),
                kernels=pool.kernels,
            )
            keep, table.state = policy.propagate(seen, table.state)
            going = None if keep.indices is None else keep.indices[0]
            assert going is None or int(going[-1]) == prefill.length - 1, "the last token must stay"
            assert going is None or not prefill.all_rows or len(going) == prefill.length, "scored"
        if needs.retain:
            keep, table.state = policy.retain(
                observe(
                    pool,
                    sequence,
                    view,
                    needs,
                    self.streaming,
                    prefill.scores,
                    prefill.columns,
                    self._queries(prefill),
                ),
                table.state,
            )
            pool.keep(table, layer, keep)
        self._trim(pool, sequence, layer, prefill.end, slack=0)
        table.state = policy.prefilled(prefill.view())
        sequence.idle = 0
        if going is not None:
            prefill.positions = prefill.positions[going]
        return going

    def _queries(self, prefill: Prefill) -> Queries | None:
        """What the layer's queries are like, where the policy asked."""
        if prefill.moments is None:
            return None
        scale = self.scales[prefill.layer]
        assert scale is not None
        return prefill.moments.queries(scale.scale)

    # --- decoding -----------------------------------------------------------------------------

    def _start_decode(self, pool: Pool, batch: Batch) -> Decoding | None:
        if not batch.decode:
            return None
        tables = [each.table for each in batch.decode]
        pages, offsets = pool.append_each(tables)
        lengths = np.stack([table.kept for table in tables], axis=1)  # [layers, R, kv_heads]
        positions = torch.tensor([table.seen_len for table in tables], device=self.device)
        plan = self.backend.plan(
            torch.from_numpy(pool.block_tables(tables)).to(self.device),
            torch.from_numpy(lengths).to(self.device),
            lengths.max((1, 2)).tolist(),
            positions,
        )
        rings = any(table.ring is not None for table in tables)
        scores = any(each.policy.uses_scores for each in batch.decode)
        return Decoding(plan, pages, offsets, rings, scores)

    def _frame_angles(self, places: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """cos and sin of sequences that feed tokens at these rotary positions."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        regimes = like if self.rotary.is_fixed else self.regimes(sequences)
        return self.rotary.angles(like, places, regimes)

    def _run_frame(self, pool: Pool, frame: Frame, size: Size) -> tuple[Tensor, Decoding]:
        """A decode step on a frame's buffers.  Nothing in here waits for the device or depends on
        what the buffers hold."""
        fused = self.fused
        assert fused is not None
        hidden = self.family.embed(
            self.body, self.config, frame.tokens[None], frame.positions[None]
        )[0]
        newest = (frame.lengths - 1).clamp(min=0).long()  # spare rows: the scratch page's first
        pages = frame.tables.gather(3, (newest // pool.page_size)[..., None])[..., 0].long()
        longest = [size.pages * pool.page_size] * self.depth
        plan = self.backend.plan(frame.tables, frame.lengths, longest, frame.positions)
        decoding = Decoding(plan, pages, newest % pool.page_size, size.rings, size.scores)
        for index, layer in enumerate(fused.layers):
            window = layer.shape.window
            call = LayerCall(pool, self.backend, index, window, decoding, [], self.streaming)
            hidden = layer(hidden, (frame.cos, frame.sin), call)
        if size.rings:
            decoding.observe_all(torch.stack(decoding.queries), torch.stack(decoding.lse))
            decoding.queries, decoding.lse = [], []
        return fused.logits(hidden), decoding

    @torch.inference_mode()
    def commit(self, pool: Pool, sequence: Sequence, decoding: Decoding, row: int) -> None:
        """Count a decoded token (``row`` of its step), remember its queries, let the policy
        evict."""
        table = sequence.table
        if table.ring is not None:
            queries, lse = decoding.observed
            table.ring.push(queries[:, row], lse[:, row], table.seen_len)
        if sequence.policy.uses_scores:
            for layer, probs in enumerate(decoding.probs):
                pool.add_scores(table, layer, probs[row, :, : int(table.longest[layer])])
        table.seen_len += 1
        pool.note_peak(table)
        for layer, governed in enumerate(sequence.layers.governed):
            if not governed:
                self._trim(pool, sequence, layer, table.seen_len, slack=pool.page_size)
        if sequence.policy.evicts:
            if sequence.idle:
                sequence.idle -= 1
            else:
                self._evict(pool, sequence)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)
            self.streaming.make_room(pool, sequence, 1)

    def _evict(self, pool: Pool, sequence: Sequence) -> None:
        evict(pool, sequence, self.backend, self.scales, self.streaming)

    @torch.inference_mode()
    def evict_now(self, pool: Pool, sequence: Sequence) -> None:
        """Between two steps, bring a decoding request down to budgets that were lowered."""
        held = -1
        while held != int(sequence.table.kept.sum()):
            held = int(sequence.table.kept.sum())
            self._evict(pool, sequence)
        if sequence.policy.streams:
            self.streaming.close_gaps(pool, sequence)

    # --- shared -------------------------------------------------------------------------------

    def _trim(self, pool: Pool, sequence: Sequence, layer: int, position: int, slack: int) -> None:
        """Drop what a sliding layer can no longer see from ``position`` on (once it is over
        ``slack`` entries)."""
        window, kept = self.shapes[layer].window, int(sequence.table.longest[layer])
        if window is None or sequence.layers.governed[layer] or kept < window + slack:
            return
        visible = pool.positions(sequence.table, layer) > position - window
        indices = visible.nonzero(as_tuple=True)[1].view(visible.shape[0], -1)
        pool.keep(sequence.table, layer, Keep(indices))

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden]`` → ``[n, vocab]``."""
        if self.fused is not None:
            return self.fused.logits(hidden)
        return self.family.logits(
            self.config, self.head(self.family.finish(self.body, self.config, hidden))
        )

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
