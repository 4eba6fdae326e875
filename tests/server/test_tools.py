"""Tools over HTTP: how models are told of them, calls that are enforced, and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pyramidinfer.engine.chat_template import ChatTemplate
from pyramidinfer.engine.grammar import Grammars
from pyramidinfer.server.tool_calls import ToolReader
from pyramidinfer.server.tool_formats import FORMATS, HERMES, MOST_CALLS, ToolPrompt, grammar_of
from pyramidinfer.types import StructuredOutputsParams
from tests.server.live import Live, byte_tokenizer, serving, tiny_llm

#: As in Qwen 2.5.
QWEN = (
    "{% if tools %}<s>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<s>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response></s>\n{% else %}<s>{{ m.role }}{{ '\n' }}{% if m.content %}{{ m.content }}"
    "{% if m.tool_calls %}{{ '\n' }}{% endif %}{% endif %}{% for c in m.tool_calls %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
#: As in Llama 3.1: one call an answer.
LLAMA = (
    "{% for t in tools or [] %}{{ t | tojson(indent=4) }}\n{% endfor %}{% for m in messages %}"
    "<s>{{ m.role }}{{ '\n' }}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
#: As in Mistral 7B v0.3, which wants ids of nine letters.
MISTRAL = (
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids of 9 letters') }}{% endif %}{{ (c.function | tojson)[:-1] }}"
    ', "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}[{{ m.role }}] {{ m.content }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
#: As in Gemma 2.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)
UNKNOWN = QWEN.replace("<tool_call>", "<call>")

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a room",
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["4 { a", "5"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
OTHER = {"type": "function", "function": {"name": "stop"}}
CALLS = [
    {"id": f"id000000{n}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for n in (1, 2)
]
USER = {"role": "user", "content": "Hi"}


def told(source: str) -> ToolPrompt:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return ToolPrompt(ChatTemplate(tokenizer))


@pytest.mark.parametrize(
    ("source", "name", "native", "several"),
    [
        (QWEN, "hermes", True, True),
        (LLAMA, "llama3", True, False),
        (MISTRAL, "mistral", True, True),
        (PLAIN, "hermes", False, True),
        (NO_SYSTEM, "hermes", False, True),
        (UNKNOWN, "hermes", False, True),
    ],
)
def test_the_format_is_what_the_template_writes(
    source: str, name: str, native: bool, several: bool
) -> None:
    found = told(source)
    assert (found.format.name, found.native, found.several) == (name, native, several)


def text(source: str, *turns: dict[str, Any], tools: Any = (TOOL,)) -> str:
    prompt = told(source)
    return prompt.template.text(*prompt.turns(turns, tools))


def answers(id: str, content: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": id, "content": content}


TALK = [
    USER,
    {"role": "assistant", "content": "So", "tool_calls": CALLS},
    answers("id0000002", "second"),
    answers("id0000001", "first"),
]


@pytest.mark.parametrize("source", [QWEN, PLAIN, UNKNOWN, NO_SYSTEM])
def test_calls_and_results_are_in_the_prompt(source: str) -> None:
    shown = text(source, *TALK)
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert f"<s>assistant\nSo\n{call}\n{call}</s>\n" in shown
    assert "Looks at a room" in shown and shown.index("first") < shown.index("second")
    if source != QWEN:
        first, second = (f"<tool_response>\n{one}\n</tool_response>" for one in ("first", "second"))
        assert shown.endswith(f"<s>user\n{first}\n{second}</s>\n")
        assert ("<tools>\n" + json.dumps(TOOL)) in shown
        assert shown.startswith("<s>user\n# Tools" if source == NO_SYSTEM else "<s>system\n# Tools")


def test_the_systems_own_words_come_first() -> None:
    shown = text(PLAIN, {"role": "system", "content": "Be kind"}, USER)
    assert shown.startswith("<s>system\nBe kind\n\n# Tools\n\nYou may call")
    assert "# Tools" not in text(PLAIN, *TALK, tools=())


# --- grammars -------------------------------------------------------------------------------------


def fits(grammar: str, tokenizer: Any, text: str) -> bool:
    """Whether a text is an answer by a grammar."""
    end = tokenizer.eos_token_id
    made = Grammars(tokenizer, len(tokenizer), frozenset({end}))
    matcher = made.constraint(StructuredOutputsParams(grammar=grammar)).matcher
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.validate_tokens(tokens) == len(tokens) and (
        matcher.consume_tokens(tokens) and bool(matcher.is_accepting())
    )


GOOD = '{"room": "5", "on": true}'


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda each: f"{each.name}{len(each.begin)}")
def test_only_calls_of_these_functions_fit(format: Any, marked: bool) -> None:
    tokenizer = byte_tokenizer()
    if marked:
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]"], special_tokens=True)
    added = tokenizer.get_added_vocab() if marked else {}
    functions = [("look", TOOL["function"]["parameters"]), ("stop", None)]  # type: ignore[index]

    def grammar(**options: Any) -> str:
        options = {"several": False, "must": True, "added": added, **options}
        return grammar_of(format, functions, **options)

    one, two = [("look", GOOD)], [("look", GOOD), ("stop", "{}")]
    must, several, free = grammar(), grammar(several=True), grammar(must=False)
    assert fits(must, tokenizer, format.write(one)) and not fits(must, tokenizer, "Hi")
    assert not fits(must, tokenizer, format.write(two))
    assert fits(several, tokenizer, format.write(two))
    assert fits(several, tokenizer, format.write(one * MOST_CALLS))
    assert not fits(several, tokenizer, format.write(one * (MOST_CALLS + 1)))
    for wrong in (
        [("look", GOOD.replace("5", "6"))],
        [("look", GOOD.replace("true", "true, " + '"more": 1'))],
        [("look", GOOD.replace(", ", ","))],
        [("stop", '{"a": 1}')],
        [("none", "{}")],
    ):
        assert not fits(must, tokenizer, format.write(wrong)), wrong
        assert not fits(free, tokenizer, format.write(wrong)), wrong
    assert fits(free, tokenizer, "Hi <there>\n{") and fits(free, tokenizer, format.write(one))
    if format.mark:
        assert fits(free, tokenizer, "Hi\n" + format.write(one))
    schema = grammar(must=False, schema={"type": "object", "properties": {"x": {"const": 1}}})
    assert fits(schema, tokenizer, '{"x": 1}') and fits(schema, tokenizer, format.write(one))
    assert not fits(schema, tokenizer, "Hi")


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[QWEN, LLAMA, MISTRAL, PLAIN], ids="qwen llama mistral -".split()
)
def served(request: pytest.FixtureRequest) -> Iterator[Live]:
    llm = tiny_llm(kv_memory="16MiB")
    llm.tokenizer.chat_template = request.param
    with serving(llm, model_name="tiny") as live:
        yield live


def ask(live: Live, messages: Any = (USER,), **body: Any) -> Any:
    body = {"temperature": 0, "max_tokens": 200, "tools": [TOOL, OTHER], **body}
    with live.openai() as client:
        answer: Any = client.chat.completions.create(model="tiny", messages=list(messages), **body)
        return list(answer) if body.get("stream") else answer


NAMED = {"type": "function", "function": {"name": "look"}}


def test_calls_are_made_and_answered(served: Live) -> None:
    """A random model under the grammar calls what it may; the next turn takes its cache up."""
    answer = ask(served, tool_choice=NAMED)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("stop", None)
    assert call.type == "function" and call.function.name == "look"
    arguments = json.loads(call.function.arguments)
    assert arguments["room"] in ("4 { a", "5") and type(arguments["on"]) is bool
    result = {"role": "tool", "tool_call_id": call.id, "content": "dark"}
    further = ask(served, [USER, choice.message, result], tool_choice="none", max_tokens=4)
    cached = further.usage.prompt_tokens_details.cached_tokens
    if served.service.prompts.tool_prompt.format.name == "mistral":
        assert cached == 0  # its template writes ids into calls
    else:
        assert cached == answer.usage.total_tokens - 1


@pytest.mark.parametrize("parallel", [True, False])
def test_a_stream_tells_what_the_whole_answer_does(served: Live, parallel: bool) -> None:
    options = {"tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 300}
    whole = ask(served, **options).choices[0]
    calls: list[dict[str, str]] = []
    ends, roles = [], []
    for chunk in ask(served, stream=True, **options):
        (choice,) = chunk.choices
        assert not choice.delta.content
        roles += [choice.delta.role] if choice.delta.role else []
        ends += [choice.finish_reason] if choice.finish_reason else []
        for part in choice.delta.tool_calls or ():
            if part.id:
                assert part.index == len(calls)
                calls.append({"name": part.function.name, "arguments": ""})
            calls[part.index]["arguments"] += part.function.arguments
    assert calls == [
        {"name": each.function.name, "arguments": each.function.arguments}
        for each in whole.message.tool_calls
    ]
    assert (ends, roles) == ([whole.finish_reason], ["assistant"])
    if not parallel:
        assert len(calls) == 1 and ends == ["tool_calls"]


@pytest.fixture(scope="module")
def plain() -> Iterator[Live]:
    llm = tiny_llm(kv_memory="16MiB")
    llm.tokenizer.chat_template = PLAIN
    with serving(llm, model_name="tiny", max_schema_bytes=600) as live:
        yield live


def test_some_of_the_functions(plain: Live) -> None:
    few = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": few}
    answer = ask(plain, tool_choice=choice, parallel_tool_calls=False)
    assert answer.choices[0].message.tool_calls[0].function.name == "stop"


def test_strict_functions_and_a_form_beside_them(plain: Live) -> None:
    """Under ``auto`` an answer is text, or a call that is valid; or has the form wanted."""
    only = {"type": "object", "required": ["x"], "additionalProperties": False}
    schema = {**only, "properties": {"x": {"const": 1}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bias = {str(plain.service.llm.tokenizer.convert_tokens_to_ids("{")): 100.0}
    answer = ask(plain, response_format=form, logit_bias=bias)
    assert json.loads(answer.choices[0].message.content) == {"x": 1}
    bias = {str(plain.service.llm.tokenizer.convert_tokens_to_ids("<")): 100.0}
    answer = ask(plain, response_format=form, logit_bias=bias, parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"


def call_of(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"tool_choice": call_of("go")}, "'go' is no function here; tools has look, stop", None),
        ({"tool_choice": "required", "tools": []}, "tool_choice='required' needs tools", None),
        ({"tool_choice": "some"}, "tool_choice", "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "two functions 'look'", None),
        ({"tools": [{"type": "custom", "custom": {}}]}, "must be 'function'", "tools"),
        ({"tools": [call_of("a b")]}, "tools.0.function.name", "tools"),
        ({"tools": [call_of(f"f{n}") for n in range(129)]}, "tools", "tools"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format: with this tool_choice the answer is a call",
            None,
        ),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs: beside tools", None),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": CALLS}]}, "an assist", "m"),
        ({"messages": [USER, answers("x", "y")]}, "messages[1]: tool_call_id='x'", "messages"),
        ({"functions": []}, "", None),
    ],
)  # fmt: skip
def test_what_is_refused(plain: Live, body: Any, message: str, param: str | None) -> None:
    body = {"messages": [USER], "tools": [TOOL, OTHER], **body}
    answer = plain.http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
    if "functions" in body:
        assert answer.status_code == 200  # says nothing
        return
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"], error
    assert param is None or error["param"].startswith(param)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "object", "properties": {"a": {"type": "colour"}}}, "cannot be followed"),
        ({"enum": ["a" * 700]}, "this server allows 600"),
    ],
)
def test_schemas_that_cannot_be_followed(plain: Live, parameters: Any, message: str) -> None:
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(plain, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
    assert ask(plain, tools=[tool], max_tokens=1).choices  # nothing is enforced there


def test_the_shipped_model_is_told_of_tools(live: Live, client: openai.OpenAI) -> None:
    """It calls none and cannot be made to: its words do not spell JSON."""
    tools: Any = [TOOL]
    messages: Any = [{"role": "user", "content": "Where is the archive ?"}]
    options: Any = {"model": "demo-model", "messages": messages, "temperature": 0, "max_tokens": 8}
    plain = client.chat.completions.create(**options)
    told = client.chat.completions.create(tools=tools, **options)
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens
    assert told.choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="tokenizer cannot write JSON"):
        client.chat.completions.create(tools=tools, tool_choice="required", **options)


def test_a_reader_for_every_choice(plain: Live) -> None:
    answer = ask(plain, tool_choice="required", n=2, temperature=1, seed=3, max_tokens=120)
    assert all(each.message.tool_calls for each in answer.choices)
    assert ToolReader(HERMES, [], True).feed("") == []
