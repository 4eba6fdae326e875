"""The comparison with other engines: who is missing or fails is told, and runs are not mixed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.lab.bench import engines, peers, peers_models, peers_page
from pyramidinfer.lab.bench.engines import (
    ENGINES,
    Engine,
    chosen_engines,
    parse_bits,
    parse_workloads,
)
from pyramidinfer.lab.bench.peers import Comparison, Folders, run_peers
from pyramidinfer.lab.bench.peers_drive import why_missing
from pyramidinfer.lab.bench.peers_table import EQUAL_HEAD, HEAD, equal_rows, peers_rows
from pyramidinfer.lab.bench.plots import draw_peers
from pyramidinfer.lab.shapes import SHAPES, make_model, save_model

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
from pathlib import Path
from driver import Answers, Engine, drive

def convert(job):
    if job["options"].get("unfit"):
        raise RuntimeError("no such format")
    with (Path(job["work"]) / "converted.txt").open("a") as log:
        log.write(job["options"].get("weights", "") + "\\n")

def load(job):
    options = job["options"]
    wrong, token = options.get("wrong", 0), options.get("token", 7)
    def generate(prompts, new):
        print("a library's chatter")
        return Answers([[token] * (new - wrong) for _ in prompts], 0.001)
    if options.get("fails"):
        raise RuntimeError("the engine cannot start")
    with (Path(job["work"]) / "loaded.txt").open("a") as log:
        log.write(options.get("title", "") + "\\n")
    return Engine(generate, ["numpy"], {"kv_share_prefill": 0.25, "weight_bytes": 2_000_000})

drive(load, convert)
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


JUDGE = "transformers 16/16"


def fake(name: str, weights: int = 16, cache: int = 16, **options: Any) -> Engine:
    """One of ours, unless its name is a peer's."""
    return Engine(name, None, "fake.py", {"title": name, **options}, weights=weights, cache=cache)


def compare(
    tmp_path: Path,
    drivers: Path,
    *entries: Engine,
    resume: bool = False,
    limit: float = 60.0,
    workloads: str = "T=2x5+3",
    **changes: Any,
) -> dict[str, Any]:
    plan = Comparison(parse_workloads(workloads), **{"shape": "small", "threads": 1, **changes})
    out = tmp_path / "peers.json"
    folders = Folders(tmp_path / "work", tmp_path / "environments", drivers)
    result = run_peers(plan, entries, out, folders, limit=limit, resume=resume)
    assert json.loads(out.read_text())["result"] == result
    return result


def log(tmp_path: Path, name: str) -> list[str]:
    """What fake engines wrote into the folder of converted models."""
    return next((tmp_path / "work").glob(f"*/converted/{name}.txt")).read_text().split("\n")[:-1]


