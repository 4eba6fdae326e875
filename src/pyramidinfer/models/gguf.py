"""GGUF files become folders of safetensors, once, so that everything else reads one format.

transformers reads and dequantizes a GGUF; what it makes of the weights, config, tokenizer, chat
template and end ids is written down as it is, in float32 (dequantized 4-bit values do not fit in
16 bits).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyramidinfer.models.families import find_family
from pyramidinfer.native.build import cache_folder

__all__ = ["convert", "converted", "is_gguf", "models_folder"]

MAGIC = b"GGUF"
#: Left in a converted folder: what it was made from.
ORIGIN = "converted_from.json"
#: Raise when a conversion would come out otherwise: cached ones are made anew.
VERSION = 1


def is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def models_folder() -> Path:
    """Where fetched and converted models lie: ``models`` in the user's cache folder."""
    return cache_folder() / "models"


def convert(file: Path, folder: Path) -> Path:
    """Write ``folder`` (new or empty) from a GGUF file: safetensors, config, tokenizer.

    ``ValueError`` where the file is no whole GGUF, its family is not supported (said before
    weights are read), transformers cannot read it, or the folder holds something already.
    """
    file = _check_file(file)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} holds something already; name a new folder")
    config = _read(file, AutoConfig, "config")
    find_family(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        tokenizer = _read(file, AutoTokenizer, "tokenizer")
        loaded = _read(file, AutoModelForCausalLM, "weights", dtype=torch.float32)
        _save(loaded, config, work)
        tokenizer.save_pretrained(work)
        origin = {"file": file.name, "version": VERSION, "sha256": digest(file)}
        (work / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
        work.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def converted(name: str) -> Path:
    """The folder of a GGUF file's conversion in the user's cache, made when it is not there.

    Known by the file's path, size and time of change: reading gigabytes to know that nothing
    changed would take longer than loading.
    """
    file = _check_file(Path(name).expanduser())
    state = file.stat()
    key = f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{VERSION}"
    folder = models_folder() / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        print(f"converting {file.name} to {folder} (once)", file=sys.stderr)
        convert(file, folder)
    return folder


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save(loaded: Any, config: Any, folder: Path) -> None:
    """The weights in a fresh model of their own, which knows nothing of quantization."""
    config.dtype = torch.float32
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = loaded.state_dict()
    fresh.load_state_dict(state, assign=True, strict=False)
    fresh.tie_weights()
    lacking = [key for key, each in fresh.state_dict().items() if each.is_meta]
    if lacking:
        raise ValueError(f"the GGUF lacks the tensor {lacking[0]} (and {len(lacking) - 1} more)")
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)


def _check_file(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"GGUF file {str(file)!r} does not exist")
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise ValueError(f"{str(file)!r} is no GGUF file: it does not begin with 'GGUF'")
    return file


def _read(file: Path, loader: Any, what: str, **options: Any) -> Any:
    """Read a part of a GGUF with transformers, its many exceptions turned into one."""
    try:
        return loader.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    except Exception as error:
        _name_family(file, error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"transformers cannot read the {what} of {str(file)!r}: {reason} (is it whole?)"
        ) from error


def _name_family(file: Path, error: Exception) -> None:
    """Where transformers does not know the architecture, refuse it by its name."""
    found = str(error)
    if "architecture" in found and "not supported" in found:
        kind = found.split("architecture", 1)[1].split()[0].strip("'\"`.,")
        find_family(SimpleNamespace(model_type=kind))
