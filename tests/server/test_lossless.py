"""Lossless requests over HTTP: answers of the full cache, whatever is guessed and whoever asks."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.engine import Engine
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Lossless, Policy, Pyramid, choose_policy, make_policy
from pyramidinfer.server.protocol_base import Compression
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings
from tests.server.live import STORY, Live, serving, tiny_llm

#: Long enough that what guesses read is not all of it.
FACT = "The archive of Mira Holt is in room 472 . "
LONG = STORY * 8 + FACT + STORY * 8
ASKED = {"prompt": LONG + "The archive of Mira Holt is in", "max_tokens": 24, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bea"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
OWN = Pyramid(keep=0.45, min_context=64)


def other(llm: LLM, policy: Policy, **options: Any) -> LLM:
    """The same model under another policy, in an engine of its own."""
    made = copy.copy(llm)
    config = EngineConfig(kv_memory="16MiB", **options)
    made.engine = Engine(llm.engine.runner, policy, config, llm.tokenizer)
    return made


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM(shipped_model(), "full", kv_memory="16MiB", dtype="float32", reuse_share=0.0)


@pytest.fixture(scope="module")
def full(model: LLM) -> Iterator[Live]:
    with serving(model) as live:
        yield live


@pytest.fixture(scope="module")
def lossless(model: LLM) -> Iterator[Live]:
    """All of its requests are lossless, with three guesses a step."""
    drafts = choose_policy("pyramid", lossless=True)
    with serving(other(model, drafts, draft_tokens=3, slot_scores=True)) as live:
        yield live


@pytest.fixture(scope="module")
def pyramid(model: LLM) -> Iterator[Live]:
    """Its requests are lossless where they ask for it."""
    with serving(other(model, OWN, draft_tokens=3, slot_scores=True)) as live:
        yield live


def told(answer: Any) -> Any:
    """The answer's choices."""
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def usage(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["usage"]
    return found


def chunks(live: Live, **body: Any) -> list[dict[str, Any]]:
    """A stream's chunks."""
    options = {"include_usage": True}
    asked = {"temperature": 0, **body, "stream": True, "stream_options": options}
    with live.http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def counted(live: Live, name: str) -> float:
    lines = live.http.get("/metrics").text.splitlines()
    (line,) = [each for each in lines if each.startswith(f"{name}{{")]
    return float(line.rsplit(" ", 1)[1])


# --- what it says ---------------------------------------------------------------------------------

BODIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": {"temperature": 0.9, "seed": 7},
    "top_p, penalties": {
        "temperature": 0.9,
        "seed": 7,
        "top_p": 0.8,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
    "stop": {"stop": ["the", "472"]},
    "logprobs": {"logprobs": 3},
    "echo": {"logprobs": 1, "echo": True},
    "texts": {"prompt": [ASKED["prompt"], LONG, STORY]},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("name", BODIES)
def test_it_says_what_full_says(name: str, full: Live, lossless: Live) -> None:
    body = {**ASKED, **BODIES[name]}
    wanted = full.complete(**body, return_token_ids=True)
    given = lossless.complete(**body, return_token_ids=True)
    assert told(given) == told(wanted)
    found = usage(given)
    assert found["kv_tokens_kept"] == found["kv_tokens_full"]
    assert found["completion_tokens"] == usage(wanted)["completion_tokens"]
    if name not in ("one token", "stop"):
        assert 0 <= found["accepted_tokens"] <= found["drafted_tokens"] and found["verifications"]
    assert "drafted_tokens" not in usage(wanted)


@pytest.mark.parametrize("body", [{}, {"temperature": 0.9, "seed": 3, "n": 2}, {"stop": ["storm"]}])
def test_streams_say_what_full_says(body: dict[str, Any], full: Live, lossless: Live) -> None:
    asked = {**ASKED, **body, "logprobs": 1}
    wanted, parts = full.complete(**asked), chunks(lossless, **asked)
    for choice in told(wanted):
        mine = [
            each for part in parts for each in part["choices"] if each["index"] == choice["index"]
        ]
        assert "".join(each["text"] for each in mine) == choice["text"]
        logprobs = [one for each in mine for one in each["logprobs"]["token_logprobs"]]
        assert logprobs == choice["logprobs"]["token_logprobs"]
        offsets = [one for each in mine for one in each["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert parts[-1]["usage"]["verifications"] > 0


def test_a_step_streams_all_tokens_that_it_gives(lossless: Live) -> None:
    parts = chunks(lossless, **ASKED, return_token_ids=True)
    sizes = [len(each["token_ids"]) for part in parts for each in part["choices"]]
    found = parts[-1]["usage"]
    assert sum(sizes) == 24 and found["accepted_tokens"] > 0
    assert len([size for size in sizes if size]) == 24 - found["accepted_tokens"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11, "n": 2}])
def test_structured_output(sampling: dict[str, Any]) -> None:
    tiny = tiny_llm()
    form = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
    body = {"response_format": form, "max_tokens": 60, "logprobs": True, **sampling}
    answers = []
    for policy in (make_policy("full"), choose_policy("pyramid", lossless=True)):
        with serving(other(tiny, policy, draft_tokens=3, page_size=4)) as live:
            answers.append(live.chat("Who is there? " * 12, **body))
    wanted, given = map(told, answers)
    assert given == wanted
    for choice in given:
        json.loads(choice["message"]["content"])
    assert usage(answers[1])["verifications"] > 0


def test_a_conversation_goes_on_with_its_cache(full: Live, lossless: Live) -> None:
    turns, cached = [LONG + "Where is the archive of Mira Holt ?"], []
    for _ in range(3):
        wanted, given = (live.chat(*turns, max_tokens=12) for live in (full, lossless))
        assert told(given) == told(wanted)
        cached.append(usage(given)["prompt_tokens_details"]["cached_tokens"])
        turns += [told(given)[0]["message"]["content"], "And now ?"]
    assert 0 == cached[0] < cached[1] < cached[2]


# --- request by request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [{}, {"keep": 0.2}, {"policy": "snapkv", "keep": 0.3}, {"policy": "full"}]
)
def test_a_server_that_drops_answers_losslessly_where_asked(
    asked: dict[str, Any], full: Live, pyramid: Live
) -> None:
    given = pyramid.complete(**ASKED, compression={"lossless": True, **asked})
    assert told(given) == told(full.complete(**ASKED))
    found = usage(given)
    assert found["kv_tokens_kept"] == found["kv_tokens_full"] and found["verifications"] > 0
    plain = usage(pyramid.complete(**ASKED))
    assert plain["kv_tokens_kept"] < plain["kv_tokens_full"] and "verifications" not in plain


def test_a_lossless_server_drops_where_asked(lossless: Live, pyramid: Live) -> None:
    asked = {"policy": "snapkv", "keep": 0.45}
    dropped = lossless.complete(**ASKED, compression={**asked, "lossless": False})
    assert told(dropped) == told(pyramid.complete(**ASKED, compression=asked))
    found = usage(dropped)
    assert found["kv_tokens_kept"] < found["kv_tokens_full"] and "verifications" not in found
    for asked in ({"lossless": None}, {"lossless": True}, {"keep": 0.3, "lossless": None}):
        assert usage(lossless.complete(**ASKED, compression=asked))["verifications"] > 0


def test_policy_and_keep_choose_what_is_read(lossless: Live, pyramid: Live) -> None:
    def found(live: Live, **asked: Any) -> tuple[bool, str, float | None]:
        policy = live.service.jobs.policy(Compression(**asked))
        drafts = policy.drafts if isinstance(policy, Lossless) else policy
        return isinstance(policy, Lossless), drafts.name, getattr(drafts, "keep", None)

    assert found(lossless) == (True, "pyramid", 0.1)
    assert found(lossless, keep=0.3) == (True, "pyramid", 0.3)
    assert found(lossless, policy="snapkv") == (True, "snapkv", 0.1)
    assert found(lossless, policy="full", keep=0.2) == (True, "pyramid", 0.2)
    assert found(lossless, lossless=False) == (False, "pyramid", 0.5)
    assert found(lossless, lossless=False, policy="full") == (False, "full", None)
    assert found(lossless, lossless=False, policy="h2o", keep=0.3) == (False, "h2o", 0.3)
    assert found(pyramid, lossless=False) == (False, "pyramid", 0.45)
    assert found(pyramid, lossless=True) == (True, "pyramid", 0.1)
    assert found(pyramid, lossless=True, policy="full") == (True, "pyramid", 0.1)
    assert found(pyramid, lossless=True, policy="tova") == (True, "tova", 0.1)
    policy = pyramid.service.jobs.policy(Compression(lossless=True, keep=0.2))
    assert isinstance(policy, Lossless) and isinstance(policy.drafts, Pyramid)
    assert policy.drafts.min_context == OWN.min_context  # the operator's options
    own = Lossless(make_policy("streaming_llm"))
    jobs = Service(other(lossless.service.llm, own), ServerSettings()).jobs
    chosen = jobs.policy(Compression(policy="snapkv"))
    assert isinstance(chosen, Lossless) and getattr(chosen.drafts, "keep", None) == 0.1


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"policy": "kvzip", "keep": 0.5}, ("'kvzip' reads the text again", "choose another one")),
        ({"policy": "h2o", "keep": 0.5}, ("'h2o' keeps a running score", "switch lossless off")),
        ({"policy": "snapkb"}, ("policy='snapkb'", "did you mean 'snapkv'")),
        ({"keep": 0.001}, ("keep=0.001 is outside",)),
        ({"lossless": "yes"}, ("lossless",)),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    asked: dict[str, Any], parts: tuple[str, ...], lossless: Live, pyramid: Live
) -> None:
    for live, body in ((lossless, asked), (pyramid, {"lossless": True, **asked})):
        answer = live.complete(compression=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "compression"
        for part in parts:
            assert part in error["message"]


def test_a_server_whose_requests_may_not_keep_all(model: LLM) -> None:
    for settings in ({"max_keep": 0.5}, {"policies": ("snapkv",)}):
        with serving(other(model, OWN), **settings) as live:
            answer = live.complete(compression={"lossless": True})
            message = answer.json()["error"]["message"]
            assert answer.status_code == 400 and "leave lossless out" in message
        with pytest.raises(ValueError, match=r"draft_tokens=2 has no effect .* allow 'full'"):
            Service(other(model, OWN, draft_tokens=2), ServerSettings(**settings))
        own = other(model, choose_policy("pyramid", lossless=True), draft_tokens=2)
        with serving(own, **settings) as live:
            assert "verifications" in usage(live.complete(compression={"keep": 0.3}))


def test_a_model_split_over_ranks(pyramid: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = pyramid.engine.shared
    split = replace(shared.config, draft_tokens=None, tensor_parallel_size=2)
    jobs = Service(other(pyramid.service.llm, OWN), ServerSettings()).jobs
    monkeypatch.setattr(jobs.engine.shared, "config", split)
    with pytest.raises(Exception, match="lossless works on one rank, and this is 2") as refused:
        jobs.policy(Compression(lossless=True))
    assert getattr(refused.value, "status", None) == 400
    with pytest.raises(ValueError, match="lossless works on one rank, and this is 2"):
        LLM(shipped_model(), lossless=True, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="draft_tokens=3 has no effect on 2 ranks"):
        EngineConfig(draft_tokens=3, pipeline_parallel_size=2)


# --- what is told ---------------------------------------------------------------------------------


def test_it_is_told(lossless: Live, pyramid: Live) -> None:
    for live, is_lossless in ((lossless, True), (pyramid, False)):
        (about,) = live.http.get("/v1/models").json()["data"]
        found = about["compression"]
        assert found["lossless"] is is_lossless and found["policy"] == "pyramid"
        assert found["keep"] == (0.1 if is_lossless else 0.45)
        assert ("nothing is dropped; drafts read what 'pyramid'" in found["rule"]) == is_lossless
        lines = live.http.get("/metrics").text.splitlines()
        (server,) = [line for line in lines if line.startswith("pyramidinfer:server_info{")]
        assert f'lossless="{str(is_lossless).lower()}"' in server and 'policy="pyramid"' in server


def test_guesses_are_counted(lossless: Live) -> None:
    fields = {
        "vllm:spec_decode_num_drafts_total": "verifications",
        "vllm:spec_decode_num_draft_tokens_total": "drafted_tokens",
        "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
        "vllm:generation_tokens_total": "completion_tokens",
        "vllm:inter_token_latency_seconds_count": "completion_tokens",
    }
    before = {name: counted(lossless, name) for name in fields}
    found = usage(lossless.complete(**ASKED, n=2))
    lossless.inside(lambda: None)  # the engine has published the last step
    for name, field in fields.items():
        firsts = 2 * name.endswith("_count")
        assert counted(lossless, name) - before[name] == found[field] - firsts, name
    assert 0 < found["accepted_tokens"] <= found["drafted_tokens"]
