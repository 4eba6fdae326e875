"""``pyramidinfer batch``: every request is answered once, whatever happens meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cli import batch as batch_module
from pyramidinfer.cli.app import main
from pyramidinfer.models.loading import shipped_model
from tests.commands import command, run
from tests.server.live import until

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SMALL = ("--kv-memory", "32MiB")


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return file


def answers(file: Path) -> dict[str, dict[str, Any]]:
    """By id; every line whole, and no id twice."""
    text = file.read_text()
    assert text.endswith("\n")
    entries = [json.loads(each) for each in text.splitlines()]
    found = {each["custom_id"]: each for each in entries}
    assert len(found) == len(entries)
    for each in entries:
        assert set(each) == {"id", "custom_id", "response", "error"} and each["error"] is None
    return found


def test_lines_of_many_prompts_wait_for_each_other(tmp_path: Path) -> None:
    """However many choices the lines have, none is answered that there is no room."""
    lines = [line(str(i), prompt=["a", "b", "c", "d"], max_tokens=2) for i in range(16)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    code, _, _ = run("batch", str(source), str(target), *SMALL, "--max-requests", "4")
    assert code == 0
    assert {each["response"]["status_code"] for each in answers(target).values()} == {200}
    assert len(answers(target)) == 16


def test_lossless_lines(tmp_path: Path) -> None:
    asked = {"prompt": "The old baker walked . " * 20, "max_tokens": 8, "temperature": 0}
    lines = [
        line("full", **asked, compression={"policy": "full", "lossless": False}),
        line("lossless", **asked),
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    options = ("--lossless", "--draft-tokens", "2", "--dtype", "float32")
    code, _, err = run("batch", str(source), str(target), *SMALL, *options)
    assert code == 0, err
    found = {name: each["response"]["body"] for name, each in answers(target).items()}
    assert found["lossless"]["choices"] == found["full"]["choices"]
    assert found["lossless"]["usage"]["verifications"] > 0
    assert "verifications" not in found["full"]["usage"]


def test_a_mixed_file(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "Where is the map ?"}]
    source = write(
        tmp_path / "in.jsonl",
        [
            line("good", prompt="The old baker", max_tokens=5, temperature=0),
            line("chat", CHAT, messages=user, max_tokens=5, temperature=0, model="demo-model"),
            line("many", prompt=["a", "b"], n=2, max_tokens=2),
            line("é\u2028", prompt="The storm", max_tokens=1),
            line("\ud800", prompt="The storm", max_tokens=1),
            line("half", prompt="\ud800", max_tokens=1),
            line("unknown", prompt="x", bogus=1),
            line("type", prompt="x", max_tokens="5"),
            line("missing", CHAT, max_tokens=5),
            line("model", prompt="x", model="gpt-5"),
            line("long", prompt="x " * 5000),
            line("stream", prompt="x", stream=True),
            line("url", "/v1/embeddings", input="x"),
            line("policy", prompt="x", compression={"policy": "snapkb"}),
            line(
                "told",
                CHAT,
                messages=user,
                min_tokens=9,
                max_tokens=9,
                skip_special_tokens=False,
                prompt_logprobs=1,
                compression={"policy": "full"},
            ),
            line("form", CHAT, messages=user, guided_choice=["a"]),
            line("response", RESPONSES, input="Where is the map ?", max_output_tokens=5),
            line("stored", RESPONSES, input="x", store=True),
            line("next", RESPONSES, input="x", previous_response_id="resp_1"),
            line("effort", RESPONSES, input="x", reasoning={"effort": "low"}),
        ],
    )
    with source.open("a") as file:
        file.write("\n  \n")  # empty lines are none
    target = tmp_path / "out.jsonl"
    code, out, err = run("batch", str(source), str(target), *SMALL)
    assert code == 1 and out == ""
    told = run("batch", "--help")[1]
    assert "Exit code" in told and "some answers are errors" in told
    assert "13 requests could not be answered; their lines in the answers have the errors" in err
    found = answers(target)
    assert len(found) == 20
    status = {name: each["response"]["status_code"] for name, each in found.items()}
    good = {"good", "chat", "many", "é\u2028", "\ud800", "told", "response"}
    assert {name for name, code in status.items() if code == 200} == good
    assert status.pop("model") == 404
    assert {code for name, code in status.items() if name not in good} == {400}
    body = found["good"]["response"]["body"]
    llm = LLM(shipped_model(), "pyramid")
    wanted = llm.generate("The old baker", SamplingParams(max_tokens=5))[0]
    assert body["choices"][0]["text"].strip() == wanted.text.strip()
    assert found["good"]["response"]["request_id"] == body["id"]
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert len(found["many"]["response"]["body"]["choices"]) == 4
    told = found["told"]["response"]["body"]
    assert told["usage"]["completion_tokens"] == 9
    response = found["response"]["response"]["body"]
    assert (response["object"], response["store"]) == ("response", False)
    assert 0 < response["usage"]["output_tokens"] <= 5
    assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
    messages = {
        name: found[name]["response"]["body"]["error"]["message"]
        for name in status
        if name not in good
    }
    for name, part in (
        ("unknown", "bogus"),
        ("type", "max_tokens"),
        ("missing", "messages"),
        ("long", "4096"),
        ("stream", "does not stream"),
        ("url", "/v1/embeddings"),
        ("policy", "snapkv"),
        ("stored", "leave store out"),
        ("next", "leave previous_response_id out"),
        ("effort", "reasoning.effort"),
        ("form", "tokenizer cannot write JSON, nor follow any grammar"),
    ):
        assert part in messages[name]

    before = target.read_bytes()
    code, _, err = run("batch", str(source), str(target), *SMALL)
    assert code == 1 and "20 of 20 answers are there already" in err  # as it was
    assert "13 requests could not be answered" in err
    assert target.read_bytes() == before


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A file of requests that takes a second or two, and its answers."""
    folder = tmp_path_factory.mktemp("batch")
    chance = random.Random(3)
    source = write(
        folder / "in.jsonl",
        [
            line(
                f"request {index}",
                prompt=f"The map {index} was lost .",
                temperature=0,
                max_tokens=chance.randrange(60, 360),
                ignore_eos=True,
            )
            for index in range(40)
        ],
    )
    target = folder / "whole.jsonl"
    assert run("batch", str(source), str(target), *SMALL, "--max-requests", "6")[0] == 0
    return source, texts(target)


