"""Two replicas under real Ray: the same answers as the server's own, and what a lost one costs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pyramidinfer.integrations.replicas import SESSION_HEADER
from pyramidinfer.lab.bench.replicas import ReplicasPlan, _processes, cluster

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
ROOT = Path(__file__).parents[1]
STORY = "The old baker walked to the market . "
LONG = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    plan = ReplicasPlan(kv_memory="64MiB")
    with cluster(plan):
        yield plan.url


def ask(url: str, path: str = "completions", session: str = "", **body: Any) -> httpx.Response:
    headers = {SESSION_HEADER: session} if session else {}
    return httpx.post(f"{url}/v1/{path}", json=body, headers=headers, timeout=120, trust_env=False)


def homes(url: str) -> dict[str, list[str]]:
    """Four sessions of each of two replicas."""
    found: dict[str, list[str]] = {}
    for number in range(60):
        answer = ask(url, session=f"s{number}", prompt=STORY, max_tokens=1)
        found.setdefault(answer.headers["x-replica"], []).append(f"s{number}")
        if len(found) == 2 and min(map(len, found.values())) >= 4:
            break
    assert len(found) == 2
    return {name: sessions[:4] for name, sessions in found.items()}


def both_run(url: str) -> None:
    """Wait until two engines answer."""
    for _ in range(240):
        if len(_processes("engine")) == 2:
            seen = {
                ask(url, session=f"w{i}", prompt="x").headers.get("x-replica") for i in range(9)
            }
            if len(seen - {None}) == 2:
                return
        time.sleep(0.5)
    raise AssertionError("no second replica came back")


def test_routes_errors_and_limits_are_the_servers(url: str) -> None:
    for path in ("/health", "/ready", "/version", "/v1/models", "/", "/metrics"):
        assert httpx.get(url + path, timeout=60).status_code == 200, path
    missing = httpx.get(f"{url}/nope", timeout=60)
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "there is no GET /nope here"
    assert ask(url, prompt=STORY, bogus=1).json()["error"]["message"] == "unknown parameter 'bogus'"
    large = httpx.post(f"{url}/v1/completions", content=b"x" * (5 << 20), timeout=60)
    assert large.status_code == 413 and "larger than" in large.json()["error"]["message"]
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"prompt": STORY, "max_tokens": 5, "stream": True, "ignore_eos": True},
        timeout=60,
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert len(lines) == 6 and lines[-1] == "data: [DONE]"


def test_a_conversation_finds_its_cache(url: str) -> None:
    for number in range(8):
        question = f"The harp of Ada Holt is in room {number} . Where is the harp of Ada Holt ?"
        messages = [{"role": "user", "content": question}]
        first = ask(url, "chat/completions", messages=messages, temperature=0)
        said = first.json()["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Why ?"}]
        second = ask(url, "chat/completions", messages=messages, temperature=0)
        assert first.headers["x-replica"] == second.headers["x-replica"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_lost_replica_costs_its_requests_a_503(url: str) -> None:
    """Answers in progress end with an error that says so, streamed or not; the other replica's
    answers end as ever, and new requests are answered at once."""
    by_replica = homes(url)
    sessions = [each for four in by_replica.values() for each in four]

    def whole(session: str) -> httpx.Response:
        return ask(url, session=session, prompt=STORY, **LONG)

    def streamed(session: str) -> tuple[str, list[str]]:
        body = {"prompt": STORY, "stream": True, **LONG}
        headers = {SESSION_HEADER: session}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120
        ) as answer:
            return answer.headers["x-replica"], [line for line in answer.iter_lines() if line]

    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(whole, each) for each in sessions]
        streams = [threads.submit(streamed, each) for each in sessions]
        time.sleep(1)
        assert not any(each.done() for each in (*answers, *streams))
        _processes("engine")[0].send_signal(signal.SIGKILL)
        fresh = ask(url, session="fresh", prompt=STORY, max_tokens=3)
        assert fresh.status_code in (200, 503)
        codes = [each.result() for each in answers]
        told = [each.result() for each in streams]
    lost = [each for each in codes if each.status_code == 503]
    assert len(lost) == 4 and {each.status_code for each in codes} == {200, 503}
    for each in lost:
        assert each.json()["error"]["code"] == "replica_lost" and each.headers["retry-after"] == "1"
    ends = {name: {lines[-1] for each, lines in told if each == name} for name, _ in told}
    errors = [line for lines in ends.values() for line in lines if line != "data: [DONE]"]
    assert len(ends) == 2 and len(errors) == 1
    assert json.loads(errors[0].removeprefix("data: "))["error"]["code"] == "replica_lost"
    both_run(url)


def test_a_client_that_goes_away_ends_its_request(url: str) -> None:
    body = {"prompt": STORY, "stream": True, **LONG}
    headers = {SESSION_HEADER: "leaves"}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
    ) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        text = httpx.get(f"{url}/metrics", headers=headers, timeout=60).text
        if re.search(r"^vllm:num_requests_running\S* 0(\.0)?$", text, re.MULTILINE):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("its request still runs")
    assert re.search(r"^pyramidinfer:client_disconnects_total\S* [1-9]", text, re.MULTILINE)


# --- Ray Data -------------------------------------------------------------------------------------

WORDS = ["min_replicas=2", "max_replicas=2", "num_cpus=0.5", "kv_memory=64MiB"]
BATCH = """
import sys, ray
ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False,
         _system_config={"worker_niceness": 0})
