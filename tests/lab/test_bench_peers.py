"""The comparison with other engines: who is missing or fails is told, and runs are not mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.lab import numbers_bench
from pyramidinfer.lab.bench import engines, peers
from pyramidinfer.lab.bench.engines import ENGINES, Engine, chosen_engines, parse_workloads
from pyramidinfer.lab.bench.peers import Comparison, run_peers
from pyramidinfer.lab.bench.peers_table import HEAD, peers_rows
from pyramidinfer.lab.bench.plots import draw_peers
from pyramidinfer.lab.shapes import SHAPES

ROOT = Path(__file__).parents[2]
DRIVERS = ROOT / "benchmarks" / "peers"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}

FAKE = """
import sys, json
from driver import Answers, Engine, drive

def load(job):
    wrong = job["options"].get("wrong", 0)
    def generate(prompts, new):
        print("a library's chatter")
        return Answers([[7] * (new - wrong) for _ in prompts], 0.001)
    if job["options"].get("fails"):
        raise RuntimeError("the engine cannot start")
    return Engine(generate, ["numpy"], {"kv_share_prefill": 0.25})

drive(load)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)


@pytest.fixture
def drivers(tmp_path: Path) -> Path:
    """The drivers' folder with a fake one in it."""
    folder = tmp_path / "drivers"
    folder.mkdir()
    (folder / "driver.py").write_text((DRIVERS / "driver.py").read_text())
    (folder / "fake.py").write_text(FAKE)
    (folder / "mute.py").write_text("print('no result')\n")
    return folder


def fake(name: str, **options: Any) -> Engine:
    return Engine(name, None, "fake.py", options)


def compare(
    tmp_path: Path, drivers: Path, *entries: Engine, keep: bool = False, **changes: Any
) -> dict[str, Any]:
    plan = Comparison(parse_workloads("T=2x5+3"), "small", 1, **changes)
    out = tmp_path / "peers.json"
    result = run_peers(
        plan,
        entries,
        out,
        tmp_path / "work",
        drivers=drivers,
        keep=keep,
        environments=tmp_path / "environments",
    )
    assert json.loads(out.read_text())["result"] == result
    return result


