"""The demo on a real model, and where that cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from pyramidinfer.cli import demo as module
from pyramidinfer.cli.app import main
from pyramidinfer.lab.asked import real_questions, shipped_questions
from pyramidinfer.lab.tokenizer import build_tokenizer
from tests.lab import english_model
from tests.lab.test_samples import other_tokenizer


def demo(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "demo", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_on_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = english_model.save(tmp_path / "model")
    words = ("--documents", "2", "--length", "400", "--kv-memory", "8MiB", "--out", str(tmp_path))
    assert demo(monkeypatch, "--model", folder, *words) == 2  # the default is for deeper models
    assert "keep=0.25 cannot be reached" in capsys.readouterr().err
    assert demo(monkeypatch, "--model", folder, *words, "--keep", ".4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    titles = ["full cache", "paper's rule, keep 0.4", "duo, keep 0.4", "pyramid, keep 0.4"]
    assert all(f"{title}: " in shown for title in titles)
    assert "What is the access code" in shown and "wrong full cache" in shown
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["model"] == written["configuration"]["model"] == folder
    assert list(written["result"]) == titles
    assert [run["questions"] for run in written["result"].values()] == [2] * 4
    assert (tmp_path / "pyramid.png").stat().st_size > 10_000


def test_where_it_cannot_be_fetched_the_shipped_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(tmp_path)),
        ("PYRAMIDINFER_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    words = ("--documents", "1", "--length", "300", "--kv-memory", "16MiB", "--out", str(tmp_path))
    assert demo(monkeypatch, "--fetch", "smollm2", *words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "fetched" in line]
    assert len(told) == 1 and "so the shipped model runs" in told[0]
    assert json.loads((tmp_path / "demo.json").read_text())["model"] == "shipped"


def test_a_model_and_one_to_fetch_are_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(monkeypatch, "--model", "x", "--fetch", "smollm2") == 2
    assert "not both" in capsys.readouterr().err


def test_a_name_that_is_not_known_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(monkeypatch, "--fetch", "smolm2", "--out", str(tmp_path / "out")) == 2
    assert "did you mean 'smollm2'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_verdict_says_which_answers_are_the_same_and_at_what_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = {"full": (0.8, 1.0), "paper's": (0.16, 0.5), "pyramid": (0.2, 0.75)}
    monkeypatch.setattr(
        module,
        "_figures",
        lambda run: dict(zip(("kept_share", "computed_share"), shares[run.title], strict=True)),
    )
    rights = ([True, True, False], [True, False, True], [True, True, True])
    runs = [
        module.Run(title, [], right, 1.0, 0, 1) for title, right in zip(shares, rights, strict=True)
    ]
    assert module._verdict(runs).splitlines() == [
        "paper's: 2 right (1 of full's 2), at 20% of its entries and 50% of its prefill",
        "pyramid: 3 right (2 of full's 2), at 25% of its entries and 75% of its prefill",
    ]


def test_questions_can_be_answered_from_their_documents() -> None:
    tokenizer = other_tokenizer()
    tokenizer.chat_template = english_model.TEMPLATE
    found = real_questions(tokenizer, 3, 5, 600)
    assert [q.prompt for q in found] == [q.prompt for q in real_questions(tokenizer, 3, 7, 600)[:5]]
    assert len({each.asked for each in found}) == 5
    for each in found:
        assert 0.85 * 600 < len(each.prompt) <= 600
        needle = tokenizer.decode(each.prompt[slice(*each.needle)])
        spelled = tokenizer.decode(tokenizer(f" {each.wanted}", add_special_tokens=False).input_ids)
        assert needle.endswith(f"{spelled} .")
        assert each.is_right(f"It is {each.wanted}.") and not each.is_right("It is lost.")


def test_a_value_is_in_its_prompt_once() -> None:
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    inner = Tokenizer(BPE(letters, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Decoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = english_model.TEMPLATE
    for each in real_questions(tokenizer, 2024, 15, 4000):
        assert tokenizer.decode(each.prompt).lower().count(each.wanted.lower()) == 1
        assert tokenizer.decode(each.prompt[slice(*each.needle)]).endswith(f"{each.wanted}.")


def test_the_shipped_models_questions_are_word_for_word() -> None:
    tokenizer = build_tokenizer(4096)
    (each,) = shipped_questions(tokenizer, 1, 1, 300)
    assert len(each.prompt) == 300 and each.is_right(f" {each.wanted} ")
    assert not each.is_right(each.wanted + " and more")
