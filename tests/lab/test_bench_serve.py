"""The load side of the server's benches: arrivals, streams, figures, limits; and a small run."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pyramidinfer.cli.app import main
from pyramidinfer.lab.bench import serve
from pyramidinfer.lab.bench.load import Leave, Record, arrival_times, ask, offer
from pyramidinfer.lab.bench.serve import check_tokens, chosen_ids, figures, meets, percentiles
from pyramidinfer.lab.bench.serve_plan import ServePlan, ServerSetting, SoakPlan, TurnsPlan
from pyramidinfer.lab.bench.served import Remote, Served, parse_metrics
from pyramidinfer.lab.numbers_serving import SECTIONS


def answered(
    due: float = 0.0, first: float = 0.5, tokens: int = 5, gap: float = 0.1, **more: Any
) -> Record:
    """A whole answer."""
    arrivals = [first + gap * token for token in range(tokens)]
    return Record(
        due=due,
        sent=due,
        ended=arrivals[-1],
        status=200,
        done=True,
        arrivals=arrivals,
        finish={0: "length"},
        **more,
    )


# --- arrivals -------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    due = arrival_times(4.0, 4000, seed=1)
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    assert arrival_times(4.0, 4000, seed=1) == due != arrival_times(4.0, 4000, seed=2)
    assert arrival_times(8.0, 4000, seed=1) == pytest.approx([at / 2 for at in due])


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(float("inf"), 5, seed=0) == [0.0] * 5
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            arrival_times(rate, 5, seed=0)


# --- one stream -----------------------------------------------------------------------------------


class Pieces(httpx.AsyncByteStream):
    """An answer that arrives in pieces."""

    def __init__(self, pieces: list[bytes], wait: asyncio.Event | None = None) -> None:
        self.pieces, self.wait, self.is_closed = pieces, wait, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.wait is not None:
            await self.wait.wait()

    async def aclose(self) -> None:
        self.is_closed = True


def chunk(
    text: str = "", ids: tuple[int, ...] = (), finish: str | None = None, **more: Any
) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more}, ensure_ascii=False)}\n\n".encode()


def asked(answer: Callable[[], httpx.Response], leave: Leave | None = None) -> Record:
    async def run() -> Record:
        transport = httpx.MockTransport(lambda request: answer())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await ask(http, "/v1/completions", {"prompt": [1]}, leave=leave)

    return asyncio.run(run())


def test_a_stream_is_read_whole_however_it_is_torn() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}
    whole = b"".join(
        [
            chunk("a\u2028b", (5,)),
            chunk("", (6,)),
            b": a comment\n\n",
            chunk("ü", (7,), "length"),
            f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode(),
            b"data: [DONE]\n\n",
        ]
    )
    for size in (1, 7, len(whole)):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        record = asked(lambda pieces=pieces: httpx.Response(200, stream=Pieces(pieces)))
        assert record.outcome == "completed" and record.why == ""
        assert record.text == "a\u2028bü" and record.tokens == [5, 6, 7]
        assert len(record.arrivals) == 3 and record.arrivals == sorted(record.arrivals)
        assert record.output_tokens == 3 and record.finish == {0: "length"}
        assert record.usage == usage
        assert 0 <= record.sent <= record.arrivals[0] <= record.ended


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([chunk("a", (5,), "length")], "without [DONE]"),
        ([chunk("a", (5,)), b"data: [DONE]\n\n"], "without a finish_reason"),
        ([chunk("a", (5,)), b'data: {"error": {"message": "it broke"}}\n\n'], "it broke"),
        ([b'data: {"choices": [{"te\n\n'], "not a chunk"),
        ([], "without [DONE]"),
    ],
)
def test_a_stream_that_does_not_end_well_has_failed(pieces: list[bytes], why: str) -> None:
    record = asked(lambda: httpx.Response(200, stream=Pieces(pieces)))
    assert record.outcome == "failed" and why in record.why


def test_statuses_are_told_apart() -> None:
    def error(status: int, **more: Any) -> Record:
        return asked(lambda: httpx.Response(status, json={"error": {"message": "no"}}, **more))

    full = error(429, headers={"Retry-After": "3"})
    assert (full.outcome, full.retry_after) == ("refused", "3")
    assert (error(503).outcome, error(503).why) == ("failed", "no")
    plain = asked(lambda: httpx.Response(500, text="trace"))
    assert (plain.outcome, plain.why) == ("failed", "trace")

    def dead() -> httpx.Response:
        raise httpx.ConnectError("nobody there")

    assert (asked(dead).status, asked(dead).why) == (0, "ConnectError: nobody there")


@pytest.mark.parametrize("leave", [Leave(chunks=2), Leave(seconds=0.05)])
def test_a_client_that_leaves_hangs_up(leave: Leave) -> None:
    async def run() -> tuple[Record, Pieces]:
        stream = Pieces([chunk("a", (5,)), chunk("b", (6,))], asyncio.Event())  # and then nothing
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=stream))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await ask(http, "/v1/completions", {}, leave=leave), stream

    record, stream = asyncio.run(run())
    assert record.outcome == "left" and stream.is_closed
    assert len(record.arrivals) == 2


def test_arrivals_do_not_wait_for_answers() -> None:
    """Nobody is answered before all have asked, as an open load must bear."""

    async def run() -> list[Record]:
        here = 0
        all_here = asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            nonlocal here
            here += 1
            if here == 6:
                all_here.set()
            await all_here.wait()
            return httpx.Response(
                200, stream=Pieces([chunk("a", (5,), "stop"), b"data: [DONE]\n\n"])
            )

        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            due = [0.01 * number for number in range(6)]
            return await asyncio.wait_for(offer(http, "/", [{}] * 6, due), 60)

    records = asyncio.run(run())
    assert [record.outcome for record in records] == ["completed"] * 6
    assert [record.due for record in records] == [0.01 * number for number in range(6)]
    for record in records:  # the first was made to wait by the last, and its figure says so
        assert record.sent >= record.due
        assert record.arrivals[0] >= records[-1].sent


# --- figures --------------------------------------------------------------------------------------


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3.0, "p99": 3.0, "max": 3.0}
    found = percentiles([float(value) for value in range(101)])
    assert found == {"p50": 50.0, "p99": 99.0, "max": 100.0}


def test_what_meets_the_limits() -> None:
    assert meets(answered(first=1.0, gap=0.1), 1.0, 0.1 + 1e-9)
    assert not meets(answered(first=1.01), 1.0, 1.0)
    assert not meets(answered(gap=0.11), 1.0, 0.1)
    late = answered(due=1.0, first=2.5)  # on the load's clock
    assert not meets(late, 1.0, 1.0) and meets(late, 1.5, 1.0)
    assert meets(answered(tokens=1), 1.0, 1e-9)  # nothing between tokens
    uneven = answered(tokens=3, gap=0.0)
    uneven.arrivals = [0.5, 0.6, 1.0]  # 0.25 a token, though one took 0.4
    assert meets(uneven, 1.0, 0.25 + 1e-9) and not meets(uneven, 1.0, 0.24)
    for unfinished in (
        Record(status=429),
        Record(status=500, error="x"),
        Record(status=200, arrivals=[0.1]),
    ):
        assert not meets(unfinished, 1.0, 1.0)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Not from when it was sent: a client that is held up must not hide the queue."""
    held_up = answered(due=1.0, first=3.0)
    held_up.sent = 2.9
    found = figures([held_up], 4.0, slo_ttft=1.0, slo_itl=1.0)
    assert found["first_token_seconds"]["p50"] == pytest.approx(2.0)
    assert found["client_late_seconds"]["max"] == pytest.approx(1.9)
    assert found["good"] == 0


