"""The operations around attention in a plain layer: linears, norms, rotation, in kernels or
torch."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.models.adapters import Low, LowRank, Part, add_parts
from pyramidinfer.models.weights import CODED, TABLE, Rows, joined_format
from pyramidinfer.native.library import DTYPES, FORMATS, HeadsData, Kernels, LinearData, pointer

__all__ = ["ADD", "GATED", "GELU", "PLAIN", "Heads", "KernelOps", "Ops", "TorchOps"]

#: Epilogue of a linear: none, add a residual, SiLU(gate) times up, or GELU(gate), with tanh, times
#: up (packed as ``GATED``).
PLAIN, ADD, GATED, GELU = 0, 1, 2, 3


class Heads(NamedTuple):
    """A projected row ``[H + 2K, D]``: heads, sizes, and the norms of queries and keys, if any."""

    heads: int
    kv_heads: int
    size: int
    rotated: int
    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float

    @property
    def has_floats(self) -> bool:
        """Whether the norms' weights are float32."""
        return self.query_norm is not None and self.query_norm.dtype == torch.float32


class Ops(Protocol):
    """The same arithmetic in each implementation, for sizes that are multiples of ``multiple``.

    ``has_gemma``: supports norms with float32 weights (no rounding before them), and ``GELU``.
    """

    multiple: int
    has_gemma: bool
    weights: str

    def pack(self, weights: list[Any], biases: list[Tensor | None], how: int) -> Any:
        """Pack linears of the same input together; for ``GATED``, gate and up.  Weights are
        tensors, or ``Rows`` for the kernels."""
        ...

    def pack_table(self, weights: list[Any], biases: list[Tensor | None]) -> Any:
        """Pack a head (or an embedding) ``[vocabulary, n]``, as in ``pack``."""
        ...

    def pack_low_rank(self, parts: list[Part], weights: Any, how: int) -> Any:
        """Pack an adapter's parts for a packed linear, in the order of its outputs."""
        ...

    def linear(
        self,
        x: Tensor,
        weights: Any,
        how: int,
        residual: Tensor | None = None,
        low: Low | None = None,
    ) -> Tensor:
        """``x [n, in]`` → ``[n, out]``; ``GATED``: silu(gate) · up; ``ADD``: plus the residual.
        low : rows' adapters, which add to the product before the epilogue."""
        ...

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root mean square norm over the last dimension."""
        ...

    def rotate(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        """Norm and rotate queries and keys ``[n, H + 2K, D]`` in place; angles ``[n, rotated]``."""
        ...


class Packed:
    """Weights in panels for the kernels, with their description for the C side."""

    def __init__(
        self,
        panels: Tensor,
        bias: Tensor | None,
        columns: int,
        depth: int,
        how: int,
        form: int = FORMATS["auto"],
    ) -> None:
        self.panels, self.bias, self.depth = panels, bias, depth
        self.columns = columns // 2 if how == GATED else columns
        self.data = LinearData(pointer(panels), pointer(bias), columns, depth, form)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)


class KernelOps:
    """With the C++ kernels; outputs of ``linear`` and ``norm`` are fresh tensors.

    weights : how weights of linears are stored, ``"auto"``: in the dtype (``models/weights.py``).
    seconds : for profilers; float64 of ``native.library.PARTS``, to which decode steps add the time
    of each part.
    """

    has_gemma = True

    def __init__(self, kernels: Kernels, dtype: torch.dtype, weights: str = "auto") -> None:
        self.kernels, self.dtype, self.kind = kernels, dtype, DTYPES[dtype]
        self.weights = weights
        self.seconds: Tensor | None = None
        self.multiple = 2 if weights == "auto" else 1

    def pack(self, weights: list[Any], biases: list[Tensor | None], how: int) -> Packed:
        return self._pack(weights, biases, how, self.weights)

    def pack_table(self, weights: list[Any], biases: list[Tensor | None]) -> Packed:
        name = self.weights if self.weights in ("auto", "gguf") else TABLE
        return self._pack(weights, biases, PLAIN, name)

    def _pack(self, weights: list[Any], biases: list[Tensor | None], how: int, name: str) -> Packed:
        if name in ("auto", "gguf") and not any(isinstance(each, Rows) for each in weights):
            return self._pack_numbers(weights, biases, how)
        if name == "gguf" and not all(isinstance(each, Rows) for each in weights):
            raise ValueError(
                "weights='gguf': the file has linears of the same input with and without codes; "
                "omit weights: the model is converted then"
            )
        rows = [each if isinstance(each, Rows) else Rows.of(each, name) for each in weights]
        return self._pack_coded(rows, biases, how)

    def _pack_numbers(self, weights: list[Tensor], biases: list[Tensor | None], how: int) -> Packed:
        panel = int(self.kernels.panel_columns())
        columns, depth = sum(len(each) for each in weights), weights[0].shape[1]
        parts = [_with_bias(each, bias) for each, bias in zip(weights, biases, strict=True)]
        if how == GATED:  # half a panel of gate columns, then the up columns that go with them
            half = panel // 2
            parts = [
                F.pad(each, (0, 0, 0, -len(each) % half)).view(-1, half, depth + 1)
                for each in parts
            ]
            joined = torch.stack(parts, dim=1).flatten(0, 2)
        else:
            joined = torch.cat(parts)
        rows, bias = joined[:, :depth].contiguous(), None
        if any(each is not None for each in biases):
            bias = F.pad(joined[:, depth].float(), (0, -len(joined) % panel))
        units = len(rows) + -len(rows) % panel
        panels = torch.empty(units * depth, dtype=self.dtype)
        self.kernels.pack_linear(self.kind, pointer(rows), len(rows), depth, pointer(panels))
        return Packed(panels, bias, columns, depth, how)

    def _pack_coded(self, parts: list[Rows], biases: list[Tensor | None], how: int) -> Packed:
        panel, depth = int(self.kernels.panel_columns()), parts[0].depth
        form = joined_format([each.format for each in parts])
        if form not in CODED:
            raise ValueError(f"the kernels read no weights in the format {form}")
        sizes = [len(each.addresses) for each in parts]
        columns = sum(sizes)
        bias = None
        if any(each is not None for each in biases):
            bias = torch.cat(
                [
                    torch.zeros(size) if each is None else each.float()
                    for size, each in zip(sizes, biases, strict=True)
                ]
            )
        rows = torch.cat([each.addresses for each in parts])
        sources = torch.cat([torch.full_like(each.addresses, each.source) for each in parts]).int()
        if how == GATED:  # half a panel of gate columns, then the up columns that go with them
            half, size = panel // 2, sizes[0]
            at = torch.arange(-(-size // half) * half).clamp(max=size - 1).view(-1, half)
            order = torch.cat([at, at + size], dim=1).flatten()
            rows, sources = rows[order], sources[order]
            bias = None if bias is None else bias[order]
        if bias is not None:
            bias = F.pad(bias, (0, -len(bias) % panel))
        count = len(rows)
        panels = torch.empty(self.kernels.packed_bytes(form, count, depth), dtype=torch.uint8)
        self.kernels.pack_coded(
            form, pointer(rows), pointer(sources), count, depth, pointer(panels)
        )
        return Packed(panels, bias, columns, depth, how, form)

    def rows(self, table: Packed, ids: Tensor) -> Tensor:
        """Rows ``ids`` ``[n]`` of an embedding that is packed as a linear, ``[n, depth]``."""
        out = torch.empty(len(ids), table.depth, dtype=self.dtype)
        self.kernels.read_rows(
            self.kind, ctypes.byref(table.data), pointer(ids.contiguous()), len(ids), pointer(out)
        )
        return out

    def pack_low_rank(self, parts: list[Part], weights: Packed, how: int) -> LowRank:
        half, lanes = int(self.kernels.panel_columns()) // 2, int(self.kernels.lanes())
        size, total = weights.columns, weights.columns * (2 if how == GATED else 1)
        if how == GATED:  # half a panel of gate columns, then the up columns that go with them
            starts = [(at + up, size + up) for at in range(0, size, half) for up in (0, size)]
        else:
            panels = -(-total // (2 * half))
            starts = [(at, total) for at in range(0, 2 * half * panels, half)]
        columns = [range(at, max(at, min(at + half, end))) for at, end in starts]
        deep = int(self.kernels.deep(self.kind))
        return LowRank(parts, columns, half, weights.depth, lanes, deep, self.dtype)

    def linear(
        self,
        x: Tensor,
        weights: Packed,
        how: int,
        residual: Tensor | None = None,
        low: Low | None = None,
    ) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(len(x), weights.columns)
        self.kernels.run_linear(
            self.kind,
            pointer(x),
            len(x),
            ctypes.byref(weights.data),
            how,
            pointer(residual),
            pointer(out),
            None if low is None else ctypes.byref(low.adapted.call),
            0 if low is None else low.number,
        )
        return out

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out = torch.empty_like(x)
        self.kernels.run_norm(
            self.kind,
            pointer(x),
            len(x),
            x.shape[1],
            pointer(weight),
            weight.dtype == torch.float32,
            epsilon,
            pointer(out),
        )
        return out

    def rotate(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        data = HeadsData(
            heads.heads,
            heads.kv_heads,
            heads.size,
            heads.rotated,
            pointer(heads.query_norm),
            pointer(heads.key_norm),
            heads.epsilon,
            heads.has_floats,
        )
        self.kernels.run_rotate(
            self.kind, pointer(qkv), len(qkv), ctypes.byref(data), pointer(cos), pointer(sin)
        )


class TorchOps:
    """In torch, for GPUs: few launches, all of which a CUDA graph can capture."""

    multiple, has_gemma, weights = 1, False, "auto"

    def pack(self, weights: list[Tensor], biases: list[Tensor | None], how: int) -> Any:
        bias = None
        if any(each is not None for each in biases):
            bias = torch.cat(
                [
                    _zeros_like_rows(w) if b is None else b
                    for w, b in zip(weights, biases, strict=True)
                ]
            )
        return torch.cat(weights), bias

    def pack_table(self, weights: list[Tensor], biases: list[Tensor | None]) -> Any:
        return self.pack(weights, biases, PLAIN)

    def pack_low_rank(self, parts: list[Part], weights: Any, how: int) -> list[Part]:
        return parts

    def linear(
        self,
        x: Tensor,
        weights: Any,
        how: int,
        residual: Tensor | None = None,
        low: Low | None = None,
    ) -> Tensor:
        out = F.linear(x, *weights)
        if low is not None:
            for adapter, rows in low.adapted.rows(x.device):
                add_parts(out, x, rows, adapter.packed[low.number] or ())
        if how == GATED:
            gate, up = out.chunk(2, dim=-1)
            return F.silu(gate) * up
        return out if residual is None else out + residual

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return weight * F.rms_norm(x, x.shape[-1:], None, epsilon)  # also rounded before the weight

    def rotate(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> None:
        for norm, first, last in (
            (heads.query_norm, 0, heads.heads),
            (heads.key_norm, heads.heads, heads.heads + heads.kv_heads),
        ):
            part = qkv[:, first:last]
            if norm is not None:
                part.copy_(self.norm(part, norm, heads.epsilon))
        if heads.rotated:
            part = qkv[:, : heads.heads + heads.kv_heads, : heads.rotated]
            half = torch.cat(
                [-part[..., heads.rotated // 2 :], part[..., : heads.rotated // 2]], -1
            )
            cos, sin = cos[:, None].to(part.dtype), sin[:, None].to(part.dtype)
            part.copy_(part * cos + half * sin)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[out, in + 1]``: the bias as a last column, so that both get the same order."""
    column = _zeros_like_rows(weight) if bias is None else bias
    return torch.cat([weight, column[:, None]], dim=1)


def _zeros_like_rows(weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight))
