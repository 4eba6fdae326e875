"""GGUF files are converted once to folders of safetensors, so that all other code reads one format.

transformers reads and dequantizes a GGUF; weights (in float32, because dequantized values do not
fit in 16 bits), config, tokenizer, chat template and end ids are saved as it returns them, with
corrections (``gguf_mends.py``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)

from pyramidinfer.models.families import FAMILIES, find_family
from pyramidinfer.models.gguf_file import Header, read_header
from pyramidinfer.models.gguf_mends import mend_config, mend_ends, mend_tokenizer
from pyramidinfer.native.build import cache_folder

__all__ = [
    "SOURCE",
    "convert",
    "converted",
    "digest",
    "is_converted",
    "is_gguf",
    "models_folder",
    "source_file",
]

#: File in a converted folder that records its source.
ORIGIN = "converted_from.json"
#: The GGUF file next to its conversion (fetched), or a link to it.
SOURCE = "model.gguf"
#: Increase when the conversion changes: cached conversions are then made again.
VERSION = 2
#: GGUF's names of architectures → transformers' names; supported and unsupported ones.
READS = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
OTHERS = {
    "gptneox": "gpt_neox",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "granite": "granite",
    "opt": "opt",
}
PROBE = "The archive is in room 472.\n\n1. It's  here:\t«naïve» 日本 <|im_end|><end_of_turn>\n  2"


def is_gguf(name: str) -> bool:
    """Whether a model's name refers to a GGUF file."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def models_folder() -> Path:
    """The folder of fetched and converted models: ``models`` in the user's cache folder."""
    return cache_folder() / "models"


def is_converted(folder: Path) -> bool:
    """Whether a folder is a conversion by this version."""
    try:
        return bool(json.loads((folder / ORIGIN).read_text())["version"] == VERSION)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert(file: Path, folder: Path, replace: bool = False) -> Path:
    """Write ``folder`` (new or empty) from a GGUF file: safetensors, config, tokenizer.

    ``replace``: an existing folder is replaced.  The folder appears complete or not at all.
    ``ValueError`` if the file is not a complete GGUF, its family is not supported, it has unknown
    metadata (checked before weights are read), or the folder is not empty.
    """
    header = read_header(file)
    _check_reader()
    _check_family(header)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} holds something already; name a new folder")
    config = _read(file, AutoConfig, "config")
    mend_config(header, config)
    _check_count(header, config)
    work = _work_folder(folder)
    try:
        tokenizer = _read(file, AutoTokenizer, "tokenizer")
        mend_tokenizer(header, tokenizer)
        config.eos_token_id = mend_ends(header, tokenizer, config.eos_token_id)
        print(f"converting {file.name} to {folder}", file=sys.stderr)
        with _no_bar():
            loaded = _read(
                file, AutoModelForCausalLM, "weights", config=config, dtype=torch.float32
            )
        _save_model(loaded, config, work)
        _save_tokenizer(tokenizer, work)
        origin = {
            "file": file.name,
            "sha256": digest(file),
            "version": VERSION,
            "licence": header.metadata.get("general.license"),
        }
        (work / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
        _put(work, folder, replace)
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)
    return folder


