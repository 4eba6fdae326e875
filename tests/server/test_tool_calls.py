"""Calls found in what models write, in any pieces; which calls and results belong together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyramidinfer.server.protocol import Message
from pyramidinfer.server.tool_calls import ToolReader, check_calls
from pyramidinfer.server.tool_formats import FORMATS, HERMES, ToolFormat

BY_NAME = {each.name: each for each in FORMATS}
LLAMA, MISTRAL = BY_NAME["llama3"], BY_NAME["mistral"]
TWO = [("look", '{"at": "a {b} \\"c\\" ]"}'), ("go", '{"to": [1, {"x": 2}]}')]

Answer = tuple[str, list[tuple[str, str]]]


def read(format: ToolFormat, text: str, step: int, several: bool = True) -> Answer:
    """The text and the calls of an answer that comes ``step`` letters at a time."""
    reader = ToolReader(format, ["look", "go"], several)
    said, calls, ids = "", [], set()
    parts = [text[at : at + step] for at in range(0, len(text), step)] or [""]
    for number, part in enumerate(parts, start=1):
        for piece in reader.feed(part, last=number == len(parts)):
            said += piece.text
            if piece.name:
                assert piece.call == len(calls)
                calls.append([piece.name, ""])
                ids.add(piece.id)
            if piece.call is not None:
                calls[piece.call][1] += piece.arguments
    assert len(ids) == len(calls) == reader.calls
    return said, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize("format", FORMATS, ids=lambda each: f"{each.name}{len(each.begin)}")
def test_what_a_format_writes_is_read_back(format: ToolFormat, step: int) -> None:
    for calls in (TWO, TWO[:1], TWO[1:]):
        assert read(format, format.write(calls), step) == ("", calls)
    assert read(format, format.write(TWO), step, several=False) == ("", TWO[:1])


CASES: list[tuple[ToolFormat, str, Answer]] = [
    (HERMES, "I look.\n" + HERMES.write(TWO[:1]), ("I look.", TWO[:1])),
    (HERMES, f"A <b> c.\n\n{HERMES.write(TWO)}\nDone. ", ("A <b> c.Done. ", TWO)),
    (HERMES, "No call < <tool \n here \n", ("No call < <tool \n here \n", [])),
    (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "go"}\n</tool_call>',
     ("", [("go", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "go"}</tool_call>', ("", [("go", "{}")])),
    (HERMES, '<tool_call>{"name": "go", "arguments": "{\\"a\\": 1}"}</tool_call>',
     ("", [("go", '{"a": 1}')])),
    (HERMES, '<tool_call>\n{"name": "none", "arguments": {}}', ("", [("none", "{}")])),
    (HERMES, "Well <tool_call> go there", ("Well <tool_call> go there", [])),
    (HERMES, "<tool_call>", ("<tool_call>", [])),
    (HERMES, '<tool_call>\n{"name": "go", "arg', ('<tool_call>\n{"name": "go", "arg', [])),
    (HERMES, '<tool_call>\n{"name": "go", "arguments": {"a', ("", [("go", '{"a')])),
    (HERMES, '<tool_call>\n["go"]\n</tool_call>', ('<tool_call>\n["go"]\n</tool_call>', [])),
    (LLAMA, '<|python_tag|>{"name": "go", "parameters": {}}', ("", [("go", "{}")])),
    (LLAMA, '{"name": "Ada", "parameters": {}}', ('{"name": "Ada", "parameters": {}}', [])),
    (LLAMA, '{"a": 1} is JSON', ('{"a": 1} is JSON', [])),
    (LLAMA, 'Hi {"name": "go", "parameters": {}}', ('Hi {"name": "go", "parameters": {}}', [])),
    (LLAMA, " \n", (" \n", [])),
    (LLAMA, "<|pyt", ("<|pyt", [])),
    (MISTRAL, '[TOOL_CALLS] [{"name": "go", "arguments": {}, "id": "a]}123456"}]',
     ("", [("go", "{}")])),
    (MISTRAL, "[1, 2] [TOOL", ("[1, 2] [TOOL", [])),
    (MISTRAL, "[TOOL_CALLS] go", ("[TOOL_CALLS] go", [])),
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(("format", "text", "wanted"), CASES)
def test_what_models_write(format: ToolFormat, text: str, wanted: Answer, step: int) -> None:
    assert read(format, text, step) == wanted


def test_arguments_come_while_they_are_written() -> None:
    reader = ToolReader(HERMES, ["go"], True)
    assert reader.feed('Ok\n<tool_call>\n{"name": "go", "arguments": ')[0].text == "Ok"
    (begun, first) = reader.feed('{"a": "')
    assert (begun.name, begun.arguments, first.arguments) == ("go", "", '{"a": "')
    assert begun.delta["id"].startswith("call_") and begun.delta["index"] == 0
    assert [each.arguments for each in reader.feed("x\n")] == ["x\n"]
    assert [each.arguments for each in reader.feed('"}}\n</tool')] == ['"}']
    assert reader.feed("_call>", last=True) == []


def test_ids_of_mistral_are_nine_letters() -> None:
    (begun, *_) = ToolReader(MISTRAL, ["go"], True).feed(MISTRAL.write(TWO[1:]))
    assert len(begun.id) == 9 and begun.id.isalnum()


# --- conversations --------------------------------------------------------------------------------


def asks(*ids: str) -> dict[str, Any]:
    function = {"name": "go", "arguments": json.dumps({"to": 1})}
    calls = [{"id": each, "type": "function", "function": function} for each in ids]
    return {"role": "assistant", "tool_calls": calls}


def tells(id: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "7", "tool_call_id": id, **more}


USER = {"role": "user", "content": "Hi"}


def check(*messages: dict[str, Any], whole: bool = True) -> None:
    check_calls([Message.model_validate(each) for each in messages], whole)


def test_results_belong_to_calls() -> None:
    check(USER, asks("a", "b"), tells("b", name="go"), tells("a"), USER, asks("a"), tells("a"))
    check(USER, asks("a"), whole=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, tells("a")], r"messages\[1\]: tool_call_id='a' .*none is open"),
        ([asks("a"), tells(None)], r"messages\[1\]: tool_call_id=None .*\('a'\)"),
        ([asks("a"), tells("a"), tells("a")], r"messages\[2\]: tool_call_id='a'"),
        ([asks("a"), tells("a", name="come")], r"messages\[1\].name: 'come', but .* of 'go'"),
        ([asks("a", "a")], r"messages\[0\].tool_calls: id 'a' is there twice"),
        ([asks("a", "b"), tells("a"), USER], r"messages\[0\].tool_calls: .* result of 'b'"),
        ([asks("a")], r"messages\[0\].tool_calls: .* result of 'a'"),
    ],
)
def test_what_does_not_belong_together(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*messages)
