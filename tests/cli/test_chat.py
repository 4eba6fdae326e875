"""``pyramidinfer chat``, with a conversation on standard input."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cli import chat as chat_module
from pyramidinfer.cli.choices import SamplingOptions
from pyramidinfer.cli.terminal import Wrapped
from pyramidinfer.models.loading import shipped_model
from tests.commands import run, terminal
from tests.server.live import tiny_llm

SMALL = ("--kv-memory", "32MiB", "--max-tokens", "12")
STORY = "The old baker walked to the market . " * 5


def chat(*lines: str, options: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """What it answered, and what it told beside."""
    code, out, err = run("chat", *SMALL, *options, text="".join(f"{each}\n" for each in lines))
    assert code == 0, err
    assert "Traceback" not in err
    return out.splitlines(), err.splitlines()


def taken_up(told: list[str]) -> list[int]:
    """Tokens that each turn found in the cache."""
    found = [re.search(r"(\d+) tokens, (\d+) of them reused; kept", each) for each in told]
    return [int(each[2]) for each in found if each]


def test_a_conversation() -> None:
    said, told = chat(STORY, "Where is the map ?", "And now ?")
    assert len(said) == 3 and all(said[:2])  # it has nothing to say to the last one
    assert "/help lists the commands, Ctrl-D leaves" in told[0]
    cached = taken_up(told)
    assert len(cached) == 3 and 0 == cached[0] < cached[1] < cached[2]
    llm = LLM(shipped_model())
    ids = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": STORY.strip()}],
        add_generation_prompt=True,
        return_dict=False,
    )
    wanted = llm.generate(ids, SamplingParams(max_tokens=12))[0]
    assert said[0].strip() == wanted.text.strip()
    assert "tokens/s" in "".join(told) and re.search(r"KV [\d.]+ KiB of [\d.]+ KiB", "".join(told))


def test_commands() -> None:
    said, told = chat(
        STORY,
        "/reset",
        "Where ?",
        "/system Be kind .",
        "Where ?",
        "/keep 0.3",
        STORY,
        "/policy full",
        STORY,
        "/policy snapkv",
        "Where ?",
        "/help",
        "/exit",
        "never read",
    )
    text = "\n".join(told)
    assert len(said) == 6
    assert told.count("a new conversation") == 2
    assert taken_up(told)[:4] == [0, 0, 0, 0]  # forgotten, or another policy's
    for part in (
        "policy pyramid, keep 0.3",
        "policy full\n",
        "policy snapkv, keep 0.3",
        "/keep SHARE   change the budget",
        "/exit         leave",
    ):
        assert part in text, part
    shares = [int(each) for each in re.findall(r"; kept (\d+)%", " ".join(told))]
    assert len(shares) == 6 and shares[4] == 100 > max(shares[3], shares[5])


def test_reset_begins_anew() -> None:
    said, told = chat(STORY, "/reset", STORY, options=("--policy", "full"))
    assert said[0] == said[1] and taken_up(told) == [0, 0]
    system, told = chat(STORY, "/reset", STORY, options=("--system", "Be kind ."))
    assert system[0] == system[1]


def test_under_full_reuse_changes_nothing() -> None:
    said, told = chat(STORY, "Where is the map ?", options=("--policy", "full"))
    llm = LLM(shipped_model(), "full")
    turns = [
        {"role": "user", "content": STORY.strip()},
        {"role": "assistant", "content": said[0].strip()},
        {"role": "user", "content": "Where is the map ?"},
    ]
    ids = llm.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    wanted = llm.generate(ids, SamplingParams(max_tokens=12))[0]
    assert said[1].strip() == wanted.text.strip() and taken_up(told)[1] > 0


def test_lossless() -> None:
    asked = (STORY, "Where is the map ?", STORY)
    plain = chat(*asked, options=("--policy", "full", "--dtype", "float32"))[0]
    said, told = chat(
        asked[0],
        "/keep 0.2",
        asked[1],
        "/policy snapkv",
        asked[2],
        "/policy kvzip",
        options=("--lossless", "--draft-tokens", "2", "--dtype", "float32"),
    )
    assert said == plain
    text = "\n".join(told)
    assert "policy pyramid, keep 0.2, lossless" in text
    assert "policy snapkv, keep 0.2, lossless" in text
    assert "error: lossless: policy 'kvzip' reads the text again" in text
    assert text.count("kept 100%") == text.count("; lossless, ") == 3


def test_a_wrong_command_is_told_and_the_chat_goes_on() -> None:
    said, told = chat(
        "/nonsense",
        "/keep",
        "/keep much",
        "/keep 7",
        "/keep 0",
        "/policy snapkb",
        "/policy",
        "/policy h2o",
        "",
        "   ",
        "Where ?",
    )
    assert len(said) == 1
    errors = [each for each in told if each.startswith("error: ")]
    assert len(errors) == 8
    for error, part in zip(
        errors,
        (
            "unknown command '/nonsense'; /help lists them",
            "give a share",
            "give a share",
            "keep=7",
            "keep=0",
            "did you mean 'snapkv'",
            "policy",
            "slot_scores",
        ),
        strict=True,
    ):
        assert part in error


def test_a_prompt_that_is_too_long_is_told() -> None:
    said, told = chat("x " * 5000, "Where ?")
    assert len(said) == 1
    assert any("error: " in each and "4096 positions" in each for each in told)


def test_quit_and_the_end_of_input() -> None:
    assert chat("/quit", "never read")[0] == []
    assert chat()[0] == []


def test_sampling_options() -> None:
    warm = ("--temperature", "1", "--top-p", "0.9", "--seed", "7")
    first = chat(STORY, options=warm)[0]
    assert first == chat(STORY, options=warm)[0] != chat(STORY, options=(*warm[:-1], "8"))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature=-1.0 must lie between"),
        (("--generation-config", "x"), "--generation-config='x' is unknown"),
        (("--chat-template-kwargs", "{"), "--chat-template-kwargs '{' is not valid JSON"),
        (("--chat-template-kwargs", '{"enable_thinking": 1}'), "never reads 'enable_thinking'"),
        (("--max-tokens", "0"), "max_tokens=0 must be"),
        (("--keep", "7"), "keep=7.0"),
        (("/no/such/model",), "/no/such/model"),
    ],
)
def test_a_bad_option_is_one_line(options: tuple[str, ...], message: str) -> None:
    code, out, err = run("chat", *SMALL, *options, text="Where ?\n")
    (line,) = err.strip().splitlines()
    assert (code, out) == (2, "") and line.startswith("error: ") and message in line


def test_a_model_without_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    llm.tokenizer.chat_template = None
    monkeypatch.setattr(chat_module, "load", lambda choice: llm)
    choice: Any = None
    with pytest.raises(ValueError, match="has no chat template; use `pyramidinfer generate`"):
        chat_module.run_chat(choice, None, SamplingOptions())


def test_in_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer, the arrow keys bring lines back, other days' too, Ctrl-D leaves."""
    kept = tmp_path / "deep" / "history"
    options = ("chat", "--kv-memory", "32MiB", "--max-tokens", "3000")
    told = {"PYRAMIDINFER_CHAT_HISTORY": str(kept)}
    with terminal(*options, "--temperature", "2", "--seed", "1", **told) as talk:
        at = talk.says("Ctrl-D leaves\n.*> ")
        talk.type("\x03")
        at = talk.says("Ctrl-D leaves\n> ", at)
        talk.type(f"{STORY.strip()}\r")
        at = talk.says(r"market \.\n\S+ \S", at)  # the line, then words of an answer
        talk.type("\x03")
        at = talk.says(r"stopped\n\d+ tokens, 0 of them reused.*\s[^>]*> ", at)
        talk.type("\x1b[A\x01\x0bWhere is it ?\r")
        talk.says(r"Where is it \?\n[^>]*tokens/s\n> ", at)
        talk.type("\x04")
        assert talk.wait() == 0
        assert "Traceback" not in talk.screen
    assert kept.read_text().splitlines() == [STORY.strip(), "Where is it ?"]
    assert kept.stat().st_mode & 0o077 == 0
    with terminal(*options, **told) as talk:
        at = talk.says("Ctrl-D leaves\n.*> ")
        talk.type("\x1b[A\r")
        talk.says(r"Where is it \?\n[^>]*tokens/s\n> ", at)
        talk.type("/exit\r")
        assert talk.wait() == 0