def test_figures_of_a_pass() -> None:
    records = [
        answered(first=0.5, tokens=5, gap=0.1),
        answered(due=1.0, first=3.0, tokens=5, gap=0.2),
        Record(due=1.5, sent=1.5, ended=1.6, status=429),
        Record(due=1.5, sent=1.5, ended=1.6, status=500, error="it broke"),
    ]
    found = figures(records, 10.0, slo_ttft=1.0, slo_itl=0.15)
    assert found["requests"] == 4
    assert (found["completed"], found["refused"], found["failed"]) == (2, 1, 1)
    assert found["failures"] == {"it broke": 1}
    assert found["output_tokens_per_second"] == 1.0 and found["requests_per_second"] == 0.2
    assert (found["good"], found["goodput"]) == (1, 0.1)
    assert found["first_token_seconds"]["max"] == pytest.approx(2.0)
    assert found["inter_token_seconds"]["p50"] == pytest.approx(0.15)
    nothing = figures(records[2:], 10.0, 1.0, 0.15)
    assert nothing["first_token_seconds"] is None and nothing["goodput"] == 0
    json.dumps(found, allow_nan=False)


def test_an_answer_of_another_length_has_failed() -> None:
    whole, short = answered(tokens=5), answered(tokens=4)
    for record in (whole, short):
        check_tokens(record, 5)
    assert whole.outcome == "completed"
    assert short.outcome == "failed" and short.why == "generated 4 tokens instead of 5"


