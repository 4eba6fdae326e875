"""The location of a model's files, in a folder or of a hub id, and the files that are read.

All checks here happen before transformers reads a file.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open

__all__ = [
    "ADAPTER",
    "ADAPTER_WEIGHTS",
    "FLOATS",
    "check_pointer",
    "model_folder",
    "one_line",
    "read_headers",
    "read_json",
    "stored_dtype",
    "weight_files",
]

#: The file that identifies the folder of a PEFT adapter.
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Files other than weights that are read here.
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
#: Files that transformers ignores, or whose name it does not report, if they are broken.
READ_WHOLE = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
POINTER = b"version https://git-lfs.github.com/spec/"
#: safetensors' names of the dtypes that hold plain numbers.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def model_folder(name: str, weights: bool = False) -> Path:
    """The folder of a path or hub id, with config and tokenizer (``weights``: all files).

    Files of a hub id are downloaded unless they are cached.  ``ValueError`` if they are not
    available; immediately if there is no network.
    """
    path = Path(name).expanduser()
    if not path.exists():
        path = _download(name, SMALL)
        if weights:
            wanted = [ADAPTER_WEIGHTS] if (path / ADAPTER).is_file() else _weight_names(path)
            path = _download(name, (*SMALL, *wanted))
    for file in (each for pattern in SMALL for each in path.glob(pattern) if each.is_file()):
        check_pointer(file)
    for name in READ_WHOLE:
        if (path / name).exists():
            read_json(path / name, name.removesuffix(".json").replace("_", " "))
    return path


def check_pointer(file: Path) -> None:
    """``ValueError`` if a file is only a git-lfs pointer."""
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{str(file)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in "
                f"its folder, or download the file again"
            )


def read_json(file: Path, what: str) -> dict[str, Any]:
    """An object from a JSON file; ``ValueError`` if it holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a readable {what}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} is not a readable {what}: it holds no JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's model consists of; ``ValueError`` if one is missing
    or outside the folder."""
    files = [folder / name for name in _weight_names(folder)]
    if not files[0].is_file() and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"model folder {str(folder)!r} has no *.safetensors file; other weight formats are not "
            f"loaded"
        )
    for file in files:
        if not file.is_file():
            raise ValueError(f"model folder {str(folder)!r} lacks its weights file {file.name!r}")
        check_pointer(file)
    return files


def read_headers(files: list[Path]) -> dict[str, tuple[str, int]]:
    """Tensor → (safetensors' name of its dtype, number of elements), from the files' headers."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    found[name] = part.get_dtype(), torch.Size(part.get_shape()).numel()
        except Exception as error:
            raise ValueError(f"cannot load {str(file)!r}: {one_line(error)}") from None
    return found


def stored_dtype(headers: dict[str, tuple[str, int]]) -> torch.dtype | None:
    """The dtype of most numbers of a checkpoint; None if it cannot be used for computation."""
    counts: Counter[str] = Counter()
    for kind, count in headers.values():
        counts[kind] += count
    kind = counts.most_common(1)[0][0] if counts else ""
    return None if kind.startswith("F8") else FLOATS.get(kind)


def _weight_names(folder: Path) -> list[str]:
    """Names of the weight files, with the rules of transformers."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file():
        return [WEIGHTS]
    places = read_json(index, "index of weights").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{str(index)!r} is not a readable index of weights: it has no weight_map")
    names = set()
    for tensor, name in places.items():
        if (
            not isinstance(name, str)
            or name != Path(name).name
            or not name.endswith(".safetensors")
        ):
            raise ValueError(
                f"{str(index)!r} puts {tensor!r:.80} in {name!r:.80}: it may only name safetensors "
                f"files of its own folder"
            )
        names.add(name)
    return sorted(names)


@functools.cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    """Downloaded once per process, so that all files are from one revision of the repository."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns], ignore_patterns=["*/*"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"model {name!r} is not on this machine, and the Hugging Face Hub cannot be reached "
            f"({one_line(error).removeprefix('Got: ')}); give a folder, or try again with a network"
        ) from None
    except Exception as error:
        raise ValueError(f"cannot load {name!r}: {one_line(error)}") from error
