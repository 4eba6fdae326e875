"""What the scripts share: ``python SCRIPT.py URL MODEL`` runs one client's checks, and prints JSON
as its last line."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

QUESTION = "What is 12 plus 30? Use the tool."
GREETING = "Say hello to Ada in one short sentence."
PERSON = "Ada Holt is 36 years old. Give her name and age."
#: Tokens that an answer may have.
SHORT = 80

#: Takes the server's ``/v1`` address and the model's name; returns a few words on what came.
Check = Callable[[str, str], str]


class Calls:
    """The tool of all clients, and the calls that it got."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def add(self, a: int, b: int) -> int:
        """Add two whole numbers.

        Args:
            a: the first number
            b: the second number
        """
        self.made.append((a, b))
        return a + b

    def words(self) -> str:
        """The calls in words; ``AssertionError`` if there is none."""
        assert self.made, "the tool was not called"
        assert all(type(number) is int for pair in self.made for number in pair)
        return ", ".join(f"add({a}, {b})" for a, b in self.made)


def expect(text: Any) -> str:
    """A text that is not empty, shortened."""
    assert isinstance(text, str) and text.strip(), f"no text: {text!r}"
    return " ".join(text.split())[:60]


def main(package: str, checks: dict[str, Check]) -> None:
    """Run the checks of a client, which is this package, and print what came of them."""
    url, model = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        begun = time.monotonic()
        try:
            found[name] = {"passed": True, "said": check(url, model)}
        except Exception as error:  # the report says which, and the others go on
            traceback.print_exc()
            found[name] = {"passed": False, "said": f"{type(error).__name__}: {error}"[:500]}
        print(f"{package}: {name} {time.monotonic() - begun:.1f} s", file=sys.stderr)
    told = {"client": package, "version": metadata.version(package), "checks": found}
    print("\n" + json.dumps(told))
