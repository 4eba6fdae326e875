"""``pyramidinfer profile`` as a user runs it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.cli.app import main
from pyramidinfer.cli.profile import heat_map
from pyramidinfer.engine import passages, profiling
from pyramidinfer.engine.english import english
from pyramidinfer.engine.profiling import find_profile
from pyramidinfer.lab import heads
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies.profile import Calibrated, Fingerprint, Profile
from tests.lab import english_model
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and passages that are read quickly."""
    monkeypatch.setattr(profiling, "profiles_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(passages, "LENGTH", 220)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return english_model.save(tmp_path_factory.mktemp("model"))


def run(*words: str, capsys: Any, monkeypatch: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "profile", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    return stopped.value.code or 0, shown.out, shown.err


@pytest.fixture
def profile(capsys: Any, monkeypatch: Any) -> Any:
    return lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)


def test_a_profile_is_measured_stored_and_found(profile: Any, model: str, small: Path) -> None:
    code, out, err = profile(model, "--json")
    assert code == 0, err
    told = json.loads(out)
    made = Profile.load(told["path"])
    assert Path(told["path"]).parent == small and told["seconds"] > 0
    assert Profile.from_dict(told["profile"]) == made and made.lengths == (220,) * 4
    assert find_profile(LLM(model, "full", kv_memory="4MiB").engine.shared) == made
    again = json.loads(profile(model, "--json")[1])
    assert again["seconds"] is None and again["path"] == told["path"]
    code, out, _ = profile(model)
    assert code == 0 and "made before" in out and told["path"] in out
    assert f"{made.share[0][0]:.0%}" in out and f"{made.agreement:.2f}" in out
    anew = json.loads(profile(model, "--force", "--json")[1])
    assert anew["seconds"] > 0 and len(list(small.iterdir())) == 1


def test_a_calibration_is_not_dropped_without_a_word(
    profile: Any, model: str, tmp_path: Path
) -> None:
    """The same heads measured anew keep it; after other heads it says nothing, which is told."""
    path = json.loads(profile(model, "--json")[1])["path"]
    found = Calibrated(1, 0.4, 0.3, 1.0, 0.7, 0.01, 1000, 36, 3)
    replace(Profile.load(path), calibrated=found).save(path)
    code, out, err = profile(model, "--force")
    assert code == 0 and "calibrated: after layer 1" in out and "left out" not in err
    assert Profile.load(path).calibrated == found
    (tmp_path / "mine.txt").write_text("some words of my own, again and again. " * 2000)
    code, out, err = profile(model, "--text", "mine.txt", "-o", "mine.json")
    assert code == 0 and "not calibrated" in out
    assert "the calibration (after layer 1, at most 40% of the text goes deeper) is left out" in err
    assert Profile.load("mine.json").calibrated is None
    assert Profile.load(path).calibrated == found


def test_output_picture_and_text(profile: Any, model: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(english()[:60_000])
    code, out, err = profile(
        model, "--text", "mine.txt", "-o", "deep/own.json", "--picture", "deep/heads.png"
    )
    assert code == 0, err
    made = Profile.load("deep/own.json")
    assert made.text == "mine.txt" and made.commit and not small.exists()
    assert (tmp_path / "deep" / "heads.png").stat().st_size > 5000
    assert "deep/own.json" in out and "deep/heads.png" in out and "measured on mine.txt" in out
    assert profile(model, "--text", "mine.txt")[0] == 0  # without a name: the model's from now on
    found = find_profile(LLM(model, "full", kv_memory="4MiB").engine.shared)
    assert found is not None and found.text == "mine.txt"


def test_the_shipped_models_profile_is_there(profile: Any, small: Path) -> None:
    code, out, err = profile("-o", "copy.json")
    assert code == 0, err
    assert "made before" in out and "head 1" in out and not small.exists()
    made = find_profile(LLM(shipped_model(), "full", kv_memory="4MiB").engine.shared)
    assert Profile.load("copy.json") == made
    code, _, err = profile("--force")
    assert code == 2 and "the package has a profile of this model" in err and "--output" in err
    assert profile("--force", "-o", "own.json")[0] == 0
    own = Profile.load("own.json")
    assert own.text == "generated text" and own.lengths == (220,) * 4
    assert made is not None and own.fingerprint.matches(made.fingerprint) and own != made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none.txt", "-o", "x.json"], "none.txt"),
        (["--text", "short.txt", "-o", "x.json"], "short.txt has"),
        (["--text", "short.txt"], "the package has a profile"),
        (["--force", "-o", "."], "is a folder; name a file"),
        (["--dtype", "float99"], "float99"),
        (["./nowhere"], "model path './nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, profile: Any) -> None:
    Path("short.txt").write_text("The old baker walked to the market . " * 5)
    code, _, err = profile(*words)
    (line,) = err.strip().splitlines()[-1:]
    assert code == 2 and message in line and line.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--force", "-o", "sub"],
        ["-o", "sub"],
        ["--picture", "sub"],
        ["--force", "-o", "file/x.json"],
    ],
)
def test_where_to_write_is_known_before_anything_is_measured(
    words: list[str], profile: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sub").mkdir()
    Path("file").touch()
    monkeypatch.setattr(heads, "measure_profile", lambda *a: pytest.fail("it was measured"))
    code, _, err = profile(model, *words)
    assert code == 2
    assert re.search("is (a|not a) folder; name a file for the (profile|picture)", err)


def test_a_model_without_a_tokenizer(profile: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    code, out, _ = profile(str(tmp_path / "bare"))
    assert code == 0 and "random tokens (the model came without a tokenizer)" in out
    (tmp_path / "mine.txt").write_text("some words of my own " * 500)
    code, _, err = profile(str(tmp_path / "bare"), "--text", str(tmp_path / "mine.txt"))
    assert code == 2 and "this model came without a tokenizer" in err


def test_many_heads_are_shades_and_windows_are_named() -> None:
    mark = Fingerprint("a", ((1.0, 0.0),), ())
    share = (tuple(head / 31 for head in range(32)), (0.0,) * 32)
    wide = Profile(share, (True, False), "t", (5,), 0.5, 0.2, "c", mark)
    table = heat_map("m", wide)
    assert [each.header for each in table.columns] == ["layer", "heads 0 to 31", "mean"]
    shades = str(next(iter(table.columns[1].cells)))
    assert len(shades) == 32 and sorted(shades, key=" ░▒▓█".index) == list(shades)
    assert len(set(shades)) == 5 and "window" in map(str, table.columns[2].cells)
