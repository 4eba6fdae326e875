"""Load a model and tokenizer: safetensors only, no remote code, clear errors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pyramidinfer.config import parse_device, parse_dtype
from pyramidinfer.models.catalog import check_path, find_model
from pyramidinfer.models.configs import read_config
from pyramidinfer.models.families import find_family
from pyramidinfer.models.folder import (
    ADAPTER,
    model_folder,
    one_line,
    read_headers,
    stored_dtype,
    weight_files,
)
from pyramidinfer.models.gguf_weights import coded_model
from pyramidinfer.models.lora import base_of, merge_adapter, unwrap
from pyramidinfer.models.tensors import check_report, check_tensors

#: Files of a tokenizer; one of them must exist.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

__all__ = [
    "LoadedModel",
    "empty_model",
    "end_ids",
    "find_tokenizer",
    "free_memory",
    "load_config",
    "load_model",
    "quiet_transformers",
    "shipped_model",
]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer (or None) and its source."""

    model: nn.Module
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    of_file: bool = False,
) -> LoadedModel:
    """Load a folder, hub id, fetched model or GGUF file, or use a transformers model unchanged.

    ``tokenizer``: ``"auto"`` (the model's own, or None), a tokenizer, the name of a model that has
    one, or None.  ``of_file``: linears with the codes of the GGUF file
    (``gguf_weights.coded_model``), for the kernels only.  ``ValueError`` with the reason if
    something cannot be loaded.
    """
    if isinstance(model, nn.Module):
        return _take_object(model, tokenizer, dtype, device)
    place = parse_device(device)
    name = check_path(find_model(str(model)))
    folder = model_folder(name, weights=True)
    if (folder / ADAPTER).is_file():
        return _load_adapted(name, folder, tokenizer, dtype, place)
    if of_file:
        config = load_config(name)
        kind = parse_dtype(dtype, config.dtype)
        loaded = coded_model(folder, config, kind)
    else:
        loaded, kind = _load_weights(name, folder, dtype)
    found = find_tokenizer(folder, tokenizer, loaded.config)
    return LoadedModel(loaded.to(place).eval(), found, name, place, kind)