def test_engines_that_fail_or_are_missing_are_rows(tmp_path: Path, drivers: Path) -> None:
    environment = tmp_path / "environments" / "broken"
    environment.mkdir(parents=True)
    (environment / "failed.txt").write_text("broken==1\ncannot be installed\n")
    result = compare(
        tmp_path,
        drivers,
        fake(JUDGE),
        fake("short", wrong=1),
        fake("dead", fails=True),
        Engine("absent", "absent", "fake.py"),
        Engine("broken", "broken", "fake.py"),
        Engine("mute", None, "mute.py"),
    )
    rows = {row["engine"]: row for row in result["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        JUDGE: "ok",
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
    ok = rows[JUDGE]
    assert ok["agreement"] == 1 and ok["repeats"] == 3 and "tokens" not in ok
    assert ok["output_tokens_per_second"] == pytest.approx(6 / ok["seconds"]["median"])
    assert ok["all_tokens_per_second"] == pytest.approx(16 / ok["seconds"]["median"])

    configuration = Comparison(parse_workloads("T=2x5+3"), "small", 1).configuration
    cells = peers_rows(result)
    assert all(len(line) == len(HEAD) for line in cells) and len(cells) == 6
    page = peers_page.peers(json.loads((tmp_path / "peers.json").read_text()))
    for text in ("broken on T: not installed: broken==1 cannot be installed", "| failed |"):
        assert text in page
    picture = draw_peers(configuration, result, tmp_path / "peers.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_equal_bits_are_compared(tmp_path: Path, drivers: Path) -> None:
    """The page, the README's table and the picture of rates that are given."""
    result = compare(tmp_path, drivers, fake(JUDGE), repeats=1)
    (row,) = result["rows"]

    def measured(name: str, bits: str, rate: float) -> dict[str, Any]:
        weights, cache = map(int, bits.split("/"))
        ours = name.startswith("ours")
        return {
            **row,
            "engine": f"{name} {bits}",
            "weights": weights,
            "cache": cache,
            "is_ours": ours,
            "output_tokens_per_second": rate,
        }

    result["rows"] = [
        measured("transformers", "16/16", 10),
        measured("OpenVINO", "16/16", 20),
        measured("ours, full", "16/16", 30),
        measured("ours, pyramid 0.45", "16/16", 50),
        measured("ours, full", "4/8", 60),
        measured("llama.cpp Q4_0", "4/8", 40),
        measured("OpenVINO", "8/8", 99),
        measured("ours, full", "8/16", 77),
    ]
    lines = equal_rows(result)
    assert [len(line) for line in lines] == [len(EQUAL_HEAD)] * 2
    assert lines[0] == [
        *("T", "16/16", "30.0", "50.0", "–", "OpenVINO", "20.0", "1.50", "2.50", "–"),
    ]
    assert lines[1][1:8] == ["4/8", "60.0", "–", "–", "llama.cpp Q4_0", "40.0", "1.50"]
    times = {line[1]: line[HEAD.index("times best other")] for line in peers_rows(result)}
    assert times["transformers 16/16"] == "0.50" and times["ours, full 8/16"] == "–"

    entry = json.loads((tmp_path / "peers.json").read_text()) | {"result": result}
    weights: dict[str, Any] = {
        "configuration": {"subject": {"model": "small"}},
        "result": {
            "rows": [
                {"weights": "auto", "perplexity": 16.8},
                {"weights": "int4", "perplexity": 16.9},
            ]
        },
    }
    page = f"before\n{peers_page.BEGIN}\nold\n{peers_page.END}\nafter\n"
    names = {"tasks": ["a", "b"], "samples": 6}
    tasks = {"meta": {"means": [{"weights": "int8", "score": 0.875, **names}]}}
    readme = peers_page.render_speed(page, entry, weights, tasks)
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| 16/16 | 30.0 (1.50×) | 50.0 (2.50×) | – | OpenVINO: 20.0 |" in readme
    assert "16.80 with 16 bits, 16.90 with int4" in readme
    assert "Mean score on 2 RULER tasks with 6 samples each: 0.88 with int8." in readme
    assert "that was measured (on T: llama.cpp, OpenVINO, transformers)" in readme
    assert "in the shape of `small`" in readme
    weights["configuration"]["subject"]["model"] = "another"
    other = peers_page.render_speed(page, entry, weights, tasks)
    assert "16.80" not in other and "RULER" not in other
    entry["configuration"]["shape"] = "smollm2"
    assert "engines on SmolLM2-135M-Instruct, on" in peers_page.render_speed(
        page, entry, None, None
    )
    larger = peers_page.peers(entry, "peers_llama3.2-1b")
    assert "## Other engines, smollm2" in larger and "images/peers_llama3.2-1b.png" in larger


def test_the_readme_repeats_the_committed_result() -> None:
    entry = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())
    results = ROOT / "benchmarks" / "results"
    quality = [
        json.loads((results / f"weights{x}_smollm2.json").read_text()) for x in ("", "_tasks")
    ]
    readme = (ROOT / "README.md").read_text()
    assert peers_page.render_speed(readme, entry, *quality) == readme
    assert len(re.findall(r"\(\d+\.\d\d×\)", readme)) >= 2


def test_an_interrupted_run_goes_on(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are there are not measured again, unless they failed or the code changed."""
    monkeypatch.setattr(peers, "commit", lambda: "one")
    first = compare(tmp_path, drivers, fake(JUDGE), fake("dead", fails=True))
    assert log(tmp_path, "loaded") == [JUDGE]
    second = compare(tmp_path, drivers, fake(JUDGE), fake("dead"), workloads="S=1x4+2", resume=True)
    assert log(tmp_path, "loaded")[1:] == [JUDGE, "dead"]
    third = compare(tmp_path, drivers, fake(JUDGE), fake("dead"), resume=True)
    assert log(tmp_path, "loaded")[3:] == ["dead"]
    assert {each["run"] for each in (first, second, third)} == {first["run"]}
    assert [(row["workload"], row["engine"], row["status"]) for row in third["rows"]] == [
        *(("S", JUDGE, "ok"), ("S", "dead", "ok"), ("T", JUDGE, "ok"), ("T", "dead", "ok")),
    ]
    assert third["rows"][0]["agreement"] == 1
    with pytest.raises(ValueError, match="other settings; omit --resume"):
        compare(tmp_path, drivers, fake(JUDGE), resume=True, repeats=5)
    with pytest.raises(ValueError, match="other settings; omit --resume"):
        compare(tmp_path, drivers, fake(JUDGE), resume=True, workloads="T=1x4+2")
    monkeypatch.setattr(peers, "commit", lambda: "two")
    compare(tmp_path, drivers, fake(JUDGE), resume=True)
    assert log(tmp_path, "loaded")[4:] == [JUDGE]
    assert len(compare(tmp_path, drivers, fake(JUDGE))["rows"]) == 1


def test_models_are_converted_once_and_first(
    tmp_path: Path, drivers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        replace(fake("x"), converts=True, options={"weights": "int8"}),
        replace(fake("y"), converts=True, options={"weights": "int8"}),
        replace(fake("z"), converts=True, options={"weights": "int4", "unfit": True}),
        fake("w"),
    ]
    plan = Comparison(parse_workloads("T=2x5+3"), "small", 1)
    folders = Folders(tmp_path / "work", tmp_path / "environments", drivers)
    folder = peers.prepare(plan, entries, folders)
    assert log(tmp_path, "converted") == ["int8"]
    assert "z is not converted: RuntimeError: no such format" in capsys.readouterr().err
    assert (folder / "tokenizer.json").is_file() and not (folders.work / peers.ROWS).exists()


def test_a_wrong_export_of_a_real_model_is_no_result(
    tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of 16 bits begins its answers as transformers does; one of fewer bits may not."""
    monkeypatch.setattr(peers, "is_real", lambda shape: True)
    evicting = replace(fake("evicting", token=8), whole=False)
    entries = (fake(JUDGE), fake("wrong", token=8), evicting, fake("int8", 8, token=8))
    rows = compare(tmp_path, drivers, *entries, repeats=1)["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1]["reason"].startswith("only 0% of its answers begin with transformers' token")


def test_a_real_model_reads_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched model is rounded to bfloat16; its prompts are stretches of English."""
    source = tmp_path / "source"
    save_model(make_model("small", "float32"), source)
    monkeypatch.setattr(peers_models, "find_model", lambda name: str(source))
    monkeypatch.setattr(peers_models, "english", lambda: " ".join(f"w{i}" for i in range(9, 400)))
    folder = peers_models.shared_model("smollm2", tmp_path, 0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    workload = parse_workloads("T=3x20+2")["T"]
    prompts = peers_models.make_prompts("smollm2", folder, workload, 0)
    assert prompts == peers_models.make_prompts("smollm2", folder, workload, 0)
    for prompt in prompts:
        assert prompt == list(range(prompt[0], prompt[0] + 20))
    with pytest.raises(ValueError, match="the text for real models has 391 tokens"):
        peers_models.make_prompts("smollm2", folder, parse_workloads("T=1x400+2")["T"], 0)


def test_enough_is_enough(tmp_path: Path, drivers: Path) -> None:
    result = compare(tmp_path, drivers, fake(JUDGE), repeats=5, enough_seconds=0.0)
    assert result["rows"][0]["repeats"] == 1


def test_a_driver_that_hangs_is_stopped(tmp_path: Path, drivers: Path) -> None:
    (drivers / "slow.py").write_text("import time; time.sleep(60)\n")
    result = compare(tmp_path, drivers, Engine("slow", None, "slow.py"), limit=0.5)
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
    theirs = Engine(JUDGE, None, "drive_transformers.py", {}, "float32")
    result = compare(tmp_path, DRIVERS, ours, theirs)
    rows = {row["engine"]: row for row in result["rows"]}
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"], result["rows"]
    assert rows["ours, full"]["agreement"] == 1
    assert rows["ours, full"]["notes"]["kv_share_prefill"] == 1
    judge = rows[JUDGE]
    assert {"transformers", "torch"} <= judge["versions"].keys()
    assert judge["prefill_seconds"]["median"] > 0 and not judge["prefill_in_own_run"]
    notes = rows["ours, full"]["notes"]
    assert notes["weight_bytes"] > 0 and notes["in_flight"] == 2


def test_engines_and_workloads_by_name() -> None:
    assert len(chosen_engines([""])) == len(ENGINES)
    assert all(each.is_ours for each in chosen_engines(["ours"]))
    assert [each.name for each in chosen_engines(["OpenVINO, ev", "vllm"], ["16/16", "4/8"])] == [
        *("OpenVINO, eviction 16/16", "vLLM (CPU) 16/16", "OpenVINO, eviction 4/8"),
    ]
    with pytest.raises(ValueError, match="did you mean 'llama.cpp F16"):
        chosen_engines(["llama.cp F16 16/16"])
    with pytest.raises(ValueError, match="--bits 4/8: no engine of --only"):
        chosen_engines(["vllm"], ["4/8"])
    assert parse_bits("8/8, 4/16") == ["8/8", "4/16"] and parse_bits("") == []
    with pytest.raises(ValueError, match="--bits '3/3': give weights/cache, of 16/16, 16/8"):
        parse_bits("3/3")
    assert parse_workloads("A,T=2x9+4")["T"].prompt_len == 9
    for wrong in ("D", "T=0x9+4", "T=2x9+1", ""):
        with pytest.raises(ValueError, match="--workloads"):
            parse_workloads(wrong)


def test_ours_and_theirs_have_the_same_bits() -> None:
    """For every workload and bits: our full cache, our default policy, and another engine."""
    assert len({each.name for each in ENGINES}) == len(ENGINES)
    for name in engines.WORKLOADS:
        mine = [each for each in ENGINES if each.runs_on(name)]
        for bits in {each.bits for each in mine}:
            names = {each.name for each in mine if each.bits == bits}
            assert {f"ours, full {bits}", f"ours, pyramid 0.45 {bits}"} < names
            assert any(not each.is_ours and each.bits == bits for each in mine)
    for each in ENGINES:
        options = each.options
        assert each.name.endswith(f" {each.weights}/{each.cache}") and each.runs_on("T")
        if each.is_ours:
            file = "gguf" in options
            weights = {"int8": 8, "int4": 4, "gguf": 4, "auto": 16}
            assert weights[options.get("weights", "auto")] == each.weights, each.name
            assert (options.get("weights") == "gguf") == file
            assert {"int8": 8, "auto": 16}[options.get("kv_dtype", "auto")] == each.cache
            assert each.whole == (options["policy"] == "full")
        elif each.environment == "openvino":
            assert {"fp16": 16, "int8": 8, "int4": 4}[options["weights"]] == each.weights
            assert {"bf16": 16, "u8": 8}[options["cache"]] == each.cache
        elif each.environment == "llamacpp":
            assert int(re.findall(r"\d+", options["type"])[0]) == each.weights
            assert {"f16": 16, "q8_0": 8}[options["cache"]] == each.cache
        else:
            assert each.bits == "16/16"


def test_every_engine_has_a_driver_and_a_recipe() -> None:
    recipes = {path.stem for path in (DRIVERS / "requirements").glob("*.txt")}
    recipes -= {"constraints", "guidellm", "clients"}  # a load generator and clients, no engines
    assert {each.environment for each in ENGINES if not each.is_ours} == recipes
    makefile = (DRIVERS / "peers.mk").read_text()
    assert set(makefile.split("PEERS ?= ")[1].splitlines()[0].split()) == recipes
    for engine in ENGINES:
        assert (DRIVERS / engine.driver).is_file()
    evicting = next(each for each in ENGINES if each.name == "OpenVINO, eviction 8/8")
    for name, workload in {**engines.WORKLOADS, **parse_workloads("T=2x300+4")}.items():
        entries = evicting.options_for(name, workload, "1MiB")["entries"]
        assert entries % 32 == 0 and 96 < entries < workload.prompt_len


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peers.main(["--list"])
    assert capsys.readouterr().out.splitlines() == [each.name for each in ENGINES]
    for words, message in (
        (["--only", "nobody"], "is no engine"),
        (["--shape", "huge"], "--shape 'huge' is unknown"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--limit", "0"], "--limit 0 must be over 0 seconds"),
        (["--bits", "9/9"], "--bits '9/9'"),
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
    why = why_missing(engine, engine.python(tmp_path), tmp_path)
    assert "there-is-no-such-folder" in why
