"""Options: dataclass fields with a help text and bounds, each declared once.

    page_size: Annotated[int, Option("Tokens in a page.", check=at_least(1))] = 16

The command line (``cli/fields.py``), the table in ``docs/serving.md`` and the checks of values are
generated from these fields.  Nothing here imports torch, so ``--help`` is fast.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

__all__ = [
    "Field",
    "Option",
    "Pick",
    "at_least",
    "check_choice",
    "check_options",
    "check_share",
    "check_whole",
    "hint",
    "is_number",
    "json_object",
    "named_options",
    "nearest",
    "one_of",
    "option_fields",
    "parse_bytes",
    "parse_size",
    "parse_words",
    "pick",
    "positive",
    "show_bytes",
]

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}
#: Raises ``ValueError`` that names the option if a value is invalid.
Check = Callable[[str, object], None]


@dataclass(frozen=True, slots=True)
class Option:
    """Declares a dataclass field as an option.

    help : the text for ``--help`` and the docs; ends with a full stop.
    unset : the meaning of None or of an empty text, in a few words.
    panel : the heading in ``--help`` under which it is listed.
    flags : its flags, if they differ from ``--field-name``.
    check : checks a value that is not None; for a tuple, each of its elements.
    parse : converts (option, text) to a value, if the field's type does not define how.
    show : converts the default to a text that ``parse`` accepts.
    repeat : the elements of a tuple are given by repeating the option; otherwise as ``A,B``.
    inverted : the flag switches the field off.
    positional : the value may also be given without a flag, before all options.
    callback : called with typer's context and the value before other options are read.
    see : the page or section of ``docs/`` with more information.
    """

    help: str
    unset: str = ""
    panel: str | None = None
    flags: tuple[str, ...] = ()
    check: Check | None = None
    parse: Callable[[str, str], Any] | None = None
    show: Callable[[Any], str] = str
    repeat: bool = False
    inverted: bool = False
    positional: bool = False
    callback: Callable[[Any, Any], Any] | None = None
    see: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """A field that is an option: its name in the dataclass, its type and its default."""

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """``("--page-size",)``; messages use the first one."""
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)


@dataclass(frozen=True, slots=True)
class Pick:
    """Selects the fields of a dataclass that are options of a command: ``names`` (all if empty),
    except those in ``without``.  ``values`` replaces the dataclass's values: as defaults of the
    selected fields, and as fixed values of the others."""

    names: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        """Whether a field is an option."""
        return name not in self.without and (not self.names or name in self.names)


def pick(*names: str, without: tuple[str, ...] = (), **values: Any) -> Pick:
    """``Annotated[Kind, pick("a", b=1)]``: field ``a`` of ``Kind`` is an option, ``b`` is fixed."""
    return Pick(names, without, values)


@functools.cache
def option_fields(kind: type) -> dict[str, Field]:
    """The fields of a dataclass that are options, in order, by name."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for each in fields(kind):
        hint = hints[each.name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if option is not None:
            default = each.default
            if each.default_factory is not MISSING:
                default = each.default_factory()
            found[each.name] = Field(each.name, get_args(hint)[0], default, option)
    return found


def check_options(values: Any, *, as_flags: bool = False) -> None:
    """Raise ``ValueError`` for the first field whose ``check`` refuses its value.

    as_flags : the message uses the name on the command line, ``--page-size``.
    """
    kind: Any = type(values)
    for name, found in option_fields(kind).items():
        value, check = getattr(values, name), found.option.check
        if check is None or value is None:
            continue
        flag = found.flags[0]
        for each in value if isinstance(value, tuple) else (value,):
            if not as_flags:
                check(name, each)
                continue
            try:
                check(flag, each)
            except ValueError as error:  # the name as the user typed it
                told = str(error).replace(f"{flag}=", f"{flag} ", 1)
                raise ValueError(told.replace("a whole number of at", "at")) from None


# --- checks and texts -----------------------------------------------------------------------------


def hint(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: ``"; did you mean 'x'?"``, or empty if no choice is near."""
    close = difflib.get_close_matches(name, sorted(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: ``"did you mean 'x'?"``, if one is near, and the choices."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = f"choices: {', '.join(options)}"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, and neither a bool nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_share(name: str, value: object, *, least: float = 0.0) -> None:
    """Raise ``ValueError`` unless ``least`` <= value <= 1."""
    if not (is_number(value) and least <= value <= 1):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must lie between {least:g} and 1")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless the value is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def positive(name: str, value: object) -> None:
    """Raise ``ValueError`` unless the value is a time above 0 seconds."""
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be above 0 seconds")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest choice unless ``value`` is one of ``choices``."""
    options = list(choices)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}={value!r} is unknown; {nearest(str(value), options)}")


def at_least(least: int) -> Check:
    """A check for an option: a whole number of at least ``least``."""
    return functools.partial(check_whole, least=least)


def one_of(choices: Iterable[str]) -> Check:
    """A check for an option: one of these names."""
    return functools.partial(check_choice, choices=tuple(choices))


def json_object(name: str, text: str) -> dict[str, Any]:
    """Parse a JSON object; ``ValueError`` if the text is not valid JSON or not an object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {text!r:.60} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} {text!r:.60} is not a JSON object")
    return found


T = TypeVar("T")


def named_options(kind: type[T]) -> type[T]:
    """Decorate a dataclass: an unknown option raises ``ValueError`` with the nearest name."""
    build = kind.__init__
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]

    @functools.wraps(build)
    def init(self: T, *values: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                raise ValueError(f"{kind.__name__} has no option {name!r}; {nearest(name, known)}")
        build(self, *values, **options)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def parse_bytes(value: int | str, name: str = "kv_memory") -> int:
    """Convert ``2147483648``, ``"2GiB"``, ``"512 MiB"`` or ``"1.5GB"`` to bytes."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{name}={value!r}: give bytes, or a text such as '2GiB'")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {unit.lower(): size for unit, size in UNITS.items()}
        if not match or match[2].lower() not in units:
            raise ValueError(
                f"{name}={value!r} is not a size: write bytes or a number with a unit, '2GiB'"
            )
        size = units[match[2].lower()]
        value = int(float(match[1]) * size) if "." in match[1] else int(match[1]) * size
    if value <= 0:
        raise ValueError(f"{name}={value} must be above 0 bytes")
    if value > 2**60:
        raise ValueError(f"{name}={value!s:.20} … is more than any machine has")
    return value


def parse_size(name: str, text: str) -> int:
    """``parse_bytes`` for an option's ``parse``."""
    return parse_bytes(text, name)


def show_bytes(size: int) -> str:
    """``4194304`` → ``"4MiB"``: in the largest unit that gives a whole number."""
    power = next(power for power in range(4, -1, -1) if size % 1024**power == 0)
    return f"{size // 1024**power}{('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def parse_words(text: str) -> tuple[str, ...]:
    """``"a,b"`` or ``"a b"`` → names."""
    return tuple(text.replace(",", " ").split())