def test_a_history_that_nobody_wants_or_that_cannot_be(tmp_path: Path) -> None:
    for value, said in (("", ""), (str(tmp_path), f"no history: {tmp_path}: Is a directory; ")):
        with terminal("chat", *SMALL, PYRAMIDINFER_CHAT_HISTORY=value) as talk:
            talk.says("> ")
            talk.type("/help\r")
            talk.says("Ctrl-C stops an answer")
            talk.type("\x04")
            assert talk.wait() == 0
            assert said in talk.screen.replace("\n", " ") and "Traceback" not in talk.screen
    assert list(tmp_path.iterdir()) == []


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def wrapped(text: str, monkeypatch: pytest.MonkeyPatch, step: int) -> str:
    monkeypatch.setattr(
        "pyramidinfer.cli.terminal.get_terminal_size", lambda: os.terminal_size((20, 9))
    )
    out = Tty()
    writer = Wrapped(out)
    for at in range(0, len(text), step):
        writer.write(text[at : at + step])
    writer.end()
    return out.getvalue()


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_words_are_wrapped(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty columns, in parts of any length."""
    for text, wanted in (
        ("the old baker walked to the market", "the old baker walked\nto the market"),
        ("  two  spaces\n\nstay", "  two  spaces\n\nstay"),
        ("a" * 45 + " b", "a" * 45 + " b"),
        ("so " + "a" * 18, "so\n" + "a" * 18),
        ("```\n" + "x = 1; " * 5 + "\n```\n" + "word " * 5, None),
        ("古" * 11, "古" * 10 + "\n古"),
        ("\x1b]0;title\x07red\x1b[31m \r\x9b2J", "]0;titlered[31m 2J"),
        ("", ""),
    ):
        if wanted is None:  # code stays as it is, what follows it does not
            wanted = text.replace("word " * 5, "word word word word\nword")
        assert wrapped(text, monkeypatch, step) == wanted + "\n"


def test_what_is_no_terminal_gets_the_text_as_it_is() -> None:
    out = io.StringIO()
    writer = Wrapped(out)
    writer.write("word " * 50 + "\x1b[31m")
    assert out.getvalue() == "word " * 50 + "\x1b[31m"
