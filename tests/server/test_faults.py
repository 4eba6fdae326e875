"""What goes wrong: clients that leave, requests that fail, and connections that are none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from pyramidinfer import LLM
from pyramidinfer.engine import committing
from pyramidinfer.engine.grammar import GrammarConstraint, GrammarError
from pyramidinfer.engine.text import Detokenizer
from pyramidinfer.engine.worker import AsyncEngine, Followed, Stream
from pyramidinfer.server.run import _drain
from tests.server.live import STORY, Live, beside, connect, post, serving, until

LONG: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}


# --- clients that leave ---------------------------------------------------------------------------


@pytest.fixture
def steps(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many steps the engine made between a stream's end and its requests'."""
    made, closed, waited = [0], dict[int, int](), list[int]()
    step, close, abort = live.engine.step, Stream.close, live.service.worker.abort

    def counted() -> Any:
        made[0] += 1
        return step()

    def closing(stream: Stream) -> None:
        if stream.left:
            closed[id(stream)] = made[0]
        close(stream)

    def aborting(stream: Stream) -> None:
        abort(stream)
        assert all(each.cache is None for each in stream.requests)
        waited.append(made[0] - closed[id(stream)])

    monkeypatch.setattr(live.engine, "step", counted)
    monkeypatch.setattr(Stream, "close", closing)
    monkeypatch.setattr(live.service.worker, "abort", aborting)
    yield waited
    until(lambda: live.service.worker.is_idle)


def gone(live: Live) -> float:
    return float(live.service.metrics.disconnected._value.get())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "running"])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_frees_pages_within_a_step(
    live: Live, steps: list[int], stream: bool, when: str, n: int
) -> None:
    before = gone(live)
    body = {"prompt": STORY, **LONG, "stream": stream, "n": n}
    worker = live.service.worker
    with connect(live) as line:
        if when == "waiting":
            with live.held():
                post(line, "/v1/completions", body)
                until(lambda: worker.waiting == 1)
                line.close()
                until(lambda: gone(live) == before + 1)
        else:
            post(line, "/v1/completions", body)
            until(lambda: len(live.engine.scheduler.running) == n)
            if stream:
                assert line.recv(100)
    until(lambda: worker.is_idle)
    assert gone(live) == before + 1
    assert len(steps) == 1 and steps[0] <= 1
    live.settle()


def test_who_leaves_takes_nobody_along(live: Live, steps: list[int]) -> None:
    body = {"max_tokens": 150, "ignore_eos": True}
    alone = live.complete(**body).json()["choices"]
    with ThreadPoolExecutor() as pool:
        stays = pool.submit(live.complete, **body)
        for index in range(4):
            with connect(live) as line:
                post(line, "/v1/completions", {"prompt": STORY, **LONG, "stream": True})
                line.recv(100 * index + 1)
        assert stays.result().json()["choices"] == alone
    until(lambda: len(steps) == 4)


def test_a_stream_that_is_read_to_its_end_is_no_disconnect(live: Live) -> None:
    before = gone(live)
    for stream in (False, True):
        assert live.complete(stream=stream).status_code == 200
    assert live.complete("x", n=2, stream=True, stop="the").status_code == 200
    assert gone(live) == before


# --- requests that fail ---------------------------------------------------------------------------

MARK = 300  # a token that only the request that is to fail has in its prompt
GOOD = ["The name is Ada", "A list of words, numbers", "and signs"]


def marked(request: Any) -> bool:
    return MARK in request.prompt


