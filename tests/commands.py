"""The command line in processes of their own that begin quickly.

Importing takes seconds, so it is done once, in a process that forks: what runs in a fork is
``main()`` with its own arguments, environment, standard files and signals.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

PRELOADED = [
    "tests.commands",
    "pyramidinfer.cli.app",
    "pyramidinfer.cli.batch",
    "pyramidinfer.cli.chat",
    "pyramidinfer.server.run",
    "transformers.models.llama.modeling_llama",
]


class Command:
    """A running ``pyramidinfer ARGUMENTS``; ``out`` and ``err`` are what it wrote so far."""

    def __init__(
        self, folder: Path, arguments: tuple[str, ...], text: str, environment: Mapping[str, str]
    ) -> None:
        self.files = [folder / name for name in ("in", "out", "err")]
        self.files[0].write_text(text)
        for file in self.files[1:]:
            file.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process: Any = context.Process(
            target=_run, args=(arguments, [str(file) for file in self.files], dict(environment))
        )
        self.process.start()
        self.pid = int(self.process.pid)

    @property
    def out(self) -> str:
        return self.files[1].read_text()

    @property
    def err(self) -> str:
        return self.files[2].read_text()

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code (negative: the signal that ended it)."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs: {self.err}"
        return int(self.process.exitcode)

    def says(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        """Wait until standard error has it."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.err)) is None:
            assert self.process.is_alive(), f"it ended: {self.err}"
            assert time.monotonic() < end, f"it said: {self.err}"
            time.sleep(0.01)
        return found

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


@contextmanager
def command(*arguments: str, text: str = "", **environment: str) -> Iterator[Command]:
    """Begin a command; at the end it is killed if it still runs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the process that forks begins
    with TemporaryDirectory() as folder:
        begun = Command(Path(folder), arguments, text, environment)
        try:
            yield begun
        finally:
            begun.close()


def run(*arguments: str, text: str = "", **environment: str) -> tuple[int, str, str]:
    """A command's exit code, and what it wrote to its two files."""
    with command(*arguments, text=text, **environment) as done:
        return done.wait(), done.out, done.err


def run_done(*arguments: str, text: str = "", **environment: str) -> CompletedProcess[str]:
    """``run``, its result as ``subprocess.run`` has it."""
    return CompletedProcess(arguments, *run(*arguments, text=text, **environment))


#: Each command in a fork, from before anything of the package was imported.
WITHOUT = """
import os, sys
names, *commands = sys.argv[1:]
sys.modules.update(dict.fromkeys(names.split(",")))
import torch, transformers
for number, words in enumerate(commands):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"err{number}", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[:] = ["pyramidinfer", *words.split()]
        from pyramidinfer.cli.app import main
        main()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def each_without(missing: list[str], commands: list[str], folder: Path) -> list[tuple[int, str]]:
    """Every command's exit code and its standard error where some packages are not installed."""
    words = [sys.executable, "-c", WITHOUT, ",".join(missing), *commands]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=folder, check=True)
    codes = map(int, done.stdout.split())
    return [(code, (folder / f"err{i}").read_text()) for i, code in enumerate(codes)]


class Terminal:
    """A command in a terminal of its own, ``columns`` wide; ``screen``: all that it wrote so far,
    with its escape sequences left out."""

    def __init__(
        self, arguments: tuple[str, ...], columns: int, environment: Mapping[str, str]
    ) -> None:
        self.line, self.end = os.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        files = [os.ttyname(self.end)] * 3
        values = {"COLUMNS": str(columns), "TERM": "xterm", **environment}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process: Any = context.Process(target=_run, args=(arguments, files, values))
        self.process.start()
        self.written = b""

    @property
    def screen(self) -> str:
        while select.select([self.line], [], [], 0)[0]:
            try:
                self.written += os.read(self.line, 65536)
            except OSError:  # it has ended
                break
        text = self.written.decode(errors="replace").replace("\r\n", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

    def says(self, pattern: str, begin: int = 0, seconds: float = 60.0) -> int:
        """Wait for it, after ``begin``; where it ends."""
        stop = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.screen, begin)) is None:
            assert self.process.is_alive(), f"it ended: {self.screen}"
            assert time.monotonic() < stop, f"it said: {self.screen}"
            time.sleep(0.01)
        return found.end()

    def type(self, text: str) -> None:
        os.write(self.line, text.encode())

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code."""
        stop = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < stop:
            self.process.join(0.02)
            assert self.screen is not None  # what nobody reads would stop it
        assert self.process.exitcode is not None, f"it still runs: {self.screen}"
        return int(self.process.exitcode)


@contextmanager
def terminal(*arguments: str, columns: int = 60, **environment: str) -> Iterator[Terminal]:
    """Begin a command in a terminal; at the end it is killed if it still runs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the process that forks begins
    begun = Terminal(arguments, columns, environment)
    try:
        yield begun
    finally:
        if begun.process.is_alive():
            begun.process.kill()
        begun.process.join()
        begun.process.close()
        os.close(begun.line)
        os.close(begun.end)


def _run(arguments: tuple[str, ...], files: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    # of a terminal the first one makes it this process's own
    for number, (file, mode) in enumerate(
        zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)
    ):
        handle = os.open(file, mode)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.update({"COLUMNS": "100", **environment})
    sys.argv = ["pyramidinfer", *arguments]
    from pyramidinfer.cli.app import main

    main()
