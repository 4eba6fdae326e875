"""Terminal functions of the chat: input lines with a history, answers wrapped at words."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import get_terminal_size
from typing import TextIO

from rich.cells import cell_len

from pyramidinfer.native.build import cache_folder

__all__ = ["HISTORY_VARIABLE", "Wrapped", "history", "history_file"]

#: Names the file for the history of input lines; empty: no history.
HISTORY_VARIABLE = "PYRAMIDINFER_CHAT_HISTORY"
LINES = 1000  # in the history
#: Control characters, which could move the cursor or change the terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def history_file() -> Path | None:
    """File of the history: ``$PYRAMIDINFER_CHAT_HISTORY``, else ``chat_history`` in the user's
    cache folder; None if that variable is empty."""
    own = os.environ.get(HISTORY_VARIABLE)
    if own is None:
        return cache_folder() / "chat_history"
    return Path(own).expanduser() if own else None


@contextmanager
def history() -> Iterator[None]:
    """In a terminal, let ``input`` edit its line and recall lines of this and earlier sessions; if
    the file cannot be read or written, print a line and go on without a history."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    try:
        import readline
    except ImportError:  # Python may be built without it
        yield
        return
    readline.clear_history()
    readline.set_history_length(LINES)
    file = history_file()
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # readable by the user only
            readline.read_history_file(file)
        except OSError as error:
            print(
                f"no history: {file}: {error.strerror}; {HISTORY_VARIABLE} names another file, or "
                f"none where it is empty",
                file=sys.stderr,
            )
            file = None
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                readline.write_history_file(file)


class Wrapped:
    """Writes a text while it is generated.

    In a terminal lines break between words, so a word appears when it is complete; fenced code is
    not wrapped, and control characters are removed.  Elsewhere the text is written unchanged.
    """

    def __init__(self, out: TextIO) -> None:
        self.out, self.is_terminal = out, out.isatty()
        self.word, self.gap, self.column = "", "", 0
        self.line, self.is_code = "", False  # the current line of the text, and whether it is code

    def write(self, text: str) -> None:
        """The next part of the text."""
        if not self.is_terminal:
            self.out.write(text)
        else:
            for letter in CONTROL.sub("", text):
                self._take(letter)
        self.out.flush()

    def end(self) -> None:
        """End of the text: write the rest of it, and end its line."""
        self._put()
        self.out.write("\n")
        self.out.flush()
        self.column, self.line, self.is_code = 0, "", False

    def _take(self, letter: str) -> None:
        if letter == "\n":
            self._put()
            self.out.write("\n")
            if self.line.lstrip().startswith("```"):
                self.is_code = not self.is_code
            self.gap, self.line, self.column = "", "", 0
            return
        self.line += letter
        if self.is_code or self.line.lstrip().startswith("```"):
            self.word += letter
            self._put()
        elif letter.isspace():
            self._put()
            self.gap += letter
        else:
            self.word += letter
            if cell_len(letter) > 1:  # scripts that may break at any character
                self._put()

    def _put(self) -> None:
        """Write the word, on a new line if it does not fit into this one."""
        if not self.word:
            return
        width = get_terminal_size().columns
        gap = self.gap.expandtabs(4)
        wide = len(gap) + cell_len(self.word)
        if self.column and not self.is_code and self.column + wide > width:
            self.out.write("\n")
            gap, self.column, wide = "", 0, cell_len(self.word)
        self.out.write(gap + self.word)
        self.column = (self.column + wide - 1) % width + 1
        self.word = self.gap = ""
