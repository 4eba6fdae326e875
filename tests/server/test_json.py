"""Answers that follow a JSON schema, asked for with OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.server.live import Live
from tests.server.test_openai_client import chat, texts

SCHEMA = {
    "type": "object",
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b", "é"]}},
    },
}


def test_json_schema_is_followed(tiny: Live) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    with tiny.openai() as client:
        options = {"max_tokens": 400, "temperature": 1, "response_format": wanted}
        for seed in range(4):
            answer = chat(client, "Who ?", "tiny", n=3, seed=seed, **options)
            for choice in answer.choices:
                assert choice.finish_reason == "stop"  # white space is bounded
                jsonschema_rs.validate(SCHEMA, json.loads(choice.message.content))
        parts, _, _ = texts(chat(client, "Who ?", "tiny", n=3, seed=3, stream=True, **options))
        assert [parts[each.index] for each in answer.choices] == [
            each.message.content for each in answer.choices
        ]


def test_a_model_that_wants_blanks_only_comes_to_an_end(tiny: Live) -> None:
    """No prompt is needed for it: every blank is made likelier than anything else."""
    tokenizer = tiny.service.llm.tokenizer
    blanks = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    with tiny.openai() as client:
        answer = chat(
            client,
            "Who ?",
            "tiny",
            max_tokens=400,
            temperature=0,
            response_format=wanted,
            logit_bias={str(token): 100 for token in blanks},
        ).choices[0]
    assert answer.finish_reason == "stop", answer.message.content
    jsonschema_rs.validate(SCHEMA, json.loads(answer.message.content))
    assert "\n" in answer.message.content  # a pretty form is still to be had


def test_json_object(tiny: Live) -> None:
    ended = 0
    with tiny.openai() as client:
        for seed in range(6):
            answer = chat(
                client,
                "Who ?",
                "tiny",
                seed=seed,
                temperature=1,
                max_tokens=400,
                response_format={"type": "json_object"},
            )
            if answer.choices[0].finish_reason == "stop":
                assert isinstance(json.loads(answer.choices[0].message.content), dict)
                ended += 1
        assert ended
        free = chat(client, "Who ?", "tiny", response_format={"type": "text"})
        assert free.choices == chat(client, "Who ?", "tiny").choices


def test_a_schema_that_cannot_be_followed(tiny: Live, client: openai.OpenAI) -> None:
    with tiny.openai() as other:
        for schema, message in (
            ({"type": "nonsense"}, "cannot be followed"),
            ({"$ref": "https://example.com/x.json"}, "cannot be followed"),
            ({"type": "string", "pattern": "("}, "cannot be followed"),
            ({"$ref": "#"}, "cannot be followed"),  # nothing would ever be it
            ({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}, "items; max is"),
        ):
            with pytest.raises(openai.BadRequestError, match=message) as error:
                chat(
                    other,
                    "Who ?",
                    "tiny",
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": schema},
                    },
                )
            assert "\n" not in error.value.body["message"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="tokenizer cannot write JSON"):
        chat(client, response_format={"type": "json_object"})  # its words have no braces


def test_bytes_of_tokens_make_the_text(tiny: Live) -> None:
    """A token that is part of a character has its own bytes; together they are the text's."""
    body = {"max_tokens": 60, "temperature": 1.5, "ignore_eos": True, "logprobs": True}
    halves = 0
    for seed in range(6):
        choice = tiny.chat("é", seed=seed, **body).json()["choices"][0]
        spelled = choice["logprobs"]["content"]
        special = {"<pad>", "<s>", "</s>"}
        together = b"".join(bytes(e["bytes"]) for e in spelled if e["token"] not in special)
        assert together.decode("utf-8", "replace") == choice["message"]["content"]
        halves += sum("\ufffd" in e["token"] and e["bytes"] != [239, 191, 189] for e in spelled)
    assert halves, "no token was half a character"
