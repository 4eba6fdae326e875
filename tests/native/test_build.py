"""Kernels are built once, on first use; where that cannot be done, a message says what to do."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyramidinfer.attention import select_backend
from pyramidinfer.native import NoCompilerError, build, library, why_not
from pyramidinfer.native.build import cache_folder, compile_kernels, find_compiler
from pyramidinfer.native.ship import ship
from tests.native.isas import backend

MADE = Path(compile_kernels()).read_bytes()  # a library that loads


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of the test's own, and nothing remembered before or after."""
    backend("native")
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path / "cache"))
    library.kernels.cache_clear()
    yield
    library.kernels.cache_clear()


def compiler(folder: Path, body: str = "", version: str = "echo fake 1") -> Path:
    """A script that notes each build in ``builds`` and, unless ``body`` says else, makes a
    library that loads."""
    (folder / "library").write_bytes(MADE)
    script = folder / "fake++"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --version) {version}; exit $?;; esac\n'
        f'echo "$@" >> "{folder}/builds"\n{body}\n'
        f'for last; do :; done; cp "{folder}/library" "$last"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def builds(folder: Path) -> list[str]:
    path = folder / "builds"
    return path.read_text().splitlines() if path.exists() else []


def test_a_second_time_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    first = compile_kernels("avx2")
    assert first.parent == cache_folder() == tmp_path / "cache"
    assert first.read_bytes()[: -build.MARK] == MADE
    assert [each.name for each in first.parent.iterdir()] == [first.name]  # nothing is left behind
    assert compile_kernels("avx2") == first
    assert len(builds(tmp_path)) == 1
    assert {"-mavx2", "-fopenmp", "-O3"} <= set(builds(tmp_path)[0].split())
    assert compile_kernels("portable") != first  # other options, another library
    assert len(builds(tmp_path)) == 2
    monkeypatch.setenv("CXX", str(compiler(tmp_path, version="echo fake 2")))
    assert compile_kernels("avx2") != first  # so does another compiler
    monkeypatch.setattr(build, "cpu_flags", lambda: "another CPU")
    assert len({compile_kernels("avx2"), first}) == 2
    assert len(builds(tmp_path)) == 4


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRAMIDINFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pyramidinfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pyramidinfer"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes over with a warning; asked for by name, the kernels are an error."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompilerError, match=r"no C\+\+ compiler was found \(g\+\+, clang\+\+"):
        find_compiler()
    reason = why_not()
    assert reason is not None and "apt install g++" in reason
    with pytest.warns(RuntimeWarning, match="slow attention in plain torch: no C.. compiler"):
        assert select_backend().name == "reference"
    with pytest.raises(ValueError, match="backend='cpu' does not work here: no C.. compiler"):
        select_backend("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("reference").name == "reference"


def test_cxx_names_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = compiler(tmp_path)
    monkeypatch.setenv("CXX", str(fake))
    assert find_compiler() == str(fake)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompilerError, match="CXX=no-such-compiler"):
        find_compiler()


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are shown, and nothing stays in the cache."""
    broken = compiler(tmp_path, body="echo 'error: unknown option -fopenmp' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NoCompilerError, match="could not build .*unknown option -fopenmp"):
        compile_kernels()
    assert list(cache_folder().iterdir()) == []
    with pytest.warns(RuntimeWarning, match="unknown option -fopenmp"):
        assert select_backend().name == "reference"
    monkeypatch.setenv("CXX", str(compiler(tmp_path, version="false")))
    with pytest.raises(NoCompilerError, match=r"the compiler .*fake\+\+ does not run"):
        compile_kernels()


def test_a_compiler_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, body="exec sleep 30")))
    monkeypatch.setattr(build, "TIMEOUT", 0.3)
    with pytest.raises(NoCompilerError, match="took more than"):
        compile_kernels()


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = compiler(tmp_path)
    (tmp_path / "library").write_text("no library")
    monkeypatch.setenv("CXX", str(fake))
    reason = why_not()
    assert reason is not None and "cannot be loaded" in reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(NoCompilerError, match="set PYRAMIDINFER_CACHE to a folder"):
        compile_kernels()


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NoCompilerError, match="set PYRAMIDINFER_CACHE to a folder"):
        compile_kernels()


def test_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One builds, all get a whole library; a reader never sees half of one."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path, body="sleep 0.3")))
    code = (
        "from pyramidinfer.native import kernels; from pyramidinfer.native.build import *;"
        "print(kernels().instructions, compile_kernels())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    (path,) = said.pop().split()[1:]
    assert Path(path).read_bytes()[: -build.MARK] == MADE
    assert len(builds(tmp_path)) == 1  # the others waited for the first
    assert [each.name for each in Path(path).parent.iterdir()] == [Path(path).name]


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty"])
def test_a_damaged_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Loading one that is cut short would end the process."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    made = compile_kernels()
    content = made.read_bytes()
    middle = len(content) // 2
    made.write_bytes(
        {
            "cut short": content[:middle],
            "empty": b"",
            "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[damage]
    )
    assert compile_kernels() == made and made.read_bytes() == content
    assert library.kernels().instructions


def test_a_library_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    made = compile_kernels()
    made.chmod(0o777)
    assert "can be written by everybody" in (why_not() or "")
    made.chmod(0o755)
    monkeypatch.setattr(build.os, "geteuid", lambda: made.stat().st_uid + 1)
    if made.stat().st_uid == 0:  # root may do what it likes in any case
        os.chown(made, 12345, 12345)
    with pytest.raises(NoCompilerError, match="belong to another user"):
        compile_kernels()
    with pytest.warns(RuntimeWarning, match="belong to another user"):
        assert select_backend().name == "reference"


def test_a_library_that_lacks_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    monkeypatch.setitem(library.SIGNATURES, "from_tomorrow", (None, []))
    with pytest.warns(RuntimeWarning, match="no function 'from_tomorrow'"):
        assert select_backend().name == "reference"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PYRAMIDINFER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    assert cache_folder() == tmp_path / f"pyramidinfer-{os.getuid()}"

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", nobody)
    assert cache_folder() == tmp_path / f"pyramidinfer-{os.getuid()}"
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    assert compile_kernels().parent == cache_folder()


def test_what_is_loaded_says_what_it_is() -> None:
    kernels = backend("native").kernels
    assert kernels.instructions in ("avx512", "avx2", "portable")
    with pytest.raises(AttributeError, match="no function 'multiply'"):
        kernels.multiply  # noqa: B018


def test_every_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that changes makes another library."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    sources = tmp_path / "native"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("*.py*"))
    monkeypatch.setattr(build, "__file__", str(sources / "build.py"))
    found = {compile_kernels()}
    for header in sources.glob("*.h"):
        header.write_text(header.read_text() + "\n// more\n")
        found.add(compile_kernels())
    assert len(found) == 1 + len(list(sources.glob("*.h")))


FLAGS = {
    "avx512-bf16": "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 sse2",
    "avx512-vnni": "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512vl avx512dq",
    "avx2": "avx2 fma f16c avx512f",
    "portable": "sse2 avx2",
}


def test_kernels_built_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one that the CPU can run is taken, with no compiler there."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    folder = tmp_path / "shipped"
    made = dict(zip(build.SHIPPED, ship(folder), strict=True))
    assert len(builds(tmp_path)) == len(made) == len(FLAGS)
    assert {"-mavx512bf16", "-mavx512vnni", "-mavx512f"} <= set(builds(tmp_path)[0].split())
    assert not [each for each in builds(tmp_path)[-1].split() if each.startswith("-m")]
    monkeypatch.setenv("PYRAMIDINFER_KERNELS", str(folder))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name, flags in FLAGS.items():
        monkeypatch.setattr(build, "cpu_flags", lambda flags=flags: flags)
        assert compile_kernels() == made[name]
    assert not cache_folder().exists()
    assert why_not() is None
    made["portable"].unlink()  # the last that was taken; it is loaded, so not written over
    made["portable"].write_bytes(b"torn")
    with pytest.raises(NoCompilerError, match="no-such-compiler"):
        compile_kernels()
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    assert compile_kernels().parent == cache_folder()


def test_other_machines_get_what_they_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (made,) = ship(tmp_path / "shipped")
    assert "portable" in made.name


def test_kernels_of_other_sources_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    (tmp_path / "kernels-portable-0123456789abcdef0123.so").write_bytes(MADE)
    monkeypatch.setenv("PYRAMIDINFER_KERNELS", str(tmp_path))
    assert compile_kernels().parent == cache_folder()