class Together:
    """Requests of which one fails, all in the same steps."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def ask(self, prompt: Any, stream: bool) -> httpx.Response:
        body = {"max_tokens": 24, "ignore_eos": True, "compression": {"policy": "full"}}
        return self.live.complete(prompt, stream=stream, return_token_ids=True, **body)

    def run(self, stream: bool) -> tuple[list[Any], httpx.Response]:
        """Answers of the good ones, and that of the bad one."""
        worker = self.live.service.worker
        with ThreadPoolExecutor() as pool:
            with self.live.held():
                good = [pool.submit(self.ask, each, False) for each in GOOD]
                bad = pool.submit(self.ask, [5, MARK, 7, 8], stream)
                until(lambda: worker.waiting == 4)
            return [each.result().json()["choices"] for each in good], bad.result()


@pytest.fixture(scope="module")
def together(tiny: Live) -> tuple[Together, list[Any]]:
    """And what the good ones say when nothing fails."""
    group = Together(tiny)
    good, bad = group.run(False)
    assert bad.status_code == 200
    return group, good


def error_of(answer: httpx.Response, stream: bool) -> dict[str, Any]:
    """The error, in mid-stream or instead of an answer."""
    if not stream:
        assert answer.status_code == 500
        return dict(answer.json()["error"])
    assert answer.status_code == 200
    *before, last = [each.removeprefix("data: ") for each in answer.text.strip().split("\n\n")]
    assert len(before) == 3 and all(json.loads(each)["choices"] for each in before)
    return dict(json.loads(last)["error"])


def in_forward(live: Live, monkeypatch: pytest.MonkeyPatch, after: int, late: bool) -> None:
    """The model's pass fails for a request that got ``after`` tokens."""
    runner, engine = live.engine.runner, live.engine
    forward = runner.forward

    def failing(pool: Any, batch: Any) -> Any:
        done = forward(pool, batch) if late else None
        tables = [
            each.table for each in [*batch.decode, *(w.prefill.sequence for w in batch.works)]
        ]
        for request in [*engine.scheduler.running, *engine.scheduler.prefilling]:
            if marked(request) and len(request.output) == after and (request.table in tables):
                raise ArithmeticError("a kernel fell over")
        return done or forward(pool, batch)

    monkeypatch.setattr(runner, "forward", failing)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_pass_that_fails_is_one_requests_fault(
    together: tuple[Together, list[Any]], stream: bool, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, wanted = together
    in_forward(group.live, monkeypatch, after=3, late=late)
    good, bad = group.run(stream)
    assert good == wanted
    error = error_of(bad, stream)
    assert error["code"] == "request_failed"
    assert "ArithmeticError: a kernel fell over" in error["message"]
    monkeypatch.undo()
    assert group.run(stream)[0] == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_fails(
    together: tuple[Together, list[Any]], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything was streamed, so that the status tells."""
    group, wanted = together
    in_forward(group.live, monkeypatch, after=0, late=False)
    good, bad = group.run(stream)
    assert good == wanted
    assert "a kernel fell over" in error_of(bad, False)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_sampler_that_fails(
    together: tuple[Together, list[Any]], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, wanted = together
    sample = committing.sample

    def failing(logits: Any, request: Any, likeliest: int) -> Any:
        if marked(request) and len(request.output) == 3:
            raise RuntimeError("no token pleases")
        return sample(logits, request, likeliest)

    monkeypatch.setattr(committing, "sample", failing)
    good, bad = group.run(stream)
    assert good == wanted
    assert "RuntimeError: no token pleases" in error_of(bad, stream)["message"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers(
    together: tuple[Together, list[Any]],
    stream: bool,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, wanted = together
    engine = group.live.engine
    commit = engine.committer.commit

    def failing(plan: Any, stepped: Any, committed: Any) -> Any:
        logits = stepped.logits.clone()
        for row, request in enumerate(plan.decode):
            if marked(request) and len(request.output) == 3:
                logits[row, 7] = value
        return commit(plan, stepped._replace(logits=logits), committed)

    monkeypatch.setattr(engine.committer, "commit", failing)
    good, bad = group.run(stream)
    assert good == wanted
    assert (
        "the model's logits are not finite numbers (NaN or infinity)"
        in error_of(bad, stream)["message"]
    )


def test_a_grammar_that_fails_on_the_way(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out only then is still the schema's fault."""
    allowed, asked = GrammarConstraint.allowed, [0]

    def failing(self: GrammarConstraint, vocab_size: int) -> Any:
        asked[0] += 1
        if asked[0] > 4:
            raise GrammarError("the JSON schema cannot be followed: it is lost")
        return allowed(self, vocab_size)

    monkeypatch.setattr(GrammarConstraint, "allowed", failing)
    body = {"max_tokens": 50, "response_format": {"type": "json_object"}}
    answer = tiny.chat("Who ?", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "the JSON schema cannot be followed: it is lost"
    assert (error["param"], error["type"]) == ("response_format", "invalid_request_error")
    asked[0] = 0
    assert error_of(tiny.chat("Who ?", **body, stream=True), True) == error


def test_a_reused_cache_that_fails_is_done_without(
    tiny: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only extends a cache cannot be taken back; the answer is computed anew."""
    body: dict[str, Any] = {"compression": {"policy": "full"}, "ignore_eos": True}
    first = tiny.complete(GOOD[0], max_tokens=8, return_token_ids=True, **body).json()
    text = tiny.service.llm.tokenizer(GOOD[0])["input_ids"] + first["choices"][0]["token_ids"]
    wanted = tiny.complete(
        [*text, 9], max_tokens=8, **{**body, "compression": {"policy": "full", "reuse": False}}
    ).json()["choices"]
    engine, failed = tiny.engine, [0]
    forward = engine.runner.forward

    def failing(pool: Any, batch: Any) -> Any:
        if any(work.prefill.first for work in batch.works) and not failed[0]:
            failed[0] = 1
            raise ArithmeticError("once")
        return forward(pool, batch)

    make, protected = engine.make, []

    def made(*values: Any, **options: Any) -> Any:
        protected.append(options.get("protect"))
        return make(*values, **{"protect": ((0, 3),), **options})

    monkeypatch.setattr(engine.runner, "forward", failing)
    monkeypatch.setattr(engine, "make", made)
    answer = tiny.complete([*text, 9], max_tokens=8, **body)
    assert failed == [1] and answer.json()["choices"] == wanted
    assert protected == [None, ((0, 3),)]


def test_a_reused_cache_that_fails_later_does_not_begin_again(
    tiny: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told already cannot be told anew by a cache that is another one."""
    body: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    first = tiny.complete(GOOD[1], **body).json()
    text = tiny.service.llm.tokenizer(GOOD[1])["input_ids"] + first["choices"][0]["token_ids"]
    sample, failed = committing.sample, [0]

    def failing(logits: Any, request: Any, likeliest: int) -> Any:
        if request.reused and len(request.output) == 3 and not failed[0]:
            failed[0] = 1
            raise RuntimeError("once")
        return sample(logits, request, likeliest)

    monkeypatch.setattr(committing, "sample", failing)
    answer = tiny.complete([*text, 9], **body, stream=True)
    assert failed == [1]
    assert "RuntimeError: once" in error_of(answer, True)["message"]


def test_everything_fails_and_then_does_not(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Any:
        raise MemoryError("nothing is left")

    monkeypatch.setattr(tiny.engine, "step", failing)
    monkeypatch.setattr(tiny.engine, "step_singly", failing)
    for stream in (False, True):
        error = error_of(tiny.complete(stream=stream), False)
        assert "MemoryError: nothing is left" in error["message"]
    monkeypatch.undo()
    assert tiny.complete().status_code == 200


def test_an_engine_that_has_ended(llm: LLM) -> None:
    with serving(beside(llm), settles=False) as live:
        worker = live.service.worker

        def fall() -> None:
            raise ArithmeticError("out of the loop")

        with ThreadPoolExecutor() as pool:
            with live.held():
                waits = pool.submit(live.complete)
                until(lambda: worker.waiting == 1)
                worker.tell(fall)
            assert "engine has stopped" in error_of(waits.result(), False)["message"]
        until(lambda: not worker.is_alive)
        for path, code in (("/health", "engine_dead"), ("/ready", "stopping")):
            answer = live.http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert live.complete().status_code == 503


def test_an_engine_that_stands_still(llm: LLM) -> None:
    with serving(beside(llm), stall_timeout=0.1) as live, ThreadPoolExecutor() as pool:
        worker = live.service.worker
        until(lambda: worker.is_idle)
        worker._beat -= 10_000  # having had nothing to do is no standstill
        with live.held():
            waits = pool.submit(live.complete)
            until(lambda: worker.waiting == 1)
            assert worker.stalled_seconds < 5000
        assert waits.result().status_code == 200
        with live.held():
            waits = pool.submit(live.complete)
            until(lambda: live.http.get("/health").status_code == 503)
            assert live.http.get("/health").json()["error"]["code"] == "engine_stalled"
        assert waits.result().status_code == 200
        until(lambda: live.http.get("/health").status_code == 200)


def test_a_request_that_cannot_start_again_ends_alone() -> None:
    """The next one, lost in the same step, starts again all the same."""
    lost: list[Any] = [
        SimpleNamespace(prompt=[number], params=None, policy=None, protect=(), adapter=None)
        for number in range(2)
    ]
    for each in lost:
        each.reused, each.prefix, each.output, each.samples, each.leads = 4, 0, [], [], True
        each.times = SimpleNamespace(arrived=5.0)
    queued: list[Any] = []

    def make(prompt: list[int], params: Any, **options: Any) -> Any:
        if prompt == [0]:
            raise ValueError("there is no such adapter any more")
        return SimpleNamespace(prompt=prompt, times=SimpleNamespace(arrived=0.0))

    worker: Any = AsyncEngine.__new__(AsyncEngine)
    worker.engine = SimpleNamespace(lost=lost, make=make, submit=queued.append)
    worker._live = [SimpleNamespace(followed=[Followed(each)], again=False) for each in lost]
    worker._restart()
    first, second = (stream.followed[0].request for stream in worker._live)
    assert first is lost[0] and [second] == queued
    assert second.prompt == [1] and second.times.arrived == 5.0


# --- a tokenizer that raises ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, ["nowhere"]])
@pytest.mark.parametrize("stream", [False, True])
def test_text_that_cannot_be_decoded_fails_its_request_alone(
    live: Live, monkeypatch: pytest.MonkeyPatch, stop: list[str] | None, stream: bool
) -> None:
    """Wherever text is made: for an update, for a stop string, at the end."""
    body = {"max_tokens": 30, "ignore_eos": True}
    alone = live.complete(**body).json()["choices"]
    decode, marked = Detokenizer._decode, "harbour"

    def failing(self: Detokenizer, tokens: list[int]) -> str:
        text = decode(self, tokens)
        if len(self.text) > 30 and marked in decode(self, self._before):
            raise RuntimeError("no such word")
        return text

    monkeypatch.setattr(Detokenizer, "_decode", failing)
    with ThreadPoolExecutor() as pool:
        bad = {**body, "stop": stop, "stream": stream}
        doomed = pool.submit(live.complete, "The old baker walked to the harbour", **bad)
        assert live.complete(**body).json()["choices"] == alone
    answer = doomed.result()
    assert answer.status_code == (200 if stream else 500)
    assert "its tokens cannot be decoded: RuntimeError: no such word" in answer.text
    monkeypatch.undo()
    assert live.complete(**body).json()["choices"] == alone
    live.settle()


# --- draining -------------------------------------------------------------------------------------


def test_a_request_whose_text_is_being_cut_is_waited_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while a prompt becomes tokens, and nothing runs: it is answered all the same."""
    begun, go = threading.Event(), threading.Event()
    with serving(beside(llm)) as live, ThreadPoolExecutor() as pool:
        service = live.service
        completion = service.jobs.completion

        def held(*values: Any) -> Any:
            begun.set()
            assert go.wait(60)
            return completion(*values)

        monkeypatch.setattr(service.jobs, "completion", held)
        answer = pool.submit(live.complete)
        assert begun.wait(60)
        assert service.worker.is_idle and not service.is_idle
        server = SimpleNamespace(should_exit=False)
        drained = pool.submit(lambda: asyncio.run(_drain(server, service)))  # type: ignore[arg-type]
        until(lambda: service.draining)
        assert live.complete().status_code == 503
        assert not drained.done()
        go.set()
        drained.result()
        assert answer.result().status_code == 200


def test_texts_that_wait_to_be_cut_are_in_the_queue(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being prepared counts: past the limit it is 429, not a longer wait."""
    go = threading.Event()
    with serving(beside(llm), max_waiting=3) as live, ThreadPoolExecutor() as pool:
        completion = live.service.jobs.completion

        def held(*values: Any) -> Any:
            assert go.wait(60)
            return completion(*values)

        monkeypatch.setattr(live.service.jobs, "completion", held)
        waiting = [pool.submit(live.complete) for _ in range(3)]
        until(lambda: live.service.preparing == 3)
        refused = live.complete()
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        go.set()
        assert {each.result().status_code for each in waiting} == {200}
