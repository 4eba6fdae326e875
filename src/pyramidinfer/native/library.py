"""The C interface of the CPU kernels (``kernels.cpp``), as ctypes sees it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch  # also loads the OpenMP runtime that the kernels then share
from torch import Tensor

from pyramidinfer.native.build import NoCompilerError, compile_kernels

__all__ = [
    "DTYPES",
    "FORMATS",
    "PARTS",
    "SOURCES",
    "AdaptedData",
    "Adding",
    "DecodeCall",
    "DenseCall",
    "Eviction",
    "HeadsData",
    "Keeping",
    "Kernels",
    "LayerData",
    "LinearData",
    "LowRankData",
    "StepCall",
    "StorageData",
    "WatchCall",
    "WriteCall",
    "kernels",
    "pointer",
    "why_not",
]

#: The numbers by which the kernels know dtypes.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


#: The numbers by which they know how a linear's weights are stored: in its dtype, or as codes
#: (``Format`` in matmul.h); a GGUF file's are of several kinds.
FORMATS = {"auto": 0, "int8": 1, "int4": 7, "gguf": 1}
#: What rows of weights that become codes may be made of (``Source`` in coding.h).
SOURCES = {torch.float32: 100, torch.bfloat16: 101, torch.float16: 102}


def _struct(name: str, pointers: str, integers: str, floats: str = "") -> type[Structure]:
    fields: list[tuple[str, Any]] = [(each, c_void_p) for each in pointers.split()]
    fields += [(each, c_int64) for each in integers.split()]
    fields += [(each, c_float) for each in floats.split()]
    return type(name, (Structure,), {"_fields_": fields})


DecodeCall = _struct(
    "DecodeCall",
    "queries keys values positions key_scales value_scales table lengths at out lse probs",
    "requests heads kv_heads key_dim value_dim page width codec longest window",
    "scale softcap",
)
DenseCall = _struct(
    "DenseCall",
    "queries keys values q_pos k_pos",
    "query_row key_head key_row value_head value_row k_row queries_n entries heads kv_heads "
    "key_dim value_dim window",
    "scale softcap",
)
StorageData = _struct("StorageData", "data", "entry")
Keeping = _struct("Keeping", "tensors pages indices", "count page kept length")
Adding = _struct("Adding", "layers pages lengths", "count row kv_heads width heads page")
Eviction = _struct(
    "Eviction",
    "keys values positions scores key_scales value_scales pages lengths counts protect queries lse "
    "rows query_at",
    "width kernel pools_max sinks recent room running text kv_heads key_dim value_dim page codec "
    "window heads takes_max",
    "scale softcap share",
)
WriteCall = _struct(
    "WriteCall",
    "keys values at pages offsets to_keys to_values to_positions to_scores to_key_scales "
    "to_value_scales",
    "key_row value_row key_head value_head count kv_heads key_dim value_dim page codec",
)
LinearData = _struct("LinearData", "packed bias", "columns depth format")
LowRankData = _struct("LowRankData", "down scales up halves", "rank")
AdaptedData = _struct("AdaptedData", "adapters starts members group", "groups most")


class WatchCall(Structure):
    """``Watch`` in prefill.h."""

    _fields_ = (
        ("first", c_int64),
        ("ramp", c_void_p),
        ("sums", c_void_p),
        ("lse", c_void_p),
        ("parts", c_int),
    )


class HeadsData(Structure):
    """``Heads`` in step.h."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("size", c_int64),
        ("rotated", c_int64),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("epsilon", c_float),
        ("floats", c_int64),
    )


