"""Linears and embeddings with the codes of a GGUF file, which are never dequantized.

The file is memory-mapped; each quantized tensor becomes ``Rows`` (addresses of each output's
blocks), which the kernels pack (``native/coding.h``).  Vectors and unquantized tensors are read as
numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from pyramidinfer.models.gguf import source_file
from pyramidinfer.models.gguf_file import Header, read_header
from pyramidinfer.models.gguf_file import Tensor as Stored
from pyramidinfer.models.weights import CODES, FLOATS, FOUR, HALVES, LEAST, Rows

__all__ = ["coded_model"]

#: The format of each block type: its codes, with scales of its own precision; codes of 5 and 6
#: bits are stored in 8.
FORMATS = {
    GGMLQuantizationType.Q4_0: CODES | FOUR | LEAST,
    GGMLQuantizationType.Q4_1: CODES | FOUR | LEAST,
    GGMLQuantizationType.Q5_0: CODES,
    GGMLQuantizationType.Q5_1: CODES | LEAST | FLOATS,
    GGMLQuantizationType.Q8_0: CODES,
    GGMLQuantizationType.Q4_K: CODES | FOUR | LEAST | FLOATS,
    GGMLQuantizationType.Q5_K: CODES | LEAST | FLOATS,
    GGMLQuantizationType.Q6_K: CODES | HALVES | FLOATS,
}
#: Types that hold plain numbers.
NUMBERS = {
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
}
#: Families whose files hold norm factors, while the model stores the factors minus one.
GEMMA = ("gemma2", "gemma3")


class Mapped(NamedTuple):
    """A file's bytes and its header."""

    header: Header
    data: Tensor

    def blocks(self, stored: Stored) -> Tensor:
        """A tensor's blocks ``[n, bytes]`` of a matrix, ``[1, bytes]`` of a vector."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(stored.kind)]
        wide = stored.shape[-1] // block * size
        return self.data[stored.start :][: stored.count // block * size].view(-1, wide)

    def numbers(self, stored: Stored) -> Tensor:
        blocks = self.blocks(stored).numpy()
        kind = GGMLQuantizationType(stored.kind)
        return torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind))).view(stored.shape)


def coded_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model of a converted folder, its linears and embedding ``Rows`` of the GGUF file that it
    was made from (attribute ``rows``, their ``weight`` empty), everything else in ``dtype``.

    ``ValueError`` if the file is missing, or holds blocks of an unsupported type.
    """
    header = read_header(source_file(folder))
    mapped = Mapped(header, torch.from_numpy(np.memmap(header.file, np.uint8, mode="c")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = _names(header, model)
    for name, parameter in list(model.named_parameters()):
        stored = header.tensors.get(names[name])
        if stored is None:
            raise ValueError(f"{str(header.file)!r} lacks the tensor {names[name]!r}")
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        kind = GGMLQuantizationType(stored.kind)
        if tuple(parameter.shape) != stored.shape:
            raise ValueError(
                f"{str(header.file)!r}: {names[name]} is {stored.shape}, not {parameter.shape}"
            )
        order = _order(header, names[name], config, stored.shape[0])
        if kind in FORMATS and isinstance(module, nn.Linear | nn.Embedding):
            vars(module)["rows"] = _rows(mapped.blocks(stored), stored, order)
            value = torch.empty(0, dtype=dtype)
        elif kind in NUMBERS or kind in FORMATS:
            value = mapped.numbers(stored)
            if header.architecture in GEMMA and names[name].endswith("norm.weight"):
                value = value - 1
            value = (value if order is None else value[order]).to(dtype)
        else:
            raise ValueError(
                f"weights='gguf': {names[name]} of {str(header.file)!r} has blocks of type "
                f"{kind.name}; supported are {', '.join(each.name for each in FORMATS)}. "
                f"Omit weights: the model is converted then"
            )
        setattr(module, key, nn.Parameter(value, requires_grad=False))
    _share(model)
    _fill_buffers(model, config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _names(header: Header, model: Any) -> dict[str, str]:
    """The model's tensor names → the file's."""
    found = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    known = gguf.get_tensor_name_map(found, model.config.num_hidden_layers)
    names = {}
    for name, _ in model.named_parameters():
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"GGUF files of {header.architecture!r} have no tensor {name!r}")
        names[name] = theirs
    return names


def _order(header: Header, name: str, config: Any, count: int) -> Tensor | None:
    """Index in the file of each of the model's outputs: files of the Llama family interleave the
    two halves of every query and key head, which rotate together."""
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": getattr(config, "num_key_value_heads", None),
    }.get(name.split(".")[-2])
    if header.architecture != "llama" or heads is None:
        return None
    return torch.arange(count).view(heads, -1, 2).transpose(1, 2).flatten()


def _rows(blocks: Tensor, stored: Stored, order: Tensor | None) -> Rows:
    addresses = torch.arange(len(blocks)) * blocks.shape[1] + blocks.data_ptr()
    if order is not None:
        addresses = addresses[order]
    form = FORMATS[GGMLQuantizationType(stored.kind)]
    return Rows(addresses, stored.kind, form, stored.shape[1], blocks)


def _share(model: Any) -> None:
    """A tied head also gets the embedding's rows."""
    model.tie_weights()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight and hasattr(table, "rows"):
        head.rows = table.rows


def _fill_buffers(model: Any, config: Any) -> None:
    """Compute the buffers that depend on the config, which the model on the meta device lacks."""
    for name, module in list(model.named_modules()):
        if not any(each.is_meta for each in module.buffers(recurse=False)):
            continue
        if (scale := getattr(module, "scalar_embed_scale", None)) is not None:
            module.embed_scale = torch.tensor(scale)
        elif name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config))
        else:
            raise ValueError(f"weights='gguf': {name} of this model is not supported; omit weights")
