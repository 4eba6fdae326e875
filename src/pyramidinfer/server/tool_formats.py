"""Tools in prompts and calls in answers: the formats, the one that a model's chat template writes,
the default prompt, and grammars for valid calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyramidinfer.engine.chat_template import ChatTemplate, Turn

__all__ = ["FORMATS", "HERMES", "MOST_CALLS", "ToolFormat", "ToolPrompt", "grammar_of"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The text around calls; each call is an object with a name and arguments.

    ``mark``: marks the beginning of calls (empty: the answer's first brace does);  ``begin``:
    from the mark to the first call;  ``between``: text between two calls;  ``end``: text after
    the last call;  ``key``: name of the arguments in a call;  ``id_length``: length of the call
    ids that templates accept (None: any).
    """

    name: str
    mark: str
    begin: str
    between: str
    end: str
    key: str = "arguments"
    id_length: int | None = None

    def head(self, name: str) -> str:
        """The text of a call up to its arguments."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": '

    def write(self, calls: Iterable[tuple[str, str]]) -> str:
        """The text of calls; each call is a name and its arguments (JSON)."""
        texts = [f"{self.head(name)}{arguments}}}" for name, arguments in calls]
        return f"{self.begin}{self.between.join(texts)}{self.end}"


#: Format of Hermes, Qwen 2.5, Qwen 3 and SmolLM3.
HERMES = ToolFormat(
    "hermes",
    "<tool_call>",
    "<tool_call>\n",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
)
FORMATS = (
    HERMES,
    ToolFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS] [", ", ", "]", id_length=9),
    ToolFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS][", ", ", "]", id_length=9),
    ToolFormat("llama3", "", "", "; ", "", key="parameters"),
)

#: Limit of enforced calls in one answer: a small model may repeat a call endlessly.
MOST_CALLS = 8

#: Prompt for tools (Hermes's) if the chat template does not handle tools.
TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

NAME, KEY, RESULT = "probe_name", "probe_key", "probe result"
#: A conversation for testing whether a template handles tools.
PROBE: list[Turn] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "probe0001",
                "type": "function",
                "function": {"name": NAME, "arguments": {KEY: 1}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "probe0001", "content": RESULT},
]
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool",
        "parameters": {"type": "object", "properties": {KEY: {"type": "integer"}}},
    },
}


class ToolPrompt:
    """Writes tools, calls and results into the turns of one model's conversations.

    ``native``: the chat template does that, and calls have the template's format.  Otherwise
    ``TOOLS_PROMPT`` is added to the system message (to the first user message if the template takes
    no system message), calls and results are texts, and the format is Hermes's.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    @cached_property
    def _own(self) -> ToolFormat | None:
        """The template's format of calls, if it also writes tools and results."""
        try:
            text = self.template.text(PROBE, [PROBE_TOOL])
        except Exception:  # a template may raise any error
            return None
        if "probe_tool" not in text or RESULT not in text:
            return None
        wanted = ((each, f'{each.begin}{each.head(NAME)}{{"{KEY}": 1}}') for each in FORMATS)
        return next((each for each, call in wanted if call in text), None)

    @property
    def native(self) -> bool:
        return self._own is not None

    @property
    def format(self) -> ToolFormat:
        return self._own or HERMES

    @cached_property
    def several(self) -> bool:
        """Whether an answer may hold more than one call: some templates refuse to write them."""
        if not self.native:
            return True
        calls = PROBE[1]["tool_calls"]
        second = {**calls[0], "id": "probe0002"}
        more = [
            PROBE[0],
            {**PROBE[1], "tool_calls": [*calls, second]},
            PROBE[2],
            {**PROBE[2], "tool_call_id": "probe0002"},
        ]
        try:
            return self.template.text(more, [PROBE_TOOL]).count(self.format.head(NAME)) == 2
        except Exception:
            return False

    @cached_property
    def _has_system(self) -> bool:
        """Whether the template takes a system message."""
        try:
            self.template.text([{"role": "system", "content": "Hi"}, {**PROBE[0]}])
        except Exception:
            return False
        return True

    def turns(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Turn], Sequence[Mapping[str, Any]]]:
        """Turns and tools for the template.

        Arguments in ``turns`` are texts (JSON).  Results are in the order of their calls.
        """
        ordered = _ordered(turns)
        if self.native:
            return [_with_objects(each) for each in ordered], tools
        return self._told(self._written(ordered), tools), ()

    def _written(self, turns: Sequence[Turn]) -> list[Turn]:
        """Calls and results as texts; consecutive results are one message."""
        written: list[Turn] = []
        for turn in turns:
            if turn["role"] == "tool":
                text = f"<tool_response>\n{turn['content']}\n</tool_response>"
                if written and written[-1].get("answers"):
                    written[-1]["content"] += f"\n{text}"
                else:
                    written.append({"role": "user", "content": text, "answers": True})
            elif calls := turn.get("tool_calls"):
                made = [(one["function"]["name"], one["function"]["arguments"]) for one in calls]
                texts = [turn["content"], HERMES.write(made)]
                rest = {key: value for key, value in turn.items() if key != "tool_calls"}
                written.append({**rest, "content": "\n".join(filter(None, texts))})
            else:
                written.append(dict(turn))
        for turn in written:
            turn.pop("answers", None)
        return written

    def _told(self, turns: list[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """The turns with the tools in the first message."""
        if not tools:
            return turns
        listed = "\n".join(json.dumps(each, ensure_ascii=False) for each in tools)
        told = TOOLS_PROMPT.format(tools=listed)
        systems = [turn for turn in turns[:1] if turn["role"] in ("system", "developer")]
        if systems:
            systems[0]["content"] = f"{systems[0]['content']}\n\n{told}"
        elif self._has_system:
            turns.insert(0, {"role": "system", "content": told})
        else:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise ValueError("tools: this model takes them in a user's message; give one")
            users[0]["content"] = f"{told}\n\n{users[0]['content']}"
        return turns


def _ordered(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the results of each assistant message in the order of its calls."""
    ordered: list[Turn] = []
    places: dict[str, int] = {}
    first = 0  # index of the first of consecutive results
    for turn in turns:
        if turn["role"] != "tool":
            places = {one["id"]: at for at, one in enumerate(turn.get("tool_calls", ()))}
            first = len(ordered) + 1
            ordered.append(turn)
            continue
        ordered.append(turn)
        ordered[first:] = sorted(
            ordered[first:], key=lambda each: places.get(each.get("tool_call_id", ""), 0)
        )
    return ordered


def _with_objects(turn: Turn) -> Turn:
    """The turn with the arguments of its calls as objects, as templates expect them."""
    if "tool_calls" not in turn:
        return turn

    def one(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}

    return {**turn, "tool_calls": [one(call) for call in turn["tool_calls"]]}


# --- grammars -------------------------------------------------------------------------------------

#: JSON as templates write it: the generated call and the same call in the next prompt have the same
#: tokens, so the cache can be reused.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: Keys of a schema, other than ``properties``, that allow properties of an object.
MORE = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
MORE |= {"allOf", "anyOf", "oneOf", "$ref", "if"}


def grammar_of(
    format: ToolFormat,
    functions: Sequence[tuple[str, Mapping[str, Any] | None]],
    *,
    several: bool,
    must: bool,
    schema: Mapping[str, Any] | None = None,
    added: Mapping[str, int] | None = None,
) -> str:
    """A grammar (Lark's notation) of answers that may call these functions, each given by its name
    and the schema of its arguments.

    ``several``: up to ``MOST_CALLS`` calls are allowed (otherwise one);  ``must``: only calls are
    allowed;  ``schema``: of an answer without calls (None: any text);  ``added``: texts that are
    one token, with their ids.
    """

    def put(text: str) -> str:
        return _spelled(text, added or {})

    if schema is not None and not format.mark and not must:  # both begin with a brace
        forms = [_call(format.key, name, parameters) for name, parameters in functions]
        return f"start: %json {json.dumps(_plain({'anyOf': [*forms, schema]}))}"
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    more = f"({put(format.between)} call){{0,{MOST_CALLS - 1}}}" if several else ""
    rules = [f"calls: call {more} {put(format.end)}", f"call: {calls}"]
    for index, (name, parameters) in enumerate(functions):
        rules += [
            f"call_{index}: {put(format.head(name))} arguments_{index} {put('}')}",
            f"arguments_{index}: %json {json.dumps(_styled(parameters))}",
        ]
    begin = put(format.begin)
    if must:
        rules.insert(0, f"start: {begin} calls")
    elif schema is not None:
        rules[:0] = [f"start: {begin} calls | other", f"other: %json {json.dumps(_plain(schema))}"]
    elif not format.mark:
        rules[:0] = ["start: calls | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
    elif format.mark in (added or {}):
        rules[:0] = [f"start: TEXT | TEXT {begin} calls", r"TEXT: /(.|\n)*/"]
    else:
        rest = put(format.begin.removeprefix(format.mark))
        rules[:0] = [
            f"start: TEXT | opened {rest} calls",
            f"opened[lazy]: TEXT {put(format.mark)}",
            r"TEXT: /(.|\n)*/",
        ]
    return "\n".join(rules)


def _spelled(text: str, added: Mapping[str, int]) -> str:
    """A text in a grammar; texts that are one token are written as their ids."""
    names = sorted((name for name in added if name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    shown = (f"<[{added[part]}]>" if part in added else json.dumps(part) for part in parts if part)
    return " ".join(shown)


def _styled(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of arguments: an object without further properties, unless the schema has rules
    for them."""
    schema: dict[str, Any] = {"type": "object", **(parameters or {}), "x-guidance": STYLE}
    if not MORE & schema.keys():
        schema = {"properties": {}, **schema, "additionalProperties": False}
    return schema


def _call(key: str, name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a whole call."""
    arguments = {name: it for name, it in _styled(parameters).items() if name != "x-guidance"}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": STYLE}