class LayerData(Structure):
    """One layer of a decode step: ``Layer`` in step.h."""

    _fields_ = (
        ("norm1", c_void_p),
        ("norm2", c_void_p),
        ("after1", c_void_p),
        ("after2", c_void_p),
        ("qkv", LinearData),
        ("out", LinearData),
        ("gate_up", LinearData),
        ("down", LinearData),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("positions", c_void_p),
        ("scores", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("scale", c_float),
        ("epsilon", c_float),
        ("window", c_int64),
        ("angles", c_int64),
        ("gating", c_int64),
        ("floats", c_int64),
    )


#: Parts of a step whose times it can measure (``Part`` in step.h).
PARTS = ("norms", "qkv", "cache", "attention", "out", "gate_up", "down")


class StepCall(Structure):
    """A decode step: ``Step`` in step.h."""

    _fields_ = (
        ("layers", POINTER(LayerData)),
        *(
            (name, c_int64)
            for name in (
                "depth hidden inner heads kv_heads size page rows width rotated codec".split()
            )
        ),
        *(
            (name, c_void_p)
            for name in (
                "cos sin pages offsets tables lengths at longest queries lse probs adapted "
                "seconds".split()
            )
        ),
    )


#: In the order in which ``struct_bytes`` knows them.
STRUCTS: tuple[type[Structure], ...] = (
    DecodeCall,
    DenseCall,
    StorageData,
    Keeping,
    Adding,
    Eviction,
    WriteCall,
    LinearData,
    WatchCall,
    HeadsData,
    LayerData,
    StepCall,
    LowRankData,
    AdaptedData,
)

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "isa": (c_char_p, []),
    "has_layers": (c_int, [c_int]),
    "panel_columns": (c_int64, []),
    "lanes": (c_int64, []),
    "deep": (c_int64, [c_int]),
    "group_inputs": (c_int64, []),
    "struct_bytes": (c_int64, [c_int]),
    "decode_attention": (None, [c_int, c_void_p, c_int64]),
    "prefill_attention": (None, [c_int, POINTER(DenseCall), c_void_p, POINTER(WatchCall)]),
    "score_window": (
        None,
        [
            c_int,
            POINTER(DenseCall),
            c_int,
            c_int,
            c_int,
            c_float,
            c_void_p,
            c_int,
            c_void_p,
            c_void_p,
        ],
    ),
    "keep": (c_int64, [c_void_p, c_int64]),
    "gather_pages": (
        None,
        [POINTER(StorageData), c_void_p, c_int64, c_int, c_int, c_int64, c_void_p],
    ),
    "gather_decoded": (
        None,
        [
            c_int,
            c_int,
            c_void_p,
            c_void_p,
            c_int64,
            c_void_p,
            c_int64,
            c_int,
            c_int,
            c_int64,
            c_void_p,
        ],
    ),
    "add_scores": (None, [POINTER(Adding)]),
    "evict_entries": (None, [c_int, c_void_p, c_int64]),
    "best_entries": (
        c_int64,
        [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p],
    ),
    "pool_neighbours": (
        None,
        [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_int, c_void_p],
    ),
    "read_words": (c_int64, [c_void_p, c_int64]),
    "pack_linear": (None, [c_int, c_void_p, c_int64, c_int64, c_void_p]),
    "run_linear": (
        None,
        [
            c_int,
            c_void_p,
            c_int64,
            POINTER(LinearData),
            c_int,
            c_void_p,
            c_void_p,
            POINTER(AdaptedData),
            c_int64,
        ],
    ),
    "packed_bytes": (c_int64, [c_int, c_int64, c_int64]),
    "pack_coded": (None, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    "read_rows": (None, [c_int, POINTER(LinearData), c_void_p, c_int64, c_void_p]),
    "run_norm": (None, [c_int, c_void_p, c_int64, c_int64, c_void_p, c_int, c_float, c_void_p]),
    "run_rotate": (None, [c_int, c_void_p, c_int64, POINTER(HeadsData), c_void_p, c_void_p]),
    "write_entries": (None, [c_int, POINTER(WriteCall)]),
    "run_step": (None, [c_int, POINTER(StepCall), c_void_p]),
}


class Kernels:
    """The loaded library: one attribute per function of ``SIGNATURES``."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise OSError(f"it has no function {name!r}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        for index, mine in enumerate(STRUCTS):
            if (theirs := self.struct_bytes(index)) != ctypes.sizeof(mine):
                raise OSError(
                    f"its {mine.__name__} has {theirs} bytes, here it has {ctypes.sizeof(mine)}"
                )

    def __getattr__(self, name: str) -> Any:  # for what __init__ has not set: nothing
        raise AttributeError(f"the kernels have no function {name!r}")

    @property
    def instructions(self) -> str:
        """The instruction set in use."""
        return str(self.isa().decode())

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether linears of this dtype run here."""
        return dtype in DTYPES and bool(self.has_layers(DTYPES[dtype]))


@lru_cache(maxsize=8)
def kernels(isa: str = "native") -> Kernels:
    """The kernels, built and loaded once.  ``NoCompilerError`` where that cannot be done."""
    path = compile_kernels(isa)
    try:
        return Kernels(str(path))
    except OSError as error:
        raise NoCompilerError(f"the built kernels {path} cannot be loaded: {error}") from None


def why_not() -> str | None:
    """Why the kernels cannot be used here, or None."""
    try:
        kernels()
    except NoCompilerError as error:
        return str(error)
    return None


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address for a call (None stays None)."""
    return None if tensor is None else tensor.data_ptr()
