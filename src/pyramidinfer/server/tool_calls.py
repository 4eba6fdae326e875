"""Parse tool calls while an answer is generated; match calls with their results."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyramidinfer.server.protocol import Message
from pyramidinfer.server.thinking import ThinkReader, partly
from pyramidinfer.server.tool_formats import ToolFormat

__all__ = ["AnswerReader", "Piece", "ToolReader", "check_calls"]

#: The usual beginning of a call, up to its arguments.
HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
#: Token that models with Llama 3's format may write before a call.
PYTHON_TAG = "<|python_tag|>"


class Piece(NamedTuple):
    """A part of an answer: text, reasoning, or of a call (its index from 0) its name, once, and
    arguments."""

    text: str = ""
    call: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""
    thought: str = ""

    @property
    def delta(self) -> dict[str, Any]:
        """The call in the format of OpenAI's chunks."""
        if not self.name:
            return {"index": self.call, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.call, "id": self.id, "type": "function", "function": function}


class Braces:
    """Finds the end of a JSON object in an incomplete text."""

    def __init__(self, depth: int = 0) -> None:
        self.depth, self.in_text, self.escaped = depth, False, False

    def read(self, text: str) -> int | None:
        """Index after the end of the object in this text; None if the object continues."""
        for at, letter in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_text:
                self.in_text, self.escaped = letter != '"', letter == "\\"
            elif letter == '"':
                self.in_text = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return at + 1
        return None


class ToolReader:
    """Splits one answer into text and calls.

    ``names``: names of the functions.  In a format without a mark, only calls of these count (in
    others, the client should see that the model called an unknown function).  ``several``: more
    calls may follow the first one; otherwise they are dropped.  Text after a mark that is not a
    call stays text.  White space between text and calls is dropped.
    """

    def __init__(self, format: ToolFormat, names: Sequence[str], several: bool) -> None:
        self.format, self.names, self.several = format, frozenset(names), several
        self.calls = 0
        self._rest = ""
        self._step = self._text if format.mark else self._beginning
        self._braces = Braces()
        self._said = False  # whether there was text since the last call
        self._mark = ""  # as written, in case no call follows

    def feed(self, text: str, last: bool = False) -> list[Piece]:
        """The new parts of the answer; ``last``: the answer ends here."""
        self._rest += text
        pieces: list[Piece] = []
        while True:
            before = (self._step, len(self._rest))
            piece = self._step(last)
            if piece is not None:
                pieces.append(piece)
            if before == (self._step, len(self._rest)):
                return pieces

    # --- steps: each reads what it can from the rest, and sets the next step ------------------

    def _beginning(self, last: bool) -> Piece | None:
        """The beginning of an answer in a format without a mark."""
        text = self._rest.lstrip()
        if not text or (PYTHON_TAG.startswith(text) and not last):
            return self._out(self._rest) if last else None
        begun = text.removeprefix(PYTHON_TAG)
        if begun.lstrip()[:1] == "{" or (not begun.strip() and not last):
            cut = len(self._rest) - len(begun)
            self._mark, self._rest = self._rest[:cut], begun
            self._step = self._call
        else:
            self._step = self._text
        return None

    def _text(self, last: bool) -> Piece | None:
        mark = self.format.mark
        at = self._rest.find(mark) if mark else -1
        if at >= 0:
            said, rest = self._rest[:at], self._rest[at + len(mark) :]
            space = len(said) - len(said.rstrip())
            self._mark, self._rest = said[len(said) - space :] + mark, rest
            self._step = self._call
            return self._out(said[: len(said) - space], take=False)
        if last:
            held = 0
        else:
            held = partly(self._rest, mark)
            free = self._rest[: len(self._rest) - held]
            held += len(free) - len(free.rstrip())
        return self._out(self._rest[: len(self._rest) - held])

    def _call(self, last: bool) -> Piece | None:
        """The beginning of a call, with the list's bracket if the format has one."""
        opening = self.format.begin[len(self.format.mark) :].strip()
        text = self._rest.lstrip()
        if self._mark and opening and text.startswith(opening):
            self._mark += self._rest[: len(self._rest) - len(text)] + opening
            self._rest = text = text[len(opening) :].lstrip()
        if found := HEAD.match(self._rest):
            name = self._name(found[1])
            if name is None:
                return self._no_call()
            self._rest = self._rest[found.end() :]
            self._braces, self._step = Braces(), self._arguments
            return self._begin(name)
        if text[:1] not in ("{", "") or (last and not self._whole()):
            return self._no_call()
        whole = self._whole()
        if whole is None:
            return None
        call = _read(self._rest[:whole])
        name = self._name(json.dumps(call[0])) if call else None
        if call is None or name is None:
            return self._no_call()
        self._rest = self._rest[whole:]
        self._step = self._after
        return self._begin(name, call[1])

    def _arguments(self, last: bool) -> Piece | None:
        end = self._braces.read(self._rest)
        if end is None:
            text, self._rest = self._rest, ""
        else:
            text, self._rest = self._rest[:end], self._rest[end:]
            self._braces, self._step = Braces(depth=1), self._ending
        return self._more(text) if text else None

    def _ending(self, last: bool) -> Piece | None:
        """From the end of the arguments to the end of the call."""
        end = self._braces.read(self._rest)
        self._rest = "" if end is None else self._rest[end:]
        if end is not None:
            self._step = self._after
        return None

    def _after(self, last: bool) -> Piece | None:
        """After a call: another call, or the end of the calls."""
        if not self.several:
            self._step = self._nothing
            return None
        mark, between = self.format.mark, self.format.between.strip()
        closing = self.format.end.strip()
        text = self._rest.lstrip()
        self._mark, self._said = "", False
        if mark and mark in between:  # each call has its own closing mark
            if text.startswith(closing):
                self._rest, self._step = text[len(closing) :], self._text
            elif text and (last or not closing.startswith(text)):
                self._step = self._text
        elif text.startswith(between):
            self._rest, self._step = text[len(between) :], self._call
        elif closing and text.startswith(closing):
            self._rest, self._step = text[len(closing) :], self._text
        elif text:
            self._step = self._text
        return None

    def _nothing(self, last: bool) -> None:
        self._rest = ""

    # --- parts --------------------------------------------------------------------------------

    def _out(self, text: str, take: bool = True) -> Piece | None:
        if take:
            self._rest = self._rest[len(text) :]
        if self.calls and not self._said:
            text = text.lstrip()
        self._said = self._said or bool(text)
        return Piece(text) if text else None

    def _no_call(self) -> Piece | None:
        """Text that looked like a call, but is not one."""
        text, self._mark = self._mark, ""
        self._step = self._text
        if not self.format.mark:
            text, self._rest = text + self._rest, ""
        return self._out(text, take=False)

    def _name(self, shown: str) -> str | None:
        """A call's name, from JSON; None if it is not a valid name."""
        try:
            name = json.loads(shown, strict=False)
        except ValueError:
            return None
        known = bool(self.format.mark) or name in self.names
        return name if isinstance(name, str) and name and known else None

    def _whole(self) -> int | None:
        """Index after the end of the object that begins here."""
        return Braces().read(self._rest) if self._rest.strip() else None

    def _begin(self, name: str, arguments: str = "") -> Piece:
        id = uuid.uuid4().hex
        id = f"call_{id[:24]}" if self.format.id_length is None else id[: self.format.id_length]
        self.calls += 1
        return Piece("", self.calls - 1, id, name, arguments)

    def _more(self, arguments: str) -> Piece:
        return Piece("", self.calls - 1, arguments=arguments)


