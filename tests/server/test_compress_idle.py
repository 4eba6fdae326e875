"""Conversations are recompressed while nobody asks; whoever asks then is served at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.engine.recompress import Recompressor
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.server.app import build_app
from pyramidinfer.server.settings import ServerSettings
from tests.server.live import STORY, Live, beside, serving, until
from tests.server.test_metrics import read

FIRST = STORY * 20
DONE, TOKENS = "pyramidinfer:recompressed_total", "pyramidinfer:recompressed_tokens_total"
#: Counters and gauges that tell of requests.
USERS = (
    "vllm:",
    "pyramidinfer:request",
    "pyramidinfer:kv_",
    "pyramidinfer:prefill",
    "pyramidinfer:peak",
    "pyramidinfer:reuse",
)


@pytest.fixture
def idle(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm, kv_memory="32MiB"), compress_idle=True) as live:
        yield live


def recompressor(live: Live) -> Recompressor:
    found = live.service.worker.recompressor
    assert found is not None
    return found


def ask(live: Live, *texts: str, **body: Any) -> dict[str, Any]:
    answer = live.chat(*texts, **{"max_tokens": 8, "ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def said(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_a_conversation_is_recompressed_and_taken_up(idle: Live) -> None:
    assert read(idle)[DONE] == read(idle)[TOKENS] == 0
    first = ask(idle, FIRST)
    length = first["usage"]["total_tokens"] - 1
    until(lambda: recompressor(idle).done == 1)
    values = read(idle)
    assert values[DONE] == 1 and values[TOKENS] >= 2 * length
    users = {name: value for name, value in values.items() if name.startswith(USERS)}
    assert users["vllm:request_success_total finished_reason=length"] == 1
    assert users["vllm:prompt_tokens_total"] == first["usage"]["prompt_tokens"]
    assert users["vllm:generation_tokens_total"] == 8
    assert users["vllm:e2e_request_latency_seconds_count"] == 1
    assert users["vllm:num_requests_running"] == users["vllm:kv_cache_usage_perc"] == 0
    assert users["pyramidinfer:peak_requests_running"] == 1
    assert users["pyramidinfer:prefill_tokens_reread_total"] == 0
    second = ask(idle, FIRST, said(first), "Where is the map ?")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == length
    kept = second["usage"]["kv_tokens_kept"]
    assert kept < 0.6 * second["usage"]["kv_tokens_full"]
    until(lambda: recompressor(idle).done == 2)
    assert read(idle)["pyramidinfer:pool_check_failures_total"] == 0


def test_what_was_not_dropped_is_left_alone(idle: Live) -> None:
    ask(idle, FIRST, compression={"policy": "full"})
    ask(idle, "Where ?")
    until(lambda: len(recompressor(idle)._tried) == 2)
    assert recompressor(idle).done == recompressor(idle).tokens == 0


def test_whoever_asks_in_the_middle_is_served_at_once(
    idle: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), list[int]()
    step = recompressor(idle).step

    def slow() -> bool:
        more = step()
        if recompressor(idle).tokens and not begun.is_set():
            begun.set()
            assert go_on.wait(60)
        return more

    monkeypatch.setattr(recompressor(idle), "step", slow)
    held = ask(idle, FIRST)
    assert begun.wait(60), "nothing was begun"
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, idle, "Where is the map ?")
        until(lambda: idle.service.worker.waiting)
        assert len(idle.engine.pool.tables) == 2
        submit = idle.engine.submit

        def submitting(request: Any) -> None:
            done.append(len(idle.engine.pool.tables))
            submit(request)

        monkeypatch.setattr(idle.engine, "submit", submitting)
        go_on.set()
        assert asked.result(60)["usage"]["completion_tokens"] == 8
    assert done == [1], "what was begun is dropped before anybody is let in"
    until(lambda: recompressor(idle).done == 1)
    again = ask(idle, FIRST, said(held), "Where ?")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 200


def test_a_fault_ends_nothing(idle: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        tried.append(1)
        if len(tried) == 1:
            raise RuntimeError("broken")
        return False

    tried = list[int]()
    monkeypatch.setattr(recompressor(idle), "step", broken)
    first = ask(idle, FIRST)
    until(lambda: len(tried) == 2)
    assert ask(idle, FIRST, said(first), "Where ?")["usage"]["completion_tokens"] == 8


def test_it_needs_conversations_that_are_held(llm: LLM) -> None:
    with pytest.raises(ValueError, match="compress_idle needs .* reuse_share above 0"):
        build_app(beside(llm, reuse_share=0.0), ServerSettings(compress_idle=True))


def test_it_needs_a_policy_that_compresses(llm: LLM) -> None:
    """The server's own, or one that a request may ask for."""
    full = LLM(shipped_model(), "full", kv_memory="4MiB", dtype="float32")
    only = ServerSettings(compress_idle=True, policies=("full",))
    with pytest.raises(
        ValueError, match="compress_idle has no effect .* only select full.*--policies"
    ):
        build_app(full, only)
    for policies in (("full", "snapkv"), None):
        build_app(full, replace(only, policies=policies))
    build_app(beside(llm), only)