def test_engines_that_fail_or_are_missing_are_rows(tmp_path: Path, drivers: Path) -> None:
    environment = tmp_path / "environments" / "broken"
    environment.mkdir(parents=True)
    (environment / "failed.txt").write_text("broken==1\ncannot be installed\n")
    result = compare(
        tmp_path,
        drivers,
        fake("transformers"),
        fake("short", wrong=1),
        fake("dead", fails=True),
        Engine("absent", "absent", "fake.py"),
        Engine("broken", "broken", "fake.py"),
        Engine("mute", None, "mute.py"),
    )
    rows = {row["engine"]: row for row in result["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "transformers": "ok",
        "short": "failed",
        "dead": "failed",
        "absent": "not installed",
        "broken": "not installed",
        "mute": "failed",
    }
    assert "3 tokens each were asked for; the engine made [2, 2]" in rows["short"]["reason"]
    assert "the engine cannot start" in rows["dead"]["reason"]
    assert "run `make peers`" in rows["absent"]["reason"]
    assert rows["broken"]["reason"] == "broken==1 cannot be installed"
    assert "no result" in rows["mute"]["reason"]
    ok = rows["transformers"]
    assert ok["agreement"] == 1 and ok["repeats"] == 2 and "tokens" not in ok
    assert ok["output_tokens_per_second"] == pytest.approx(6 / ok["seconds"]["median"])
    assert ok["all_tokens_per_second"] == pytest.approx(16 / ok["seconds"]["median"])

    configuration = Comparison(parse_workloads("T=2x5+3"), "small", 1).configuration
    cells = peers_rows(result)
    assert all(len(line) == len(HEAD) for line in cells) and len(cells) == 6
    page = numbers_bench.peers(json.loads((tmp_path / "peers.json").read_text()))
    for text in ("broken on T: not installed: broken==1 cannot be installed", "| failed |"):
        assert text in page
    picture = draw_peers(configuration, result, tmp_path / "peers.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_of_another_run_are_marked_and_give_no_ratio(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(tmp_path, drivers, fake("transformers"), fake("other"))
    assert {line[1]: line[6] != "–" for line in peers_rows(first)} == {
        "transformers": True,
        "other": True,
    }
    for row in first["rows"]:
        row["run"] = "2020-01-01T00:00:00Z"
    path = tmp_path / "peers.json"
    entry = json.loads(path.read_text())
    entry["result"]["rows"] = first["rows"]
    path.write_text(json.dumps(entry))

    second = compare(tmp_path, drivers, fake("other"), keep=True)
    lines = {line[1]: line[6] for line in peers_rows(second)}
    assert lines == {"other": "–", "transformers (2020-01-01T00:00:00Z)": "1.00"}
    with pytest.raises(ValueError, match="other settings; omit --keep-rows"):
        compare(tmp_path, drivers, fake("other"), keep=True, repeats=3)
    third = compare(tmp_path, drivers, fake("other"))
    assert len(third["rows"]) == 1


def test_enough_is_enough(tmp_path: Path, drivers: Path) -> None:
    result = compare(tmp_path, drivers, fake("transformers"), repeats=5, enough_seconds=0.0)
    assert result["rows"][0]["repeats"] == 1


def test_a_driver_that_hangs_is_stopped(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (drivers / "slow.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(peers, "LIMIT", 0.5)
    result = compare(tmp_path, drivers, Engine("slow", None, "slow.py"))
    assert "took more than 0.5 seconds" in result["rows"][0]["reason"]


def test_real_drivers_here_agree(tmp_path: Path) -> None:
    """Ours with the full cache and transformers' ``generate``: the same tokens, in float32."""
    ours = Engine(
        "ours, full",
        None,
        "drive_pyramidinfer.py",
        {"policy": "full", "kv_memory": "8MiB"},
        "float32",
    )
    theirs = Engine("transformers", None, "drive_transformers.py", {}, "float32")
    result = compare(tmp_path, DRIVERS, ours, theirs)
    rows = {row["engine"]: row for row in result["rows"]}
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"], result["rows"]
    assert rows["ours, full"]["agreement"] == 1
    assert rows["ours, full"]["notes"]["kv_share_prefill"] == 1
    assert {"transformers", "torch"} <= rows["transformers"]["versions"].keys()
    assert rows["transformers"]["prefill_seconds"]["median"] > 0
    assert not rows["transformers"]["prefill_in_own_run"]


def test_engines_and_workloads_by_name() -> None:
    assert len(chosen_engines([""])) == len(ENGINES)
    assert [each.is_ours for each in chosen_engines(["ours"])] == [True] * 3
    assert [each.name for each in chosen_engines(["OpenVINO, ev", "vllm"])] == [
        "OpenVINO, eviction",
        "vLLM (CPU)",
    ]
    with pytest.raises(ValueError, match="did you mean 'llama.cpp'"):
        chosen_engines(["llama-cpp"])
    assert parse_workloads("A,T=2x9+4")["T"].prompt_len == 9
    for wrong in ("C", "T=0x9+4", "T=2x9+1", ""):
        with pytest.raises(ValueError, match="--workloads"):
            parse_workloads(wrong)


def test_every_engine_has_a_driver_and_a_recipe() -> None:
    recipes = {path.stem for path in (DRIVERS / "requirements").glob("*.txt")}
    recipes -= {"constraints", "guidellm"}  # a load generator, no engine
    assert {each.environment for each in ENGINES if not each.is_ours} == recipes
    makefile = (DRIVERS / "peers.mk").read_text()
    assert set(makefile.split("PEERS ?= ")[1].splitlines()[0].split()) == recipes
    for engine in ENGINES:
        assert (DRIVERS / engine.driver).is_file()
    evicting = next(each for each in ENGINES if each.name == "OpenVINO, eviction")
    for name, workload in {**engines.WORKLOADS, **parse_workloads("T=2x300+4")}.items():
        entries = evicting.options_for(name, workload)["entries"]
        assert entries % 32 == 0 and 96 < entries < workload.prompt_len


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peers.main(["--list"])
    assert capsys.readouterr().out.splitlines() == [each.name for each in ENGINES]
    for words, message in (
        (["--only", "nobody"], "is no engine"),
        (["--shape", "huge"], "--shape 'huge' is unknown"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--workloads", "Z"], "--workloads 'Z'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            peers.main([*words, "--json", str(tmp_path / "x.json"), "--work", str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_failed_install_leaves_its_reason(tmp_path: Path) -> None:
    """The installer goes on: the comparison then says why."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "constraints.txt").write_text("")
    (tmp_path / "requirements" / "llamacpp.txt").write_text("./there-is-no-such-folder\n")
    script = tmp_path / "install.sh"
    script.write_text((DRIVERS / "install.sh").read_text())
    done = subprocess.run(
        ["sh", str(script), "llamacpp", str(tmp_path / "env"), sys.executable, "torch"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be installed" in (tmp_path / "env" / "failed.txt").read_text()
    engine = Engine("x", "env", "fake.py")
    why = peers._why_missing(engine, engine.python(tmp_path), tmp_path)
    assert "there-is-no-such-folder" in why
