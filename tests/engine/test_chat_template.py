"""Chat templates: what goes in comes out, or is refused by name; options; the end of a turn."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer.engine.chat_template import ChatTemplate, find_end_ids
from tests.server.live import byte_tokenizer

#: Knows three roles and passes over whatever else there is.
THREE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}[S]{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}[U]{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}[A]{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
#: Reads text parts only, and has a place for names.
PARTS = (
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "</s>\n{% endfor %}"
)
#: Takes a text or parts.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}+{% endfor %}{% endif %}</s>{% endfor %}"
)
#: What users say is in parts, and what the system says is a text.
MIXED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
)
THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}/no_think {% endif %}"
    "{% for m in messages %}{% generation %}{{ m.role }}: {{ m.content }}{% endgeneration %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% set own = 1 %}{{ own }}"
    "{{ bos_token }}{{ strftime_now('%%') }}"
)


def template(source: str) -> ChatTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def turn(role: str, content: str, **fields: str) -> dict[str, str]:
    return {"role": role, "content": content, **fields}


def said(source: str, *messages: dict[str, str], **options: Any) -> str:
    found = template(source)
    text: str = found.tokenizer.decode(found.ids(messages, options=options))
    return text


def test_a_developer_is_the_system_where_the_template_has_no_such_role() -> None:
    wanted = said(THREE, turn("system", "Be kind"), turn("user", "Hi"))
    assert said(THREE, turn("developer", "Be kind"), turn("user", "Hi")) == wanted
    knows = THREE.replace("'system'", "'developer'")
    assert said(knows, turn("developer", "Be kind"), turn("user", "Hi")) == wanted
    assert said(BOTH, turn("developer", "Be kind")) == said(BOTH, turn("system", "Be kind"))
    no_system = THREE.replace("'system'", "'nobody'")
    with pytest.raises(ValueError, match=r"messages\[0\].* ignores a message of role 'developer'"):
        said(no_system, turn("developer", "Be kind"), turn("user", "Hi"))


def test_a_message_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"messages\[1\].* ignores a message of role 'tool'"):
        said(THREE, turn("user", "Hi"), turn("tool", "42"), turn("user", "Well ?"))
    last = "{% for m in messages %}{% set s = m.content %}{% if loop.last %}{{ s }}{% endif %}"
    with pytest.raises(ValueError, match=r"messages\[0\].* ignores a message of role 'user'"):
        said(last + "{% endfor %}", turn("user", "Hi"), turn("user", "Hi"))
    assert said(THREE, turn("tool", " "), turn("user", "Hi")) == "[U]Hi[A]"  # it says nothing


@pytest.mark.parametrize("field", ["name", "tool_call_id", "refusal"])
def test_a_field_that_would_be_ignored_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"messages\[1\].{field}: .* no place for it"):
        said(THREE, turn("user", "Hi"), turn("assistant", "Yes", **{field: "Ada"}))
    if field == "name":
        assert said(PARTS, turn("user", "Hi", name="Ada")) == "<user Ada>Hi</s>\n"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (THREE, "[S]Be kind[U]Hi[A]"),
        (PARTS, "<system>Be kind</s>\n<user>Hi</s>\n"),
        (BOTH, "<system>Be kind</s><user>Hi</s>"),
        (MIXED, "Be kind;Hi;"),
        (THREE.replace("m['content']", "m['content'][0].text"), "[S]Be kind[U]Hi[A]"),
    ],
)
def test_contents_take_the_form_that_the_template_reads(source: str, wanted: str) -> None:
    assert said(source, turn("system", "Be kind"), turn("user", "Hi")) == wanted


@pytest.mark.parametrize("change", ["upper", "reverse", "length", "replace('mark', '')"])
def test_a_template_that_changes_texts_loses_none(change: str) -> None:
    source = "{% for m in messages %}{{ m.content | " + change + " }};{% endfor %}"
    assert said(source, turn("user", "Hi"), turn("user", "Ho")).count(";") == 2


def test_a_refusal_is_told_with_the_templates_words() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        said(source, turn("user", "Hi"))
    strict = "{% if messages[0].content != 'Hi' %}{{ raise_exception('no') }}{% endif %}Hi"
    assert said(strict, turn("user", "Hi")) == "Hi"  # marks are refused, the message is not


def test_options_reach_the_template() -> None:
    assert said(THINKING, turn("user", "Hi"), enable_thinking=False).startswith("/no_think user:")
    assert said(THINKING, turn("user", "Hi"), enable_thinking=True).startswith("user: Hi")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thinking", r"never reads 'thinking' \(it reads: bos_token, enable_thinking\)"),
        ("own", "never reads 'own'"),
        ("tokenize", "never reads 'tokenize'"),
        ("messages", "'messages' cannot be set"),
        ("strftime_now", "cannot be set"),
    ],
)
def test_an_option_that_the_template_never_reads_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs: .*{message}"):
        said(THINKING, turn("user", "Hi"), **{name: 1})


def test_without_a_template() -> None:
    for tokenizer in (template("").tokenizer, None):
        none = ChatTemplate(tokenizer)
        assert not none.exists
        with pytest.raises(ValueError, match="no chat template"):
            none.ids([turn("user", "Hi")])
        with pytest.raises(ValueError, match="no chat template"):
            none.check_options({"enable_thinking": False})
    assert find_end_ids(None) == frozenset()


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        (" </s>", "</s>"),
        ("{{ eos_token }}", "</s>"),
        ("\n", None),
        ("", None),
        ("\nUser:", None),
        (" then <|im_end|>", None),
        ("<|im_end|>x<pad>", "<|im_end|>"),
        ("{{ raise_exception('no') }}", None),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn(end: str, wanted: str | None, special: bool) -> None:
    found = template(
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    )
    found.tokenizer.add_tokens(["<|im_end|>", "<|im"], special_tokens=special)
    ids = found.tokenizer.get_vocab()
    assert found.turn_end == (None if wanted is None else ids[wanted])
    assert find_end_ids(found.tokenizer) == {ids["</s>"]} | ({ids[wanted]} if wanted else set())


def test_a_long_chat_is_rendered_once_besides_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = template(BOTH)
    render, texts = found.tokenizer.apply_chat_template, []

    def counted(turns: Any, **options: Any) -> Any:
        texts.append(sum(len(each["content"]) for each in turns))
        return render(turns, **options)

    monkeypatch.setattr(found.tokenizer, "apply_chat_template", counted)
    found.ids([turn("user", "word " * 200)] * 300)
    assert len(texts) == 2 and min(texts) < 300 * 12  # one of them of short marks
