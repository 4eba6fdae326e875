"""Overcommitted memory, over HTTP: whoever is put off is answered as if nothing had been."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving, until

BODY: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "compression": {"policy": "full"}}
SHORT = {"kv_memory": "8MiB", "admission": "overcommit", "expected_output": 0.1}


def counter(live: Live, name: str) -> float:
    lines = live.http.get("/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith(f"{name}{{")]
    return float(found.split()[-1])


def ask(live: Live, index: int, **extra: Any) -> Any:
    return live.complete(f"{STORY * (index + 1)}{index}", **{**BODY, **extra})


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_everybody_is_answered_as_alone(llm: LLM, how: str) -> None:
    with serving(beside(llm)) as roomy:
        wanted = [ask(roomy, index).json()["choices"] for index in range(8)]
    with (
        serving(beside(llm, **SHORT, preempt=how, host_kv_memory="32MiB")) as live,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(lambda index: ask(live, index), range(8)))
        assert [each.status_code for each in answers] == [200] * 8
        assert counter(live, "vllm:num_preemptions_total") > 0
        assert counter(live, f"pyramidinfer:{how}{'ped' if how == 'swap' else 'd'}_total") > 0
        assert counter(live, "vllm:num_requests_swapped") == 0
        assert counter(live, "pyramidinfer:swapped_bytes") == 0
    if how == "swap":  # computed anew, prefill rounds otherwise
        assert [each.json()["choices"] for each in answers] == wanted


def test_who_leaves_or_is_late_while_put_off_leaves_nothing(llm: LLM) -> None:
    with serving(beside(llm, **SHORT, host_kv_memory="32MiB"), request_timeout=0.7) as live:
        long = {"max_tokens": 1000, "stream": True}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda index: ask(live, index, **long), range(8)))
        assert {each.status_code for each in answers} <= {200, 504}
        until(lambda: live.service.is_idle)
        assert not live.inside(lambda: live.engine.scheduler.preempted)


def test_no_more_begin_than_host_memory_can_take(llm: LLM) -> None:
    """At their worst all that have begun fit into both memories, whatever was expected."""
    with (
        serving(beside(llm, **SHORT, host_kv_memory="2MiB")) as live,
        ThreadPoolExecutor(8) as pool,
    ):
        most, step = [0], live.engine.step

        def watched() -> Any:
            scheduler = live.engine.scheduler
            begun = [*scheduler.running, *scheduler.prefilling, *scheduler.preempted]
            most[0] = max(most[0], sum(each.cost.after_prefill.bytes for each in begun))
            return step()

        live.engine.step = watched  # type: ignore[method-assign]
        answers = list(pool.map(lambda index: ask(live, index), range(8)))
        assert [each.status_code for each in answers] == [200] * 8
        assert 8 * 2**20 < most[0] <= 10 * 2**20


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_tells_that_its_keep_was_lowered(llm: LLM, usage: bool) -> None:
    """In the chunk that ends a choice; in the usage, too, where that is asked for."""
    body: dict[str, Any] = {"stream": True, "max_tokens": 300, "compression": {"keep": 0.8}}
    if usage:
        body["stream_options"] = {"include_usage": True}
    with (
        serving(beside(llm, **{**SHORT, "kv_memory": "3MiB"}, elastic=0.2)) as live,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(lambda index: ask(live, index + 8, **body), range(8)))
        assert counter(live, "pyramidinfer:tightened_total") > 0
    lowered = 0
    for answer in answers:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        told = [each["kv_keep_lowered_to"] for each in chunks if "kv_keep_lowered_to" in each]
        if told:
            (ends,) = [e for e in chunks if e["choices"] and e["choices"][0]["finish_reason"]]
            assert told == [ends["kv_keep_lowered_to"]] and 0.2 <= told[0] < 0.8
            lowered += 1
        if usage:
            assert [chunks[-1]["usage"].get("kv_keep_lowered_to")] == (told or [None])
    assert lowered