class AnswerReader:
    """Splits one answer into reasoning, text and calls; without a parser for one of these, it is
    text."""

    def __init__(self, thoughts: ThinkReader | None, calls: ToolReader | None) -> None:
        self.thoughts, self.calls = thoughts, calls

    def feed(self, text: str, last: bool = False) -> list[Piece]:
        """The new parts of the answer; ``last``: the answer ends here."""
        thought = ""
        if self.thoughts is not None:
            thought, text = self.thoughts.feed(text, last)
        pieces = [Piece(thought=thought)] if thought else []
        if self.calls is not None:
            return [*pieces, *self.calls.feed(text, last)]
        return [*pieces, Piece(text)] if text else pieces

    @property
    def has_called(self) -> bool:
        return self.calls is not None and self.calls.calls > 0


def _read(text: str) -> tuple[Any, str] | None:
    """The name and the arguments (JSON) of a call with its parts in any order."""
    try:
        call = json.loads(text, strict=False)
        name = call["name"]
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def check_calls(messages: Sequence[Message], whole: bool = True) -> None:
    """``ValueError`` for a result without a call, and for a call without a result; ``whole``: the
    last calls also need results."""
    open_calls: dict[str, str] = {}
    asked = -1
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if message.role == "tool":
            name = open_calls.pop(message.tool_call_id or "", None)
            if name is None:
                left = ", ".join(map(repr, open_calls)) or "none is open"
                raise ValueError(
                    f"{place}: tool_call_id={message.tool_call_id!r:.60} is not that of a call in "
                    f"the assistant's message before it that waits for its result ({left:.200})"
                )
            if message.name not in (None, name):
                raise ValueError(f"{place}.name: {message.name!r:.60}, but its call is of {name!r}")
            continue
        _all_answered(open_calls, asked)
        for call in message.tool_calls or ():
            if call.id in open_calls:
                raise ValueError(f"{place}.tool_calls: id {call.id!r:.60} is there twice")
            open_calls[call.id] = call.function.name
        asked = index
    if whole:
        _all_answered(open_calls, asked)


def _all_answered(open_calls: dict[str, str], asked: int) -> None:
    if open_calls:
        raise ValueError(
            f"messages[{asked}].tool_calls: no message of role 'tool' follows with the result of "
            f"{', '.join(map(repr, open_calls)):.200}"
        )