from pyramidinfer.integrations.ray_data import main
sys.exit(main(sys.argv[1:]))
"""


def begin(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    program = [sys.executable, "-c", BATCH, *words]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_batch_goes_on_after_a_kill_with_the_rows_of_batch(tmp_path: Path) -> None:
    """The run is killed, begun again, loses an engine, and ends with one line a request; the
    command ``batch`` finds nothing left to do in its file."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": STORY, "max_tokens": 200, "ignore_eos": True, "temperature": 0}] * 200
    bodies[199] = {"prompt": STORY, "bogus": 1}
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def written() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    def until_more(run: subprocess.Popen[str], than: int) -> None:
        while written() <= than:
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.05)

    first = begin(str(source), str(target), *WORDS)
    until_more(first, 0)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    for each in family:
        if each.is_running():
            each.kill()
    done = written()
    assert 0 < done < 200
    second = begin(str(source), str(target), *WORDS)
    until_more(second, done)
    workers = psutil.Process(second.pid).children(recursive=True)
    engines = [each for each in workers if "MapWorker" in " ".join(each.cmdline())]
    engines[0].kill()
    _, told = second.communicate(timeout=400)
    assert second.returncode == 1, told  # one request was refused
    assert f"{done} of 200 answers are there already" in told
    assert "1 requests could not be answered" in told
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(answers) == 200
    by = {each["custom_id"]: each["response"] for each in answers}
    assert set(by) == {line["custom_id"] for line in lines}
    assert by["r199"]["status_code"] == 400
    texts = {r["body"]["choices"][0]["text"] for r in by.values() if r["status_code"] == 200}
    assert len(texts) == 1
    again = [sys.executable, "-m", "pyramidinfer", "batch", str(source), str(target)]
    run = subprocess.run(again, capture_output=True, text=True)
    assert run.returncode == 1 and "200 of 200 answers are there already" in run.stderr


def test_the_pages_pipeline_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    body = {"prompt": STORY, "max_tokens": 3}
    asked = [{"custom_id": name, "url": "/v1/completions", "body": body} for name in "abc"]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    start = BATCH.partition("from pyramidinfer")[0].replace("num_cpus=2", "num_cpus=4")
    run = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    files = (tmp_path / "answers").glob("*.json")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == ["a", "b", "c"]
    for row in rows:
        answer = json.loads(row["text"])
        assert answer["custom_id"] == row["custom_id"]
        assert answer["response"]["status_code"] == 200


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give a file of requests"),
        (["in", "out", "spill=3"], "spill has no effect on a batch"),
        (["in", "out", "max_waiting=3"], "max_waiting has no effect on a batch"),
        (["in", "out", "keeep=.3"], "unknown option 'keeep'"),
    ],
)
def test_wrong_words_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyramidinfer.integrations.ray_data import main

    assert main(words) == 2
    assert f"error: {message}" in capsys.readouterr().err


# --- what the documents say -----------------------------------------------------------------------


def test_the_readmes_lines_start_two_replicas() -> None:
    (line,) = re.findall(r"^serve run .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line, comments=True)
    program = str(Path(sys.executable).parent / words[0])
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    with subprocess.Popen(
        [program, *words[1:]], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            seen: set[str] = set()
            for number in range(600):
                try:
                    url = "http://127.0.0.1:8000"
                    found = ask(url, session=str(number), prompt=STORY, max_tokens=1)
                    seen |= {found.headers["x-replica"]} if found.status_code == 200 else set()
                except httpx.HTTPError:
                    time.sleep(0.5)
                if len(seen) == 2:
                    break
            assert len(seen) == 2
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def test_what_stops_ray_serve_llm_is_still_there() -> None:
    """``docs/scaling.md`` says that its ``LLMConfig`` cannot be had without vLLM or SGLang."""
    run = subprocess.run(
        [sys.executable, "-c", "import ray.serve.llm"], capture_output=True, text=True, cwd="/"
    )
    assert run.returncode and "Neither vLLM nor SGLang is installed" in run.stderr
