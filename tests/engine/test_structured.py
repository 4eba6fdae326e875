"""What an answer is made to be: its form, its least length, and what is told of its prompt."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams, StructuredOutputsParams
from tests.server.live import tiny_llm
from tests.tiny import VOCAB, random_prompt, tiny_model

END = 2
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
LARK = 'start: word ("," word)*\nword: "yes" | "no"'
GBNF = 'root ::= word ("," word)*\nword ::= "yes" | "no"'
SIGNS = ('a "b"\n', "é\\.*[x]", "\x00{1}|")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def chained(links: int) -> dict[str, str]:
    """A schema in which every object holds the next one."""
    schemas: dict[str, Any] = {
        f"r{i}": {"items": {"$ref": f"#/$defs/r{i + 1}"}} for i in range(links)
    }
    schemas[f"r{links}"] = {"type": "integer"}
    return {"json": json.dumps({"$defs": schemas, "$ref": "#/$defs/r0"})}


#: Small ones that end the process that reads them, or keep it busy for ever.
HOSTILE = {
    "schema": chained(1400),
    "rules": {
        "grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(5000)), 'r5000: "a"'])
    },
    "terms": {
        "grammar": "\n".join(["start: R0", *(f"R{i}: R{i + 1}" for i in range(5000)), 'R5000: "a"'])
    },
    "patterns": {
        "json": json.dumps(
            {"type": "string", "allOf": [{"pattern": f"^.*a.{{{i}}}b.*$"} for i in range(40)]}
        )
    },
    "both": {"grammar": "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(40))},
}


def texts(llm: LLM, form: dict[str, Any], **options: Any) -> list[str]:
    """Of answers that came to an end, at least one."""
    options = {"max_tokens": 60, "temperature": 1.0, **options}
    params = [
        SamplingParams(seed=seed, structured_outputs=StructuredOutputsParams(**form), **options)
        for seed in range(6)
    ]
    found = llm.generate(["Who ?"] * 6, params)
    assert {each.finish_reason for each in found} <= {"stop", "length"}
    ended = [each.text for each in found if each.finish_reason == "stop"]
    assert ended
    return ended


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"^[a-c]{2,5}-\d\d$"}, r"[a-c]{2,5}-\d\d"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"choice": SIGNS}, "|".join(map(re.escape, SIGNS))),
        ({"grammar": LARK}, "(yes|no)(,(yes|no))*"),
        ({"grammar": GBNF}, "(yes|no)(,(yes|no))*"),
    ],
    ids=str,
)
def test_answers_have_the_form(llm: LLM, form: dict[str, Any], pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in texts(llm, form))


def test_json(llm: LLM) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        for text in texts(llm, {"json": schema}, max_tokens=400):
            assert type(json.loads(text)["n"]) is int
    assert isinstance(json.loads(texts(llm, {"json_object": True}, max_tokens=400)[0]), dict)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "give one of json, regex, choice, grammar, json_object .given: none"),
        ({"regex": "a", "choice": ["a"]}, "given: regex, choice"),
        ({"choice": []}, "must be a list of texts"),
        ({"choice": "ab"}, "must be a list of texts"),
        ({"regex": 5}, "regex=5 must be a text"),
        ({"json": []}, "json=.. must be a text"),
        ({"rgex": "a"}, "did you mean 'regex'"),
        ({"regex": "("}, "the regular expression cannot be followed"),
        ({"grammar": "start: ("}, "the grammar cannot be followed"),
        ({"grammar": "root ::= nothing"}, "the grammar cannot be followed: .*nothing"),
        ({"json": "nonsense"}, "the JSON schema cannot be followed"),
        ({"regex": "(?=a)b"}, "cannot be followed: look-around, .* is not supported"),
        ({"regex": "(" * 5000}, "the regular expression cannot be followed: .{1,200}$"),
        ({"regex": r"[^\s\S]"}, "the regular expression cannot be followed: no answer matches it"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"choice": ["\ud800"]}, "surrogates not allowed"),
        ({"json_object": "yes"}, "json_object='yes' must be True or False"),
    ],
)
def test_forms_that_cannot_be(llm: LLM, form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        texts(llm, form)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE)
def test_forms_that_would_end_or_hang_the_process(llm: LLM, form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it is nested too deeply, or too much work; make it si"):
        texts(llm, form)


def test_large_forms_that_are_well(llm: LLM) -> None:
    properties = {f"name{i}": {"type": "string", "pattern": "^[a-z]{1,9}$"} for i in range(300)}
    wide = {"json": {"properties": properties, "required": ["name7"]}}
    for form in (
        chained(60),
        wide,
        {"choice": [f"{i}" for i in range(9000)]},
        {"regex": "|".join(f"{i}[ab]{{1,3}}" for i in range(3000))},
    ):
        params = SamplingParams(max_tokens=3, structured_outputs=StructuredOutputsParams(**form))
        assert llm.generate("Who ?", params)[0].finish_reason in ("stop", "length")


def test_a_form_needs_a_tokenizer() -> None:
    llm = LLM(tiny_model("llama"), policy="full", kv_memory="4MiB")
    form = StructuredOutputsParams(choice=["a"])
    with pytest.raises(ValueError, match="structured outputs need a tokenizer"):
        llm.generate([[5]], SamplingParams(structured_outputs=form))
    with pytest.raises(ValueError, match="skip_special_tokens=False needs a tokenizer"):
        llm.generate([[5]], SamplingParams(skip_special_tokens=False))
    with pytest.raises(ValueError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_min_tokens(llm: LLM) -> None:
    """No end token, stop id or stop string ends an answer before; then they do."""
    ends = {END: 100.0}  # an end token is what comes next, wherever it may
    first = llm.generate("Who ?", SamplingParams(max_tokens=20, logit_bias=ends))[0]
    assert first.token_ids == [END]
    for options in (
        {"logit_bias": ends},
        {"logit_bias": ends, "temperature": 1.0},
        {"logit_bias": ends, "ignore_eos": True, "stop_token_ids": [END]},
    ):
        params = SamplingParams(max_tokens=20, min_tokens=7, **options)
        (later,) = llm.generate("Who ?", params)
        assert later.finish_reason == "stop" and len(later.token_ids) == 8
        assert END not in later.token_ids[:7]
    plain = llm.generate("Who ?", SamplingParams(max_tokens=20, ignore_eos=True))[0]
    stop = plain.text[:1]
    stops = SamplingParams(max_tokens=20, ignore_eos=True, stop=[stop], min_tokens=9)
    (later,) = llm.generate("Who ?", stops)
    assert len(later.token_ids) > 9 and later.token_ids == plain.token_ids[: len(later.token_ids)]
    assert plain.text.startswith(later.text) and stop in later.text
    with pytest.raises(ValueError, match="min_tokens=5 is above max_tokens=4"):
        SamplingParams(max_tokens=4, min_tokens=5)
    with pytest.raises(ValueError, match="min_tokens=-1"):
        SamplingParams(min_tokens=-1)
    with pytest.raises(ValueError, match="min_tokens=2040: after a prompt of 20 tokens"):
        llm.generate([[5] * 20], SamplingParams(max_tokens=2040, min_tokens=2040))


def test_a_form_that_is_complete_ends_before_min_tokens(llm: LLM) -> None:
    assert set(texts(llm, {"choice": ["left", "right"]}, min_tokens=50)) <= {"left", "right"}
    for text in texts(llm, {"regex": "(ab)*"}, min_tokens=20, logit_bias={END: 100.0}):
        assert len(text) >= 20  # none of its tokens is longer than a letter


def test_special_tokens_are_told_where_asked_for(llm: LLM) -> None:
    """All but the one that ends the answer."""
    bias = {1: 100.0}
    for skip, wanted in ((True, ""), (False, "<s><s><s>")):
        params = SamplingParams(max_tokens=3, logit_bias=bias, skip_special_tokens=skip)
        assert llm.generate("Who ?", params)[0].text == wanted
        streamed = [each.text for each in llm.stream("Who ?", params)]
        assert streamed[-1] == wanted
        ended = SamplingParams(max_tokens=3, logit_bias={END: 100.0}, skip_special_tokens=skip)
        (answer,) = llm.generate("Who ?", ended)
        assert (answer.text, answer.token_ids) == ("", [END])


@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_prompt_logprobs(policy: str) -> None:
    """The model's own, of every prompt token that has others before it."""
    model = tiny_model("llama")
    llm = LLM(model, policy, kv_memory="16MiB", prefill_chunk=16, step_tokens=32)
    prompts = [random_prompt(1, 50), random_prompt(2, 9), [5]]
    outs = llm.generate(prompts, SamplingParams(max_tokens=3, prompt_logprobs=4))
    for prompt, out in zip(prompts, outs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = out.prompt_logprobs
        assert found is not None and found[0] is None and len(found) == len(prompt)
        for index, each in enumerate(found[1:], start=1):
            assert each is not None and each.token_id == prompt[index]
            row = logits[index - 1]
            assert each.logprob == pytest.approx(float(row[prompt[index]]), abs=1e-4)
            assert list(each.top) == row.topk(4).indices.tolist()
            assert row.sort(descending=True).indices[each.rank - 1] == prompt[index]
    assert VOCAB >= max(each.rank for each in outs[0].prompt_logprobs or [] if each) > 4
    assert llm.generate([[5]], SamplingParams(max_tokens=1))[0].prompt_logprobs is None


def test_prompt_logprobs_take_no_memory_by_the_length_of_the_prompt() -> None:
    """Logits are read a few at a time."""
    llm = LLM(tiny_model("llama", vocab_size=4000), "full", kv_memory="4MiB")
    prompt = random_prompt(3, 400)
    most, logits = [0], llm.engine.runner._logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        most[0] = max(most[0], len(hidden))
        return logits(hidden)

    llm.engine.runner._logits = counted  # type: ignore[method-assign]
    assert len(prompt) * 4000 * 4 > llm.engine.pool.budget, "as many logits would not fit"
    out = llm.generate([prompt], SamplingParams(max_tokens=2, prompt_logprobs=0))[0]
    assert len(out.prompt_logprobs or []) == 400 and most[0] <= 64


def test_prompt_logprobs_that_do_not_exist() -> None:
    llm = LLM(tiny_model("llama"), "full", kv_memory="4MiB")
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    with pytest.raises(ValueError, match="policy 'pyramid' drops prompt tokens between layers"):
        llm.generate([random_prompt(1, 50)], params, policy="pyramid")
    prefix = llm.prefill([5, 6, 7])
    with pytest.raises(ValueError, match="prompt_logprobs: tokens of a prefix or an earlier turn"):
        llm.generate([[8, 9]], params, prefix=prefix)
    with pytest.raises(ValueError, match="prompt_logprobs=-1"):
        SamplingParams(prompt_logprobs=-1)
