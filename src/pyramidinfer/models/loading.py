"""Load a model and tokenizer: safetensors only, no remote code, clear errors."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pyramidinfer.config import parse_device, parse_dtype
from pyramidinfer.models.catalog import CATALOG, find_model
from pyramidinfer.models.families import find_family

__all__ = ["LoadedModel", "empty_model", "end_ids", "free_memory", "load_config", "load_model",
           "quiet_transformers", "shipped_model"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer (None where there is none) and where it came from."""

    model: nn.Module
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype


def load_model(model: str | os.PathLike[str] | nn.Module, tokenizer: Any = "auto",
               dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
               ) -> LoadedModel:  # fmt: skip
    """Load a folder, hub id, fetched model or GGUF file, or take a transformers model as it is.

    ``tokenizer``: ``"auto"`` (the model's own, None where it has none), a tokenizer, what names
    a model that has one, or None.  Raises ``ValueError`` for what cannot be loaded, with the
    reason.
    """
    if isinstance(model, nn.Module):
        return _take_object(model, tokenizer, dtype, device)
    place = parse_device(device)
    name = _check_folder(find_model(str(model)))
    config = load_config(name)
    find_family(config)
    kind = parse_dtype(dtype, getattr(config, "dtype", None))
    loaded, report = _from_hub(
        AutoModelForCausalLM, name, config=config, dtype=kind, use_safetensors=True,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    _check_report(name, report)
    loaded = loaded.to(place).eval()
    return LoadedModel(loaded, find_tokenizer(name, tokenizer), name, place, kind)


def shipped_model() -> str:
    """Folder of the model in the package."""
    return str(files("pyramidinfer") / "assets" / "demo-model")


def quiet_transformers() -> None:
    """Switch transformers' progress bars and advice off (the command line's choice)."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_config(name: str) -> Any:
    """The transformers config of a folder, a hub id, a fetched model's name or a GGUF file."""
    name = _check_path(find_model(name))
    local = Path(name) / "config.json"
    if local.is_file():
        try:
            kind = json.loads(local.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{str(local)!r} is not a readable config") from error
        find_family(SimpleNamespace(model_type=kind))
    return _from_hub(AutoConfig, name)


def empty_model(name: str | os.PathLike[str], dtype: str | torch.dtype = "auto",
                device: str | torch.device = "auto") -> tuple[Any, torch.device]:  # fmt: skip
    """The model without weights (on the meta device), and where it would be loaded."""
    place, config = parse_device(device), load_config(str(name))
    find_family(config)
    kind = parse_dtype(dtype, getattr(config, "dtype", None))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=kind), place


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for group in _groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        try:  # a container's limit, or a service's
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            for line in (group / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):  # files read before give way
                    used -= int(line.split()[1])
            free = min(free, limit - used)
        except (OSError, ValueError):
            continue
    return free


def _groups(root: Path, own: Path) -> list[Path]:
    """Folders of the control groups this process is in, the innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return [root]
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    inner = root / name.lstrip("/")
    return [group for group in (inner, *inner.parents) if group.is_relative_to(root)]


def _take_object(model: nn.Module, tokenizer: Any, dtype: str | torch.dtype,
                 device: str | torch.device) -> LoadedModel:  # fmt: skip
    config = getattr(model, "config", None)
    find_family(config)
    first = next(model.parameters())
    if first.is_meta:
        raise ValueError("the model's weights are on the meta device; load them first")
    if dtype != "auto" and parse_dtype(dtype, None) != first.dtype:
        raise ValueError(
            f"dtype={dtype!r}, but the model given is {first.dtype}; convert it, or leave 'auto'"
        )
    if device != "auto" and parse_device(device).type != first.device.type:
        raise ValueError(
            f"device={device!r}, but the model given is on {first.device}; move it, or leave 'auto'"
        )
    rates = ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop")
    if model.training and any(getattr(config, rate, 0) for rate in rates):
        raise ValueError("the model given is in training mode with dropout; call model.eval()")
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    if isinstance(tokenizer, str) and tokenizer == "auto":
        tokenizer = None
    tokenizer = find_tokenizer(name, tokenizer)
    return LoadedModel(model, tokenizer, name, first.device, first.dtype)


def _check_path(name: str) -> str:
    """The folder, ``~`` expanded, or the hub id; ``ValueError`` where neither can be meant."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "~", "/")) or name.count("/") != 1 or path.parent.is_dir()
    if not path.exists():
        if looks_local:
            near = {each: each for each in CATALOG} if "/" not in name else {}
            near |= {each.name: str(each) for each in path.parent.glob("*") if each.is_dir()}
            close = difflib.get_close_matches(path.name, near, n=1)
            hint = f"did you mean {near[close[0]]!r}?" if close else "a hub id is owner/name"
            raise ValueError(f"model path {name!r} does not exist; {hint}")
        return name
    if not (path / "config.json").is_file():
        raise ValueError(f"model folder {name!r} has no config.json")
    return str(path)


def _check_folder(name: str) -> str:
    path = Path(_check_path(name))
    if path.exists() and not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model folder {name!r} has no *.safetensors file; other weight formats are not loaded"
        )
    return str(path) if path.exists() else name


def _from_hub(loader: Any, name: str, **options: Any) -> Any:
    """``from_pretrained`` with its many exceptions turned into one ``ValueError``."""
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"cannot load {name!r}: {reason}") from error


def _check_report(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that left tensors at random values."""
    missing = sorted(report.get("missing_keys") or ())
    odd = sorted(report.get("mismatched_keys") or ())
    if not missing and not odd:
        return
    if missing:
        what = f"lacks the tensor {missing[0]}"
    else:
        key, found, wanted = odd[0]
        what = f"has a wrong shape for {key}: {list(found)}, expected {list(wanted)}"
    more = len(missing) + len(odd) - 1
    more_text = f" (and {more} more)" if more else ""
    raise ValueError(f"model {name!r} {what}{more_text}; its files are not complete")


def find_tokenizer(name: str, tokenizer: Any) -> Any:
    if tokenizer is None or not isinstance(tokenizer, str | os.PathLike):
        return _check_tokenizer(tokenizer)
    if tokenizer != "auto":
        tokenizer = find_model(str(tokenizer))
        place = Path(tokenizer).expanduser()
        if not place.exists() and str(tokenizer).count("/") != 1:
            raise ValueError(f"tokenizer path {str(tokenizer)!r} does not exist")
        return _from_hub(AutoTokenizer, str(place if place.exists() else tokenizer))
    path = Path(name).expanduser()
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if path.is_dir() and not any((path / file).is_file() for file in files):
        return None
    return _from_hub(AutoTokenizer, name)


def _check_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise ValueError(f"tokenizer={tokenizer!r} is neither a tokenizer, a path, nor None")
    return tokenizer


def end_ids(model: nn.Module) -> frozenset[int]:
    """End-of-sequence ids from the generation config, else from the model's config."""
    for place in ("generation_config", "config"):
        ends = getattr(getattr(model, place, None), "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()