def _load_weights(name: str, folder: Path, dtype: str | torch.dtype) -> tuple[Any, torch.dtype]:
    """The model of a folder on the CPU, with every tensor of its files in its place."""
    config, files = load_config(name), weight_files(folder)
    check_tensors(name, config, read_headers(files))
    kind = parse_dtype(dtype, config.dtype)
    _check_generation_config(folder)
    loaded, report = _from_hub(
        AutoModelForCausalLM,
        folder,
        repr(name),
        config=config,
        dtype=kind,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(name, report)
    return loaded, kind


def _load_adapted(
    name: str, folder: Path, tokenizer: Any, dtype: str | torch.dtype, place: torch.device
) -> LoadedModel:
    """An adapter's base model with the adapter merged in; its tokenizer, else the base's."""
    base = check_path(find_model(base_of(folder, name)))
    below = model_folder(base, weights=True)
    loaded, kind = _load_weights(base, below, dtype)
    merged = merge_adapter(loaded, folder, name).to(place).eval()
    found = find_tokenizer(folder, tokenizer, loaded.config)
    if found is None and isinstance(tokenizer, str) and tokenizer == "auto":
        found = find_tokenizer(below, tokenizer, loaded.config)
    return LoadedModel(merged, found, name, place, kind)


def shipped_model() -> str:
    """Folder of the model that ships in the package."""
    return str(files("pyramidinfer") / "assets" / "demo-model")


def quiet_transformers() -> None:
    """Switch off transformers' progress bars and advice (the command line's choice)."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_config(name: str) -> Any:
    """The transformers config of a folder, a hub id, a fetched model's name or a GGUF file; an
    adapter's is its base model's.  If it names no dtype, it gets that of the weights."""
    name = check_path(find_model(name))
    folder = model_folder(name)
    if (folder / ADAPTER).is_file():
        return load_config(base_of(folder, name))
    config = read_config(folder)
    if config.dtype is None:
        folder = model_folder(name, weights=True)
        if list(folder.glob("*.safetensors")):
            config.dtype = stored_dtype(read_headers(weight_files(folder)))
    return config


def empty_model(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> tuple[Any, torch.device]:
    """The model without weights (on the meta device), and the device it would be loaded to."""
    place, config = parse_device(device), load_config(str(name))
    kind = parse_dtype(dtype, config.dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind), place
    except Exception as error:
        raise ValueError(
            f"no model can be built from the config of {str(name)!r}: {one_line(error)}"
        ) from error


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for group in _groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        try:  # limit of a container or service
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            for line in (group / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):  # the page cache can be freed
                    used -= int(line.split()[1])
            free = min(free, limit - used)
        except (OSError, ValueError):
            continue
    return free


def _groups(root: Path, own: Path) -> list[Path]:
    """Folders of this process's control groups, innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return [root]
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    inner = root / name.lstrip("/")
    return [group for group in (inner, *inner.parents) if group.is_relative_to(root)]


def _take_object(
    model: nn.Module, tokenizer: Any, dtype: str | torch.dtype, device: str | torch.device
) -> LoadedModel:
    model = unwrap(model)
    config = getattr(model, "config", None)
    find_family(config)
    first = next(model.parameters())
    if first.is_meta:
        raise ValueError("the model's weights are on the meta device; load them first")
    if dtype != "auto" and parse_dtype(dtype, None) != first.dtype:
        raise ValueError(
            f"dtype={dtype!r}, but the model given is {first.dtype}; convert it, or use 'auto'"
        )
    if device != "auto" and parse_device(device).type != first.device.type:
        raise ValueError(
            f"device={device!r}, but the model given is on {first.device}; move it, or use 'auto'"
        )
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    if isinstance(tokenizer, str) and tokenizer == "auto":
        tokenizer = None
    tokenizer = find_tokenizer(Path(), tokenizer)
    return LoadedModel(model, tokenizer, name, first.device, first.dtype)


def _from_hub(loader: Any, folder: Path, what: str, **options: Any) -> Any:
    """``from_pretrained`` with its many exceptions converted to one ``ValueError``."""
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # raised by a tokenizer, in Rust
        if not (isinstance(error, Exception) or is_panic):
            raise
        raise ValueError(f"cannot load {what}: {one_line(error)}") from error


def _check_generation_config(folder: Path) -> None:
    """``ValueError`` for an unreadable file, which transformers ignores."""
    file = folder / "generation_config.json"
    try:
        if file.is_file() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is not a readable generation config") from error


def find_tokenizer(folder: Path, tokenizer: Any, config: Any = None) -> Any:
    """``"auto"``: the folder's own tokenizer, or None; else the tokenizer that is given or named.

    config : the model's checked config, so that transformers does not read the folder's.
    """
    if tokenizer is None or not isinstance(tokenizer, str | os.PathLike):
        return _check_tokenizer(tokenizer)
    if tokenizer != "auto":
        name = find_model(str(tokenizer))
        place = Path(name).expanduser()
        if not place.exists() and name.count("/") != 1:
            raise ValueError(f"tokenizer path {str(tokenizer)!r} does not exist")
        return _from_hub(AutoTokenizer, model_folder(name), f"the tokenizer of {name!r}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        return None
    return _from_hub(AutoTokenizer, folder, f"the tokenizer of {str(folder)!r}", config=config)


def _check_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise ValueError(f"tokenizer={tokenizer!r} is neither a tokenizer, a path, nor None")
    return tokenizer


def end_ids(model: nn.Module) -> frozenset[int]:
    """End-of-sequence ids of the generation config and of the model's config."""
    found: set[int] = set()
    for place in ("generation_config", "config"):
        ends = getattr(getattr(model, place, None), "eos_token_id", None)
        if ends is not None:
            found.update([ends] if isinstance(ends, int) else ends)
    return frozenset(found)
