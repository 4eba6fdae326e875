"""Compile the CPU kernels on first use, with the system's compiler, into a cache.

Where ``PYRAMIDINFER_KERNELS`` names a folder of libraries built ahead of time (``native/ship.py``),
the best of these that the CPU can run is taken instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "ISAS",
    "SHIPPED",
    "NoCompilerError",
    "build_for",
    "cache_folder",
    "compile_kernels",
    "cpu_flags",
    "find_compiler",
]

#: Instruction sets that can be asked for; ``native`` is all that this CPU has.
ISAS = {
    "native": ["-march=native"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}


class Kind(NamedTuple):
    """A kind of CPU to build for: the compiler's options, and flags that it must have."""

    options: list[str]
    needs: frozenset[str]


def _kind(isa: str, flags: str) -> Kind:
    """``flags`` as /proc/cpuinfo writes them; those that ``isa`` does not have become options."""
    more = [f"-m{flag.replace('_', '')}" for flag in flags.split() if flag.startswith("avx512_")]
    return Kind([*ISAS[isa], *more], frozenset(flags.split()))


_AVX512 = "avx512f avx512bw avx512vl avx512dq fma f16c"
#: What is built ahead of time, the best first: whatever the kernels make a difference for.
SHIPPED = {
    "avx512-bf16": _kind("avx512", f"{_AVX512} avx512_vnni avx512_bf16"),
    "avx512-vnni": _kind("avx512", f"{_AVX512} avx512_vnni"),
    "avx512": _kind("avx512", _AVX512),
    "avx2": _kind("avx2", "avx2 fma f16c"),
    "portable": _kind("portable", ""),
}
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-w"]
TIMEOUT = 300  # seconds
MARK = 32  # bytes of the checksum behind a library


class NoCompilerError(RuntimeError):
    """The kernels cannot be built here; the message says why and what to do."""


def find_compiler() -> str:
    """``$CXX``, or the first of g++, clang++ and c++ on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if name and (found := shutil.which(name)):
            return found
    raise NoCompilerError(
        f"no C++ compiler was found ({'CXX=' + wanted if wanted else 'g++, clang++, c++'}): "
        f"install one (Debian, Ubuntu: apt install g++) or set CXX to its path"
    )


def cache_folder() -> Path:
    """Where built kernels lie: ``$PYRAMIDINFER_CACHE``, else under the user's cache folder, or in
    the system's folder for temporary files where the user has no home."""
    if own := os.environ.get("PYRAMIDINFER_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pyramidinfer"
    try:
        home = Path.home()
    except RuntimeError:  # a user id that nobody has given a name
        home = Path(os.devnull)
    if home.is_dir():
        return home / ".cache" / "pyramidinfer"
    return Path(tempfile.gettempdir()) / f"pyramidinfer-{os.getuid()}"


@lru_cache(maxsize=1)
def cpu_flags() -> str:
    """What the CPU says it can do (one line; the machine's name where that is not told)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def compile_kernels(isa: str = "native") -> Path:
    """The shared library for an instruction set, built unless the cache has it.

    The cache goes by a hash of the sources, the compiler's version, the options and the CPU's
    flags.  Raises ``NoCompilerError`` with the compiler's own words where it fails.  ``native`` is
    taken from ``PYRAMIDINFER_KERNELS`` where that has what this CPU can run.
    """
    if isa == "native" and (found := _shipped()) is not None:
        _check_owner(found)
        return found
    compiler = find_compiler()
    options = [*FLAGS, *ISAS[isa]]
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompilerError(f"the compiler {compiler} does not run: {error}") from None
    key = hashlib.sha256()
    for part in [version, *options, cpu_flags()]:
        key.update(part.encode() + b"\0")
    _add_sources(key)
    target = cache_folder() / f"kernels-{isa}-{key.hexdigest()[:20]}.so"
    if not _is_whole(target):
        try:
            with _alone(target):
                if not _is_whole(target):  # another process may have built it meanwhile
                    _build(compiler, options, target)
        except OSError as error:
            raise NoCompilerError(
                f"the built kernels cannot be kept in {target.parent} ({error.strerror}); set "
                f"PYRAMIDINFER_CACHE to a folder that can be written"
            ) from None
    _check_owner(target)
    return target


def build_for(name: str, folder: Path) -> Path:
    """The library for a kind of CPU of ``SHIPPED``, built into ``folder``."""
    target = _place(name, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _build(find_compiler(), [*FLAGS, *SHIPPED[name].options], target)
    return target


def _shipped() -> Path | None:
    """The best library that was built ahead of time, of these sources; None where there is none."""
    folder = os.environ.get("PYRAMIDINFER_KERNELS")
    if not folder:
        return None
    has = set(cpu_flags().split())
    places = (_place(name, Path(folder)) for name, kind in SHIPPED.items() if kind.needs <= has)
    return next((place for place in places if _is_whole(place)), None)


def _place(name: str, folder: Path) -> Path:
    key = hashlib.sha256()
    _add_sources(key)
    return folder / f"kernels-{name}-{key.hexdigest()[:20]}.so"


def _add_sources(key: hashlib._Hash) -> None:
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]):
        key.update(source.read_bytes())


def _is_whole(library: Path) -> bool:
    """Whether the library is there, and ends with the checksum of all that is before."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    body, mark = content[:-MARK], content[-MARK:]
    return bool(body) and hashlib.sha256(body).digest() == mark


def _check_owner(library: Path) -> None:
    """``NoCompilerError`` where somebody else could have put the library there."""
    found = library.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise NoCompilerError(
            f"the built kernels {library} belong to another user (id {found.st_uid}) and are not "
            f"loaded; set PYRAMIDINFER_CACHE to a folder of your own"
        )
    if found.st_mode & stat.S_IWOTH:
        raise NoCompilerError(
            f"the built kernels {library} can be written by everybody and are not loaded: delete "
            f"them, or set PYRAMIDINFER_CACHE to a folder of your own"
        )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time; who ends, however, makes way for the next."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _build(compiler: str, options: list[str], target: Path) -> None:
    """Compile beside the target, then rename."""
    source = Path(__file__).parent / "kernels.cpp"
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            built = Path(place) / target.name
            done = subprocess.run(
                [compiler, *options, str(source), "-o", str(built)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            if done.returncode:
                raise NoCompilerError(
                    f"{compiler} could not build the CPU kernels: {done.stderr.strip()[:400]}"
                )
            content = built.read_bytes()
            with built.open("ab") as file:
                file.write(hashlib.sha256(content).digest())
                file.flush()
                os.fsync(file.fileno())
            built.chmod(0o755)
            built.replace(target)
    except subprocess.TimeoutExpired:
        raise NoCompilerError(f"{compiler} took more than {TIMEOUT} s over the kernels") from None
