"""Compile the CPU kernels on first use, with the system's compiler, into a cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

__all__ = [
    "ISAS",
    "NoCompilerError",
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
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-w"]
TIMEOUT = 300  # seconds


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
    """Where built kernels lie: ``$PYRAMIDINFER_CACHE``, else under the user's cache folder."""
    if own := os.environ.get("PYRAMIDINFER_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyramidinfer"


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
    flags.  Raises ``NoCompilerError`` with the compiler's own words where it fails.
    """
    folder, compiler = Path(__file__).parent, find_compiler()
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
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
    for source in sources:
        key.update(source.read_bytes())
    target = cache_folder() / f"kernels-{isa}-{key.hexdigest()[:20]}.so"
    if not target.exists():
        _build(compiler, options, folder / "kernels.cpp", target)
    return target


def _build(compiler: str, options: list[str], source: Path, target: Path) -> None:
    """Compile beside the target, then rename: two processes may do it at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            built = Path(place) / target.name
            done = subprocess.run(
                [compiler, *options, str(source), "-o", str(built)],
                capture_output=True, text=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
            if done.returncode:
                raise NoCompilerError(
                    f"{compiler} could not build the CPU kernels: {done.stderr.strip()[:400]}"
                )
            built.replace(target)
    except subprocess.TimeoutExpired:
        raise NoCompilerError(f"{compiler} took more than {TIMEOUT} s over the kernels") from None
    except OSError as error:
        raise NoCompilerError(
            f"the built kernels cannot be kept in {target.parent} ({error.strerror}); set "
            f"PYRAMIDINFER_CACHE to a folder that can be written"
        ) from None