def test_concurrency_is_compared_with_the_first_policy() -> None:
    rows = [
        {"policy": "full", "peak_running": 4.0},
        {"policy": "pyramid", "peak_running": 5.0},
        {"policy": "full", "peak_running": 3.0},
        {"policy": "pyramid", "peak_running": 10.0},
    ]
    assert serve._concurrency(rows) == [
        {"policy": "full", "peak_running": 4.0, "against_first": 1.0},
        {"policy": "pyramid", "peak_running": 10.0, "against_first": 2.5},
    ]
    assert serve._concurrency([{"policy": "the server's", "peak_running": None}]) == []


# --- what they are told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (ServePlan(ServerSetting(policies=())), "--policies is empty"),
        (ServePlan(ServerSetting(policies=("full", "full"))), "names one twice"),
        (ServePlan(ServerSetting(policies=("ful",))), "did you mean 'full'"),
        (ServePlan(ServerSetting(url="localhost:8000")), "write http://HOST:PORT"),
        (ServePlan(ServerSetting(kv_memory="lots")), "'lots' is not a size"),
        (ServePlan(ServerSetting(keep=2.0)), "keep=2.0"),
        (ServePlan(ServerSetting(timeout=0)), "--timeout 0"),
        (ServePlan(ServerSetting(options="a 'b")), '--serve-options "a \'b": no closing'),
        (ServePlan(ServerSetting(), rates=(1.0, 0.0)), "--rates: 0 must be above 0"),
        (ServePlan(ServerSetting(), requests=0), "--requests 0"),
        (ServePlan(ServerSetting(), output_len=1), "--output-len 1"),
        (ServePlan(ServerSetting(), slo_ttft=0.0), "--slo-ttft 0"),
        (TurnsPlan(ServerSetting(), turns=0), "--turns 0"),
        (TurnsPlan(ServerSetting(), warmup=-1), "--warmup -1"),
        (SoakPlan(clients=0), "--clients 0"),
        (SoakPlan(seconds=0), "--seconds 0"),
        (SoakPlan(reuse_share=1.5), "--reuse-share 1.5"),
    ],
)
def test_wrong_values_are_shown(plan: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan.check()


def test_a_servers_command_and_a_requests_wish() -> None:
    setting = ServerSetting(policies=("full", "snapkv:window=8,keep=.3"), options="--max-waiting 9")
    tail = ["--max-waiting", "9"]
    assert setting.words("full") == [
        "--port",
        "0",
        "--policy",
        "full",
        "--kv-memory",
        "64MiB",
        *tail,
    ]
    assert setting.words("snapkv:window=8,keep=.3")[2:] == [
        "--policy",
        "snapkv",
        "--kv-memory",
        "64MiB",
        "--keep",
        "0.3",
        "--option",
        "window=8",
        *tail,
    ]
    assert setting.compression("full") == {}  # its server knows
    there = ServerSetting(url="http://127.0.0.1:1", policies=("pyramid",))
    assert there.compression("pyramid") == {"policy": "pyramid", "keep": 0.45}
    assert there.compression("the server's") == {}
    with pytest.raises(ValueError, match="a request may choose a policy's keep only"):
        there.compression("snapkv:window=8")


def test_metrics_are_added_up_by_name() -> None:
    text = """# HELP x what it is
# TYPE x gauge
x{model_name="a b",reason="stop"} 2
x{model_name="a b",reason="length"} 3.5
y 1e3
vllm:num_requests_running{model_name="m"} 4
"""
    assert parse_metrics(text) == {"x": 5.5, "y": 1000.0, "vllm:num_requests_running": 4.0}


def test_token_ids() -> None:
    nobody = Remote("http://127.0.0.1:9")
    assert chosen_ids(nobody, "3-6") == [3, 4, 5, 6]
    for given in ("3", "6-3", "a-b"):
        with pytest.raises(ValueError, match=f"--token-ids '{given}': write LOW-HIGH"):
            chosen_ids(nobody, given)
    with pytest.raises(ValueError, match="give them: --token-ids"):
        chosen_ids(nobody, None)
    with pytest.raises(ValueError, match=r"no model is served at http://127\.0\.0\.1:9"):
        nobody.model()


def test_a_server_that_does_not_start_says_why() -> None:
    program = (sys.executable, "-c", "import sys; sys.exit('error: no such model')")
    with pytest.raises(ValueError, match="did not start: no such model"):
        Served([], program=program).ready()


# --- pages ----------------------------------------------------------------------------------------


def test_sections_of_results_made_elsewhere() -> None:
    machine = {"processor": "x", "cores": 2, "threads": 2, "torch": "2", "transformers": "5"}
    head = {"commit": "abc", "machine": machine}
    row = {
        "policy": "full",
        "rate": 2.0,
        "completed": 13,
        "errors": 1,
        "cut_off": 1,
        "error_words": ["429 Too Many Requests"],
        "first_token_ms": {"p50": 64.2, "p99": 1074.0},
        "concurrency": 0.44,
        "inter_token_ms": {"p50": 1.58, "p99": 3.0},
        "output_tokens_per_second": 139.1,
        "requests_per_second": 2.17,
    }
    rows = [{**row, "rate": 8.0, "policy": "pyramid"}, row]
    configuration = {
        "prompt_len": 1000,
        "output_len": 64,
        "seconds": 15.0,
        "kv_memory": "64MiB",
        "keep": 0.45,
    }
    result = {"version": "guidellm==0.8.1", "rows": rows}
    page = SECTIONS["guidellm"]({**head, "configuration": configuration, "result": result})
    assert "guidellm 0.8.1" in page
    line = "| 2 | `full` | 13 | 1 | 1 | 64 / 1,074 | 1.6 / 3.0 | 139 | 2.17 | 0.4 |"
    assert 0 < page.index(line) < page.index("| 8 | `pyramid` |")
    assert "Errors: 429 Too Many Requests." in page
    fuzzed = {"cases": 10000, "failures": 0, "seconds": 61.2}
    made = "python -m pyramidinfer.lab.fuzz --cases 10000 --json out.json"
    page = SECTIONS["fuzz"](
        {**head, "command": made, "configuration": {"cases": 10000}, "result": fuzzed}
    )
    assert "10,000 requests in 61 seconds" in page and "**0 failures**" in page
    assert f"```bash\n{made}\n```" in page


# --- against the server ---------------------------------------------------------------------------


def bench(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """A bench as a user runs it."""
    out = folder / f"bench_{name}.json"
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "bench", name, "--json", str(out), *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    entry: dict[str, Any] = json.loads(out.read_text())
    assert {"commit", "machine", "configuration", "result"} <= entry.keys()
    return entry


def test_serve_counts_what_a_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = bench(
        "serve",
        tmp_path,
        monkeypatch,
        "--rates",
        "50,inf",
        "--requests",
        "6",
        "--prompt-len",
        "200",
        "--output-len",
        "4",
        "--kv-memory",
        "2MiB",
        "--threads",
        "1",
        "--slo-ttft",
        "1e-6",
    )
    rows = entry["result"]["rows"]
    assert [(row["policy"], row["rate"]) for row in rows] == [
        ("full", 50.0),
        ("pyramid", 50.0),
        ("full", "inf"),
        ("pyramid", "inf"),
    ]
    for row in rows:
        assert (row["completed"], row["refused"], row["failed"]) == (6, 0, 0), row["failures"]
        assert row["output_tokens_per_second"] * row["seconds"] == pytest.approx(24)
        assert 0 < row["first_token_seconds"]["p50"] <= row["request_seconds"]["p50"]
        assert row["good"] == 0  # nobody answers in a microsecond
    full, pyramid = entry["result"]["concurrency"]
    assert 1 <= full["peak_running"] <= 6 and 1 <= pyramid["peak_running"] <= 6
    assert pyramid["against_first"] == pyramid["peak_running"] / full["peak_running"]
    page = SECTIONS["bench_serve"](entry)
    assert "the shipped model" in page and page.count("\n| inf |") == 2
    assert f"```bash\n{entry['command']}\n```" in page and "--rates 50,inf" in entry["command"]
    assert "at once" in capsys.readouterr().out


def test_turns_take_up_the_cache_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = bench(
        "turns",
        tmp_path,
        monkeypatch,
        "--policies",
        "pyramid",
        "--turns",
        "3",
        "--prompt-len",
        "120",
        "--turn-len",
        "10",
        "--output-len",
        "6",
        "--conversations",
        "2",
        "--kv-memory",
        "8MiB",
        "--threads",
        "1",
    )
    rows = entry["result"]["rows"]
    assert [row["prompt_tokens"] for row in rows] == [120, 136, 152]
    assert [row["reused"] for row in rows] == [0, 2, 2]
    assert [row["cached_tokens"]["reuse"]["median"] for row in rows] == [0, 125, 141]
    assert {row["cached_tokens"]["anew"]["max"] for row in rows} == {0}
    page = SECTIONS["bench_turns"](entry)
    assert page.count("| `pyramid` |") == 3 and "| 2 of 2 | 125 |" in page
    assert "times faster" in capsys.readouterr().out