def texts(file: Path) -> dict[str, str]:
    return {
        name: each["response"]["body"]["choices"][0]["text"] for name, each in answers(file).items()
    }


def test_killed_again_and_again(work: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """At random moments, the writing of a line among them; then every answer is there once."""
    source, wanted = work
    target, chance = tmp_path / "out.jsonl", random.Random()
    chance.seed(seed := chance.randrange(2**32))
    goal = kills = 0

    def so_far() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    while goal < 30:
        goal += chance.randrange(5, 18)
        with command("batch", str(source), str(target), *SMALL, "--max-requests", "6") as begun:
            while begun.process.is_alive() and so_far() < goal:
                time.sleep(0.001)
            if begun.process.is_alive():
                os.kill(begun.pid, signal.SIGKILL)
                assert begun.wait() == -signal.SIGKILL, seed
                kills += 1
        if chance.random() < 0.7:  # as if it had been killed in the middle of a write
            whole = target.read_bytes()
            cut = chance.randrange(1, 1 + len(whole.splitlines(keepends=True)[-1]))
            target.write_bytes(whole[:-cut])
    assert kills, seed
    code, _, err = run("batch", str(source), str(target), *SMALL, "--max-requests", "6")
    assert code == 0 and "of 40 answers are there already" in " ".join(err.split()), seed
    assert texts(target) == wanted, seed


def test_stopped_by_ctrl_c(work: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    source, wanted = work
    target = tmp_path / "out.jsonl"
    with command("batch", str(source), str(target), *SMALL, "--max-requests", "6") as begun:
        until(lambda: target.exists() and target.read_bytes().count(b"\n") >= 5)
        os.kill(begun.pid, signal.SIGINT)
        assert begun.wait() == 130
        assert "Traceback" not in begun.err
    assert 5 <= len(answers(target)) < 40
    assert run("batch", str(source), str(target), *SMALL)[0] == 0
    assert texts(target) == wanted


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """In this process, whose files the command can name."""
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_requests_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cat in | pyramidinfer batch /dev/stdin out``, or ``<(…)``: what is read is gone."""
    for names in ("abc", "abcd"):  # the second one goes on
        reading, writing = os.pipe()
        lines = [json.dumps(line(name, prompt="x", max_tokens=1)) for name in names]
        os.write(writing, "\n".join(lines).encode())
        os.close(writing)
        target = tmp_path / "out"
        assert run_here(monkeypatch, "batch", f"/dev/fd/{reading}", str(target), *SMALL) == 0
        os.close(reading)
        assert set(answers(target)) == set(names)


def test_requests_that_are_gone_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer answers than requests are never a success."""
    source = write(tmp_path / "in", [line(name, prompt="x", max_tokens=1) for name in "abc"])
    begin = batch_module.load

    def cut(choice: Any) -> LLM:
        write(source, [line("a", prompt="x", max_tokens=1)])
        return begin(choice)

    monkeypatch.setattr(batch_module, "load", cut)
    assert run_here(monkeypatch, "batch", str(source), str(tmp_path / "out"), *SMALL) == 2
    assert "2 of its requests (such as 'b') have no answer" in capsys.readouterr().err
    assert set(answers(tmp_path / "out")) == {"a"}


def test_a_last_line_that_was_cut_off(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line(name, prompt="x", max_tokens=1) for name in "abc"])
    target = tmp_path / "out"
    assert run("batch", str(source), str(target), *SMALL)[0] == 0
    whole = target.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first, first + 1, first + 30, len(whole) - 1):
        target.write_bytes(whole[:cut])
        assert run("batch", str(source), str(target), *SMALL)[0] == 0
        assert set(answers(target)) == set("abc")
        assert target.read_bytes()[:first] == whole[:first]  # what was there stays


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no request"),
        ("\n\n", "holds no request"),
        ("{}\n", "line 1: custom_id is missing or not a str"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {}}\nnul\n', "line 2: not valid"),
        ("[]\n", "line 1: not an object"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ('{"custom_id": 5, "url": "x", "body": {}}', "line 1: custom_id is missing or not a str"),
        ('{"custom_id": "a", "body": {}}', "line 1: url is missing"),
        ('{"custom_id": "a", "url": "x", "body": []}', "line 1: body is missing or not a dict"),
        ('{"custom_id": "a", "url": "x", "body": {}, "method": "GET"}', "'GET' must be POST"),
        ('{"custom_id": "a", "url": "x", "body": {}}\n' * 2, "custom_id 'a' is that of line 1"),
        # as over HTTP
        ('{"custom_id": "a", "custom_id": "b", "url": "x", "body": {}}', "'custom_id' is there tw"),
        ('{"custom_id": "a", "url": "x", "body": {"n": 1, "n": 2}}', "line 1: not valid JSON: 'n'"),
        ('{"custom_id": "a", "url": "x", "body": {"top_p": NaN}}', "NaN is not a JSON number"),
        (b"\xff\xfe\n", "not UTF-8"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_file_that_is_none(content: str | bytes, message: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("batch", str(source), str(target), *SMALL)
    (told,) = err.strip().splitlines()
    assert (code, out) == (2, "") and told.startswith("error: ") and message in told
    assert not target.exists()


def test_a_target_that_cannot_be(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", prompt="x", max_tokens=1)])
    foreign = write(tmp_path / "foreign", [{"custom_id": "b"}])
    other = tmp_path / "other"
    other.write_text("a text that somebody wrote\n")
    locked = tmp_path / "locked"
    locked.touch()
    link = tmp_path / "link"
    link.symlink_to(source)
    before = [each.read_bytes() for each in (source, foreign, other)]
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for given, target, message in (
            (source, source, "is the file of requests"),
            (source, link, "is the file of requests"),
            (source, foreign, "holds an answer to 'b', which is not in"),
            (source, other, "line 1 is no answer of a batch"),
            (source, locked, "is being written by another process"),
            (source, tmp_path, "Is a directory"),
            (source, Path("/dev/null"), "'/dev/null' is not a regular file"),
            (source, tmp_path / "no" / "folder", "No such file or directory"),
            (tmp_path / "none", tmp_path / "out", "No such file or directory"),
        ):
            code, out, err = run("batch", str(given), str(target), *SMALL)
            (told,) = err.strip().splitlines()
            assert (code, out) == (2, "") and told.startswith("error: ") and message in told
    assert [each.read_bytes() for each in (source, foreign, other)] == before


@pytest.mark.parametrize("text", ["a text that somebody wrote", '{"custom_id": "b"}\n{"id": "bat'])
def test_what_is_nobodys_answers_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    """Even where its last line looks as if it was being written."""
    source = write(tmp_path / "in", [line("a", prompt="x", max_tokens=1)])
    target = tmp_path / "notes"
    target.write_text(text)
    code, _, err = run("batch", str(source), str(target), *SMALL)
    assert code == 2 and "name another file" in err
    assert target.read_text() == text
