"""Commands whose options are the fields of dataclasses (``options.Option``).

    @command(app)
    def throughput(plan: ThroughputPlan) -> None: ...

has an option for every field of ``ThroughputPlan`` that is annotated as one, and for those of the
dataclasses among its fields; the function is called with the filled plan.
``Annotated[EngineConfig, pick("kv_dtype", kv_memory="2GiB")]`` selects one field, and gives another
field a new default.  Other parameters are passed to typer.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from pyramidinfer.cli.common import plain_errors
from pyramidinfer.cli.environment import check_variables, register, variable
from pyramidinfer.options import Field, Pick, option_fields, parse_words

__all__ = ["command", "options_of"]

KEYWORD = inspect.Parameter.KEYWORD_ONLY
#: Types that typer parses itself; the first of them in a union counts.
PLAIN = (bool, Path, float, str, int)


def command(
    app: typer.Typer, name: str | None = None, *, variables: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    variables : every option may also be given as an environment variable ``PYRAMIDINFER_OPTION``.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name or function.__name__)(plain_errors()(_from_fields(function, variables)))
        return function

    return add


def options_of(function: Callable[..., None]) -> Iterator[tuple[Field, str]]:
    """The options of a command with their defaults in words, for a page."""
    for hint in get_type_hints(function, include_extras=True).values():
        kind, chosen = _dataclass_of(hint)
        if kind is not None:
            for each, default in _options(kind, chosen):
                yield each, _in_words(each, default)


def _in_words(field: Field, default: Any) -> str:
    kind, plain = _plain(field, default)
    if kind is bool:
        return "on" if plain else "off"
    return (field.option.unset or "none") if plain in (None, "") else f"`{plain}`"


def _from_fields(function: Callable[..., None], variables: bool) -> Callable[..., None]:
    """The function that typer sees instead: one parameter for each option."""
    parameters = [inspect.Parameter("typer_context", KEYWORD, annotation=typer.Context)]
    builders, own = {}, []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, chosen = _dataclass_of(parameter.annotation)
        if kind is None:
            own.append(parameter.name)
            parameters.append(parameter.replace(kind=KEYWORD))
        else:
            builders[parameter.name] = kind, chosen
            for each, default in _options(kind, chosen):
                parameters += _parameters(each, default, variables)
    names = [each.name for each in parameters]
    assert len(set(names)) == len(names), f"{function.__name__} has an option twice: {names}"

    def run(*, typer_context: typer.Context, **given: Any) -> None:
        if variables:
            check_variables()
        made = {name: _build(*each, typer_context, given) for name, each in builders.items()}
        function(**made, **{name: given[name] for name in own})

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _dataclass_of(hint: Any) -> tuple[Any, Pick]:
    """The dataclass that a type hint names, and the selected fields; None for other types."""
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)  # type: ignore[assignment]
    chosen = next((each for each in extras if isinstance(each, Pick)), Pick())
    return (hint if is_dataclass(hint) else None), chosen


def _options(kind: Any, chosen: Pick) -> Iterator[tuple[Field, Any]]:
    """Every option with its default, including those of dataclasses among the fields."""
    known = option_fields(kind)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, inner_pick = _dataclass_of(hint)
        if inner is not None:
            yield from _options(inner, inner_pick)
        elif name in known and chosen.takes(name):
            yield known[name], chosen.values.get(name, known[name].default)


def _build(kind: Any, chosen: Pick, context: typer.Context, given: Mapping[str, Any]) -> Any:
    """The dataclass, filled with the given values."""
    values, known = dict(chosen.values), option_fields(kind)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, inner_pick = _dataclass_of(hint)
        if inner is not None:
            values[name] = _build(inner, inner_pick, context, given)
        elif name in known and chosen.takes(name) and _name(known[name]) in given:
            usual = chosen.values.get(name, known[name].default)
            values[name] = _value(known[name], usual, context, given)
    return kind(**values)


def _name(field: Field) -> str:
    """The option's name in typer: ``--max-body`` is ``max_body``."""
    return field.flags[0].removeprefix("--").replace("-", "_")


def _value(field: Field, usual: Any, context: typer.Context, given: Mapping[str, Any]) -> Any:
    """Convert a value parsed by typer to that of the dataclass."""
    name, option = _name(field), field.option
    value = given[name]
    if option.positional:
        value = _one_of_both(name, value, given[f"{name}_option"], context)
    if option.inverted:
        return not value
    if option.repeat:
        return tuple(value or ())
    if option.parse is not None and isinstance(value, str):
        return option.parse(field.flags[0], value)
    if value is None:
        return usual
    kind = _tuple_of(field.kind)
    return value if kind is None else _elements(field.flags[0], value, kind)


def _one_of_both(name: str, alone: Any, named: Any, context: typer.Context) -> Any:
    """A positional value overrides one of the environment or a file."""
    source = context.get_parameter_source(f"{name}_option")
    if None not in (alone, named) and alone != named and source and source.name == "COMMANDLINE":
        raise ValueError(f"two {name}s are given, {alone!r} and --{name} {named!r}; leave one out")
    return named if alone is None else alone


def _tuple_of(kind: Any) -> type | None:
    """``int`` for ``tuple[int, ...]`` and ``tuple[int, ...] | None``; None for another type."""
    found = next((each for each in _members(kind) if get_origin(each) is tuple), None)
    return None if found is None else get_args(found)[0]


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _elements(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    """``"1,.5"`` → numbers, or names; ``ValueError`` naming the option otherwise."""
    words = parse_words(text)
    if kind is str:
        return words
    try:
        found = tuple(kind(word) for word in words)
    except ValueError:
        raise ValueError(f"{flag} {text!r}: write numbers, separated by commas") from None
    if not found:
        raise ValueError(f"{flag} is empty: give at least one number")
    return found


def _parameters(field: Field, default: Any, variables: bool) -> Iterator[inspect.Parameter]:
    """An option in typer's terms."""
    option, name, flags = field.option, _name(field), list(field.flags)
    kind, default = _plain(field, default)
    if kind is bool and default:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    told: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel}
    if option.unset and default in (None, ""):
        told["show_default"] = option.unset
    if option.positional:
        told |= {} if default is None else {"show_default": default}
        default = None
        yield _parameter(name, str | None, None, typer.Argument(**told))
        name, told = f"{name}_option", {"help": f"The argument {name}, given as an option."}
    if variables:
        told["envvar"] = variable(field.flags[0])
        register(told["envvar"])
    if option.callback is not None:
        told |= {"callback": option.callback, "is_eager": True}
    yield _parameter(name, kind, default, typer.Option(*flags, **told))


def _parameter(name: str, kind: Any, default: Any, told: Any) -> inspect.Parameter:
    kind = kind | None if default is None else kind
    return inspect.Parameter(name, KEYWORD, default=default, annotation=Annotated[kind, told])


def _plain(field: Field, default: Any) -> tuple[Any, Any]:
    """The type that typer parses, and the default in that type."""
    option = field.option
    if option.inverted:
        return bool, not default
    if option.repeat:
        return list[str], None
    if option.parse is not None or _tuple_of(field.kind) is not None:
        if default is None or default == {}:
            return str, None
        listed = option.parse is None
        return str, ",".join(map(_word, default)) if listed else option.show(default)
    members = _members(field.kind)
    return next(each for each in PLAIN if each in members), default


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