def converted(name: str) -> Path:
    """The folder of a GGUF file's conversion in the user's cache, converted if needed.

    Identified by the file's path, size and modification time, because a checksum would take longer
    than loading.  The folder has the file's name, which servers show.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        raise ValueError(f"GGUF file {name!r} does not exist")
    state = file.stat()
    key = f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    folder = models_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:12] / file.stem
    if not is_converted(folder):
        try:
            convert(file, folder, replace=True)
        finally:
            with suppress(OSError):  # the folder is missing or not empty
                folder.parent.rmdir()
    link = folder / SOURCE
    if link.resolve() != file.resolve():
        with suppress(OSError):  # a read-only folder: weights="gguf" then reports it
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    return folder


def source_file(folder: Path) -> Path:
    """The GGUF file that a folder was made from; ``ValueError`` if it has none."""
    file = folder / SOURCE
    if file.is_file():
        return file
    if is_converted(folder) and folder.parent == models_folder():
        raise ValueError(
            f"weights='gguf': the GGUF file of {folder.name} is not here; run: pyramidinfer fetch "
            f"{folder.name}"
        )
    raise ValueError(
        f"weights='gguf': {str(folder)!r} was not made from an existing GGUF file; name the "
        f"file itself, or leave weights out"
    )


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_reader() -> None:
    """Refuse older versions of transformers, which make different tokenizers."""
    if importlib.util.find_spec("transformers.integrations.gguf") is None:
        raise ValueError(
            f"transformers {transformers.__version__} reads GGUF files differently; conversion "
            f"works with 5.24: pip install -U transformers"
        )


def _check_family(header: Header) -> None:
    kind = header.architecture
    if kind in OTHERS:
        read = ", ".join(FAMILIES[each].title for each in READS.values())
        raise ValueError(
            f"GGUF files of {FAMILIES[OTHERS[kind]].title} cannot be converted: transformers reads "
            f"those of {read}; use the model's safetensors instead"
        )
    find_family(SimpleNamespace(model_type=READS.get(kind, kind)))
    if kind not in READS:
        raise ValueError(f"GGUF files of {kind!r} cannot be converted")


def _check_count(header: Header, config: Any) -> None:
    """Check that the file and the model have the same number of weights.

    transformers drops tensors that have no place in its model (biases, experts).
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wanted = sum(each.numel() for each in empty.parameters())
    found = sum(each.count for name, each in header.tensors.items() if name != "rope_freqs.weight")
    if found != wanted:
        raise ValueError(
            f"{str(header.file)!r} holds {found} weights, the model that it describes has "
            f"{wanted}: it is not complete, or not a plain {find_family(config).title}"
        )


@contextmanager
def _no_bar() -> Iterator[None]:
    """Suppress the progress bar of transformers over a GGUF's tensors, which has no option."""
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def _work_folder(folder: Path) -> Path:
    """An empty temporary folder next to the final one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) / "model"
        work.mkdir()
    except OSError as error:
        raise ValueError(
            f"cannot store the model in {folder.parent} ({error.strerror}); the cache lies where "
            f"PYRAMIDINFER_CACHE says"
        ) from None
    return work


def _save_model(loaded: Any, config: Any, folder: Path) -> None:
    """The weights in a new model without quantization settings."""
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    fresh.tie_weights()
    lacking = [key for key, each in fresh.state_dict().items() if each.is_meta]
    if lacking:
        raise ValueError(f"the GGUF lacks the tensor {lacking[0]} (and {len(lacking) - 1} more)")
    fresh.generation_config = loaded.generation_config
    fresh.generation_config.eos_token_id = config.eos_token_id
    fresh.save_pretrained(folder)
    readable = (folder / "config.json").stat().st_mode  # safetensors' files are private
    for each in folder.glob("*.safetensors"):
        each.chmod(readable)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer, and check that it reads back the same."""
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    same = all(
        getattr(again, what) == getattr(tokenizer, what)
        for what in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template")
    )
    if not same or again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise ValueError("the saved tokenizer differs after reading it back; nothing was stored")


def _put(work: Path, folder: Path, replace: bool) -> None:
    """Move the finished folder to its place, unless another process was faster."""
    if replace and folder.exists() and not is_converted(folder):
        folder.rename(work.with_name("old"))
    try:
        work.rename(folder)
    except OSError:
        if not (replace and is_converted(folder)):
            raise ValueError(f"{str(folder)!r} holds something already") from None


def _read(file: Path, loader: Any, what: str, **options: Any) -> Any:
    """Read a part of a GGUF with transformers, its many exceptions converted to one."""
    try:
        return loader.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"cannot read the {what} of {str(file)!r}: {reason}") from error
