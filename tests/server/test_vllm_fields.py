"""What vLLM's clients ask for beyond OpenAI's API, whole and streamed."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.engine.test_structured import HOSTILE
from tests.server.live import END, MODEL, STORY, Live, serving, tiny_llm
from tests.server.test_limits import CHAT, COMPLETIONS, USER, error_of

FULL = {"compression": {"policy": "full"}}
WORDS = r"(yes|no)(,(yes|no))*"
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": r"\d\d-[ab]"}}, r"\d\d-[ab]"),
    ({"guided_regex": r"\d\d-[ab]"}, r"\d\d-[ab]"),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"structured_outputs": {"grammar": 'start: w ("," w)*\nw: "yes" | "no"'}}, WORDS),
    ({"guided_grammar": 'root ::= w ("," w)*\nw ::= "yes" | "no"'}, WORDS),
    ({"structured_outputs": {"json": {"enum": [1, 2]}}}, r"\s*[12]"),
    ({"guided_json": '{"enum": [1, 2]}'}, r"\s*[12]"),
    ({"structured_outputs": {"json_object": True}}, r"(?s)\s*\{.*\}"),
]


def streamed(answer: httpx.Response) -> dict[int, str]:
    """The text of every choice of a stream."""
    assert answer.status_code == 200, answer.text
    found: dict[int, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for each in json.loads(line.removeprefix("data: "))["choices"]:
                text = each["delta"].get("content", "") if "delta" in each else each["text"]
                found[each["index"]] = found.get(each["index"], "") + text
    return found


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=lambda value: str(value)[:40])
def test_answers_have_the_form(tiny: Live, form: dict[str, Any], pattern: str) -> None:
    body = {**form, "n": 3, "seed": 1, "temperature": 1, "max_tokens": 200}
    for ask in (tiny.chat, tiny.complete):
        answer = ask("Who ?", **body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        texts = [
            each["message"]["content"] if "message" in each else each["text"] for each in choices
        ]
        ended = [each["finish_reason"] == "stop" for each in choices]
        assert any(ended)
        assert all(
            re.fullmatch(pattern, text) for text, end in zip(texts, ended, strict=True) if end
        )
        parts = streamed(ask("Who ?", **body, stream=True))
        assert [parts[index] for index in range(3)] == texts


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"structured_outputs": {}}, "give one of json, regex, choice", "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "given: json, regex",
            "structured_outputs",
        ),
        ({"structured_outputs": {"structural_tag": "a"}}, "structural_tag", "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice", None),
        (
            {
                "guided_regex": "(",
            },
            "the regular expression cannot be followed",
            "guided_regex",
        ),
        ({"guided_grammar": "start: ("}, "the grammar cannot be followed", "guided_grammar"),
        ({"guided_json": "[]"}, "the JSON schema cannot be followed", "guided_json"),
        ({"guided_choice": []}, "guided_choice", "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "70000 bytes", "guided_regex"),
        ({"guided_choice": ["é" * 20_000, "é" * 20_000]}, "80000 bytes", "guided_choice"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4", None),
        ({"min_tokens": -1}, "given: -1", "min_tokens"),
        ({"prompt_logprobs": -1}, "given: -1", "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "21", "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "not available with stream=true", None),
        ({"prompt_logprobs": 1}, "policy 'pyramid' drops prompt tokens", "prompt_logprobs"),
        ({"skip_special_tokens": 1}, "skip_special_tokens", "skip_special_tokens"),
    ],
    ids=str,
)
def test_wrong_bodies(tiny: Live, body: dict[str, Any], message: str, param: str | None) -> None:
    for path, asked in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": USER})):
        error = error_of(tiny.http.post(path, json={**asked, **body}))
        assert message in error["message"] and error["param"] == param


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE)
def test_forms_that_would_end_or_hang_the_server(tiny: Live, form: dict[str, Any]) -> None:
    error = error_of(tiny.chat("x", structured_outputs=form))
    assert "nested too deeply, or too much work" in error["message"]
    assert error["param"] == "structured_outputs"
    if "json" in form:  # the same by OpenAI's name
        schema = {"name": "x", "schema": json.loads(form["json"])}
        wanted = {"response_format": {"type": "json_schema", "json_schema": schema}}
        assert "too much work" in error_of(tiny.chat("x", **wanted))["message"]
    assert tiny.chat("x", max_tokens=1).status_code == 200


def test_one_form_only(tiny: Live) -> None:
    wanted = {"response_format": {"type": "json_object"}, "guided_choice": ["a"]}
    assert "one constraint" in error_of(tiny.chat("x", **wanted))["message"]
    plain = {"response_format": {"type": "text"}, "guided_choice": ["a"]}
    assert tiny.chat("x", **plain).json()["choices"][0]["message"]["content"] == "a"


def test_min_tokens(live: Live) -> None:
    """They come before the end, streamed or not, and may be more than the default."""
    bias = {"logit_bias": {str(END): 100}}
    for ask in (live.complete, live.chat):
        body = {**bias, "min_tokens": 6, "max_tokens": 50}
        answer = ask(STORY, **body).json()
        assert answer["usage"]["completion_tokens"] == 7
        assert answer["choices"][0]["finish_reason"] == "stop"
        text = answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"]
        assert streamed(ask(STORY, **body, stream=True)) == {0: text} and text
    body = {**bias, "min_tokens": 300, "max_tokens": None}
    assert live.complete(STORY, **body).json()["usage"]["completion_tokens"] == 300
    error = error_of(live.complete(STORY, **{**body, "min_tokens": 3001}))
    assert "3000" in error["message"] and error["param"] == "min_tokens"


def test_special_tokens_are_told_where_asked_for(tiny: Live) -> None:
    body = {"logit_bias": {"1": 100}, "max_tokens": 3}
    for skip, wanted in ((True, ""), (False, "<s><s><s>")):
        body["skip_special_tokens"] = skip
        answer = tiny.complete("x", **body, logprobs=0).json()["choices"][0]
        assert answer["text"] == wanted
        assert answer["logprobs"]["text_offset"] == ([0, 0, 0] if skip else [0, 3, 6])
        assert tiny.chat("x", **body).json()["choices"][0]["message"]["content"] == wanted
        assert streamed(tiny.chat("x", **body, stream=True)) == {0: wanted}


def test_prompt_logprobs(live: Live) -> None:
    """Those that echo tells, in vLLM's shape, each with its rank."""
    body = {**FULL, "prompt_logprobs": 3, "n": 2}
    answer = live.complete(STORY, **body, echo=True, logprobs=1).json()
    ids = live.service.llm.tokenizer(STORY)["input_ids"]
    for choice in answer["choices"]:
        found, legacy = choice["prompt_logprobs"], choice["logprobs"]
        assert found[0] is None and len(found) == len(ids)
        for index, each in enumerate(found[1:], start=1):
            own = each[str(ids[index])]
            assert own["logprob"] == legacy["token_logprobs"][index]
            assert own["decoded_token"] == legacy["tokens"][index]
            ranks = sorted(other["rank"] for other in each.values())
            assert ranks[:3] == [1, 2, 3] and len(each) == 3 + (own["rank"] > 3)
            assert len(legacy["top_logprobs"][index]) <= 2  # echo's are as many as it asked for
    only = live.complete(STORY, **FULL, prompt_logprobs=3, max_tokens=0).json()["choices"][0]
    assert only["prompt_logprobs"] == found and only["text"] == ""
    said = live.chat(STORY, **FULL, prompt_logprobs=0).json()
    assert said["prompt_logprobs"][0] is None
    assert {len(each) for each in said["prompt_logprobs"][1:]} == {1}
    assert len(said["prompt_logprobs"]) == said["usage"]["prompt_tokens"]


def test_a_cache_that_is_taken_up_tells_no_prompt_logprobs(live: Live) -> None:
    """So such a request begins anew, and leaves none."""
    first = live.complete(STORY, **FULL, return_token_ids=True).json()
    ids = live.service.llm.tokenizer(STORY)["input_ids"]
    longer = [*ids, *first["choices"][0]["token_ids"], 5, 6]
    for _ in range(2):
        answer = live.complete(longer, **FULL, prompt_logprobs=1).json()
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert len(answer["choices"][0]["prompt_logprobs"]) == len(longer)


def test_openais_client_takes_them_all() -> None:
    with serving(tiny_llm(), model_name=MODEL) as live, live.openai() as client:
        extra = {
            "structured_outputs": {"choice": ["left", "right"]},
            "min_tokens": 1,
            "skip_special_tokens": False,
            **FULL,
            "prompt_logprobs": 1,
        }
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body=extra
        )
        assert answer.choices[0].message.content in ("left", "right")
        assert answer.model_extra and answer.model_extra["prompt_logprobs"][0] is None
