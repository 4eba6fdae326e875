"""A few hundred requests that nobody would send; ``pyramidinfer bench fuzz`` sends thousands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.lab import fuzz
from pyramidinfer.lab.bench.serve_plan import FuzzPlan
from pyramidinfer.lab.fuzz_bodies import BODIES, tame
from pyramidinfer.server.settings import ServerSettings
from tests.cli.test_serve import settings_of
from tests.server.live import Live, beside, serving

ROOT = Path(__file__).parents[2]
LIMITS: dict[str, Any] = {
    "max_tokens_limit": 4,
    "default_max_tokens": 2,
    "max_prompt_tokens": 200,
    "max_n": 3,
    "max_body_bytes": 64 * 1024,
    "request_timeout": 20.0,
}


def test_nothing_is_a_5xx(llm: LLM) -> None:
    with serving(beside(llm), **LIMITS) as live:
        result = fuzz.fuzz(live.url, 200, seed=7)
    assert result["examples"] == [] and result["failures"] == 0
    assert result["cases"] == 200
    told, good = result["by_operation"], 0
    for path in BODIES:
        assert "400" in told[f"POST {path}"]["statuses"], path
        good += told[f"POST {path}"]["statuses"].get("200", 0)
    assert good >= 5
    assert sum(each["cases"] for name, each in told.items() if "(raw)" in name) >= 30
    assert {"GET /", "GET /health", "GET /v1/models/{model}"} <= set(told)


def test_stored_responses_are_continued() -> None:
    body = {"input": "x", "previous_response_id": "0", "model": "00", "n": 9}
    tame(body, ["base", "adapter-0"], "resp_1")
    assert body == {"input": "x", "previous_response_id": "resp_1", "model": "base", "n": 3}
    tame(body, ["base", "adapter-0"], "")
    assert "previous_response_id" not in body


def test_a_stored_response_is_noted(live: Live) -> None:
    tally = fuzz._Tally(live.url, live.http)
    for store in (True, False):
        body = {"input": "x", "max_output_tokens": 1, "store": store}
        answer = live.http.post("/v1/responses", json=body)
        tally.ask("POST /v1/responses", lambda given=answer: given, str)  # type: ignore[misc]
        if store:
            assert tally.stored == answer.json()["id"]
    assert tally.stored != answer.json()["id"] and tally.failed == 0


def test_what_is_wrong_is_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(beside(llm), **LIMITS) as live:

        def failing(tokens: Any) -> str:
            raise ArithmeticError("not today")

        monkeypatch.setattr(live.service.prompts, "decode", failing)
        result = fuzz.fuzz(live.url, 100, seed=7)
        monkeypatch.undo()
    assert result["failures"] > 0
    assert any("/detokenize" in example["operation"] for example in result["examples"])
    for example in result["examples"]:  # echo says token ids as text, too
        assert example["wrong"].startswith(("status 500", "no answer"))  # and the line is closed
        assert "curl" in example["reproduce"]
    assert any("status 500" in example["wrong"] for example in result["examples"])


def test_the_command_has_these_limits() -> None:
    assert settings_of(FuzzPlan().words) == ServerSettings(port=0, **LIMITS)


def test_the_published_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text())
    result = entry["result"]
    assert result["cases"] >= 10_000
    assert result["failures"] == result["pool_check_failures"] == result["exit_code"] == 0
    assert sum(each["cases"] for each in result["by_operation"].values()) == result["cases"]
    assert "200" in result["by_operation"]["POST /v1/responses"]["statuses"]
