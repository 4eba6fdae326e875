"""Attention in Triton: split-KV decoding over pages, window scores, column sums, prefill.

``run`` neither waits for the device nor reads data from it: grids follow from shapes (the width of
the page tables) and a fixed number of splits, so a CUDA graph may capture it.  A replay reads the
current contents of the plan's tensors: page lists padded with any page to the same width, and
length 0 for unused rows (their output is 0, their log-sum-exp is -inf); ``longest`` is at least as
large as all lengths of later replays.

Weights are computed in float32; float64 models use the reference backend.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.attention import triton_kernels as kernels
from pyramidinfer.attention.base import Attended, DecodePlan, Pages, Scale, Scored
from pyramidinfer.attention.reference import ReferenceBackend
from pyramidinfer.attention.torch_flash import attend_causal
from pyramidinfer.types import Reduce

__all__ = ["TritonBackend"]

#: Numbers in one operand of a product, for 16-bit and float32 models (a float32 product is made of
#: three): they fit in registers, and 99 KiB of shared memory have room for prefetched loads.
TILE, WIDE_TILE = 4096, 2048


class TritonBackend:
    """See :class:`pyramidinfer.attention.base.Backend` for shapes.

    ``splits``: number of programs that share one request's entries (per KV head) in decode, and the
    queries or entries of a window in scoring; fewer if there is less than a block for each.
    """

    name = "triton"
    prefill_scored: Any = None

    def __init__(self, splits: int = 16) -> None:
        if splits < 1:
            raise ValueError(f"splits={splits} must be at least 1")
        if not (kernels.INTERPRETED or torch.cuda.is_available()):
            raise ValueError(
                "attention backend 'triton' needs a GPU that torch can use, and found none (to "
                "try it on the CPU, slowly, set TRITON_INTERPRET=1 before Triton is imported)"
            )
        self.splits = splits
        self.reference = ReferenceBackend()

    def run(
        self,
        plan: DecodePlan,
        layer: int,
        queries: Tensor,
        pages: Pages,
        scale: Scale,
        *,
        probs: bool = False,
    ) -> Attended:
        if queries.dtype == torch.float64:
            return self.reference.run(plan, layer, queries, pages, scale, probs=probs)
        queries = queries.contiguous()
        sizes = _sizes(queries, plan.tables.shape[2], pages.value_dim)
        held = _Held.of(pages, sizes)
        requests, page_size = len(queries), pages.keys.shape[1]
        block = sizes.fit(max(sizes.key_pad, sizes.value_pad))
        width = plan.tables.shape[-1] * page_size  # entries per row of the page table
        splits = max(1, min(self.splits, -(-width // block)))
        outs = _floats(queries, requests, sizes.heads, splits, sizes.value_dim)
        norms = _floats(queries, requests, sizes.heads, splits)
        logits = _floats(queries, requests, sizes.heads, width) if probs else norms
        tables, lengths = plan.tables[layer], plan.lengths[layer]
        assert tables[0].is_contiguous() and lengths.is_contiguous(), (
            "rows of a plan are contiguous"
        )
        with _device(queries):
            kernels.decode_split[requests, sizes.kv_heads, splits](
                queries,
                *held.tensors,
                tables,
                lengths,
                plan.positions,
                outs,
                norms,
                logits,
                *_numbers(scale),
                tables.stride(1),
                width,
                **sizes.heads_only,
                group_pad=_pad(sizes.group, 16),
                **sizes.keys,
                **sizes.values,
                key_group=held.key_group,
                value_group=held.value_group,
                codec=held.codec,
                page_size=page_size,
                block=block,
                splits=splits,
                stores_logits=probs,
                **_kind(queries, scale),
            )
            out = queries.new_empty(requests, sizes.heads, sizes.value_dim)
            lse = _floats(queries, requests, sizes.heads)
            kernels.combine_splits[(requests * sizes.heads,)](
                outs,
                norms,
                out,
                lse,
                **sizes.values,
                value_group=held.value_group,
                codec=held.codec,
                splits=splits,
                split_pad=_pad(splits, 16 if held.codec else 1),
                precision=_precision(torch.float32),
            )
        if not probs:
            return Attended(out, lse)
        shares = self._shares(logits, lse, lengths, sizes)
        return Attended(out, lse, shares[:, :, : plan.longest[layer]])

    def prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        if queries.dtype == torch.float64:
            return self.reference.prefill(queries, keys, values, q_pos, k_pos, scale)
        if scale.softcap is None and scale.window is None:
            return attend_causal(queries, keys, values, scale.scale)
        rows = _Rows.of(queries, keys, q_pos, k_pos)
        values = _dense(values)
        sizes = _sizes(queries, len(keys), values.shape[-1])
        out = queries.new_empty(len(queries), sizes.heads, sizes.value_dim)
        block = sizes.fit(max(sizes.key_pad, sizes.value_pad))
        height = min(block, _pad(len(queries) * sizes.group, 16))
        grid = (-(-len(queries) * sizes.group // height), sizes.kv_heads)
        with _device(queries):
            kernels.attend_rows[grid](
                rows.queries,
                rows.keys,
                values,
                rows.q_pos,
                rows.k_pos,
                out,
                *_numbers(scale),
                rows.new,
                rows.entries,
                *rows.keys.stride()[:2],
                *values.stride()[:2],
                rows.k_pos.stride(0),
                **sizes.heads_only,
                **sizes.keys,
                **sizes.values,
                rows=height,
                block=block,
                **_kind(queries, scale),
            )
        return out

    def window_scores(
        self,
        queries: Tensor,
        keys: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
        reduce: Reduce,
        *,
        rows: int,
        lse: Tensor | None = None,
    ) -> Scored:
        grouped = reduce.heads.startswith("kv")
        uneven = reduce.rows == "below" and not grouped and len(keys) > 1  # heads see apart
        if queries.dtype == torch.float64 or uneven:
            return self.reference.window_scores(
                queries, keys, q_pos, k_pos, scale, reduce, rows=rows, lse=lse
            )
        window = _Rows.of(queries, keys, q_pos, k_pos)
        lse = self._norms(window, scale) if lse is None else lse.float().contiguous()
        ramp = torch.linspace(1.0, reduce.newest_weight, rows, device=queries.device)
        over_heads = "max" if reduce.heads.endswith("max") else "mean"
        over_rows = reduce.rows if reduce.rows in ("max", "below") else "sum"
        found = self._reduce(
            window,
            lse,
            ramp[rows - window.new :],
            scale,
            1 if grouped else len(keys),
            over_heads,
            over_rows,
        )
        scores = found.amax(0) if over_rows == "max" else found.sum(0)
        return Scored(scores / rows if reduce.rows == "mean" else scores, lse)

    def column_sums(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        if queries.dtype == torch.float64:
            return self.reference.column_sums(queries, keys, q_pos, k_pos, scale)
        all_rows = _Rows.of(queries, keys, q_pos, k_pos, ordered=True)
        lse = self._norms(all_rows, scale)
        even = torch.ones(all_rows.new, device=queries.device)
        return self._reduce(all_rows, lse, even, scale, 1, "sum", "sum").sum(0)

    # --- inside -------------------------------------------------------------------------------

    def _shares(self, logits: Tensor, lse: Tensor, lengths: Tensor, sizes: _Sizes) -> Tensor:
        """Logits ``[R, H, width]`` → attention weights summed over each group, ``[R, K,
        width]``."""
        requests, _, width = logits.shape
        probs = _floats(logits, requests, sizes.kv_heads, width)
        block = max(16, 2048 // sizes.group_pad)
        with _device(logits):
            kernels.group_probs[requests, sizes.kv_heads, -(-width // block)](
                logits, lse, lengths, probs, width, **sizes.grouped, block=block
            )
        return probs

    def _norms(self, rows: _Rows, scale: Scale) -> Tensor:
        """Log-sum-exps ``[n, H]`` of the queries over all entries that they see."""
        sizes = _sizes(rows.queries, len(rows.keys), 1)
        block = sizes.fit(sizes.key_pad)
        height = min(block, _pad(rows.new * sizes.group, 16))
        splits = max(1, min(self.splits, -(-rows.entries // block)))
        norms = _floats(rows.queries, splits, rows.new, sizes.heads)
        grid = (-(-rows.new * sizes.group // height), sizes.kv_heads, splits)
        with _device(rows.queries):
            kernels.row_norms[grid](
                rows.queries,
                rows.keys,
                rows.q_pos,
                rows.k_pos,
                norms,
                *_numbers(scale),
                rows.new,
                rows.entries,
                *rows.keys.stride()[:2],
                rows.k_pos.stride(0),
                **sizes.heads_only,
                **sizes.keys,
                rows=height,
                block=block,
                splits=splits,
                ordered=rows.ordered,
                **_kind(rows.queries, scale),
            )
        return torch.logsumexp(norms, 0)

    def _reduce(
        self,
        rows: _Rows,
        lse: Tensor,
        ramp: Tensor,
        scale: Scale,
        together: int,
        over_heads: str,
        over_rows: str,
    ) -> Tensor:
        """Scores ``[parts, K / together, m]`` of parts of the queries, not yet combined."""
        sizes = _sizes(rows.queries, len(rows.keys), 1)
        block = sizes.fit(sizes.key_pad)
        steps = max(1, block // sizes.group_pad)
        parts = max(1, min(self.splits, -(-rows.new // steps)))
        part = -(-rows.new // parts)
        wide = sizes.kv_heads // together
        scores = _floats(rows.queries, parts, wide, rows.entries)
        with _device(rows.queries):
            kernels.reduce_rows[-(-rows.entries // block), wide, parts](
                rows.queries,
                rows.keys,
                rows.q_pos,
                rows.k_pos,
                lse,
                ramp,
                scores,
                *_numbers(scale),
                rows.new,
                rows.entries,
                part,
                *rows.keys.stride()[:2],
                rows.k_pos.stride(0),
                **sizes.grouped,
                together=together,
                **sizes.keys,
                steps=steps,
                block=block,
                over_heads=over_heads,
                over_rows=over_rows,
                ordered=rows.ordered,
                **_kind(rows.queries, scale),
            )
        return scores


class _Rows(NamedTuple):
    """Queries and entries of one request, as arguments of the kernels."""

    queries: Tensor  # [n, H, D], contiguous
    keys: Tensor  # [K, m, D]
    q_pos: Tensor  # [n]
    k_pos: Tensor  # [K, m]
    ordered: bool  # the last n entries are the queries' own, in order

    @staticmethod
    def of(
        queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, ordered: bool = False
    ) -> _Rows:
        return _Rows(queries.contiguous(), _dense(keys), q_pos.contiguous(), _dense(k_pos), ordered)

    @property
    def new(self) -> int:
        return self.queries.shape[0]

    @property
    def entries(self) -> int:
        return self.keys.shape[1]


class _Held(NamedTuple):
    """Pages as arguments of ``decode_split``."""

    tensors: tuple[Tensor, ...]  # keys, values, their scales, positions
    codec: int = 0  # without a codec, scales are not read: any tensor works
    key_group: int = 1
    value_group: int = 1

    @staticmethod
    def of(pages: Pages, sizes: _Sizes) -> _Held:
        keys, values, positions, key_scales, value_scales, codec = pages
        if codec is None or key_scales is None or value_scales is None:
            found = _Held((keys, values, keys, values, positions))
        else:
            found = _Held(
                (keys, values, key_scales, value_scales, positions),
                codec.kernel,
                codec.group(sizes.key_dim),
                codec.group(sizes.value_dim),
            )
        assert all(each.is_contiguous() for each in found.tensors), "a pool's storage is contiguous"
        return found


class _Sizes(NamedTuple):
    """A layer's sizes, and the sizes that a kernel pads to a power of two."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    tile: int

    def fit(self, pad: int) -> int:
        """How many entries of ``pad`` numbers fit in one operand of a product."""
        return max(16, min(64, self.tile // pad))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def group_pad(self) -> int:
        return _pad(self.group, 1)

    @property
    def key_pad(self) -> int:
        return _pad(self.key_dim, 16)

    @property
    def value_pad(self) -> int:
        return _pad(self.value_dim, 16)

    @property
    def heads_only(self) -> dict[str, Any]:
        return {"heads": self.heads, "group": self.group}

    @property
    def grouped(self) -> dict[str, Any]:
        return {**self.heads_only, "group_pad": self.group_pad}

    @property
    def keys(self) -> dict[str, Any]:
        return {"key_dim": self.key_dim, "key_pad": self.key_pad}

    @property
    def values(self) -> dict[str, Any]:
        return {"value_dim": self.value_dim, "value_pad": self.value_pad}


def _sizes(queries: Tensor, kv_heads: int, value_dim: int) -> _Sizes:
    tile = WIDE_TILE if queries.dtype == torch.float32 else TILE
    return _Sizes(queries.shape[1], kv_heads, queries.shape[2], value_dim, tile)


def _pad(size: int, least: int) -> int:
    """The next power of two, at least ``least`` (products need at least 16)."""
    return max(least, 1 << (size - 1).bit_length())


def _numbers(scale: Scale) -> tuple[float, float, int]:
    return scale.scale, scale.softcap or 1.0, scale.window or 0


def _kind(queries: Tensor, scale: Scale) -> dict[str, Any]:
    """Compile-time constants.  tf32 holds a 16-bit number exactly; three tf32 hold a float32
    number."""
    capped, windowed = scale.softcap is not None, scale.window is not None
    return {"capped": capped, "windowed": windowed, "precision": _precision(queries.dtype)}


def _precision(dtype: torch.dtype) -> str:
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _device(tensor: Tensor) -> AbstractContextManager[None]:
    """Kernels start on the current device: make the tensor's device current (no effect on the
    CPU)."""
    of: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return of
