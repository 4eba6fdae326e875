"""The command line, run as a user runs it."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import pyramidinfer
from pyramidinfer import LLM, PyramidInfer, SamplingParams
from pyramidinfer.attention import available_backends
from pyramidinfer.cli import common
from pyramidinfer.cli.app import app, main
from pyramidinfer.cli.common import human_bytes, policy_from
from pyramidinfer.engine.profiling import find_profile
from pyramidinfer.lab.recall import make_questions
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES, make_policy
from tests.commands import run_done as run
from tests.tiny import of_layers, tiny_model

GOLDEN = str(Path(__file__).parents[1] / "golden" / "mha8")


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("demo", "generate", "inspect", "doctor"):
        assert command in shown.stdout


def test_help_and_version_import_neither_torch_nor_transformers() -> None:
    """So they are there at once."""
    groups: list[typer.Typer] = [each.typer_instance for each in app.registered_groups]
    named = [each.name or each.callback.__name__ for each in app.registered_commands]
    assert {"serve", "chat", "generate", "batch", "profile"} <= set(named) and len(groups) == 2
    lines = [["--help"], ["--version"], ["study", "--help"], ["bench", "--help"]]
    lines += [[each, "--help"] for each in named]
    lines += [["study", "ruler", "--help"], ["bench", "throughput", "--help"]]
    code = (
        "import json, sys\n"
        "from pyramidinfer.cli.app import main\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['pyramidinfer', *line]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, line\n"
        "    slow = {'torch', 'transformers', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "    assert not slow, (line, slow)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"pyramidinfer {pyramidinfer.__version__}" in done.stdout


def test_help_tells_what_is_registered() -> None:
    assert list(common.POLICY_NAMES) == sorted(POLICIES)
    assert list(common.BACKENDS) == sorted(available_backends())
    shown = " ".join(run("generate", "--help").stdout.replace("│", " ").split())
    assert "default: (0.5 for pyramid and duo, the published budget for other policies)" in shown
    keeps = {name: getattr(make_policy(name), "keep", None) for name in POLICIES}
    assert {name for name, keep in keeps.items() if keep is not None} == {"pyramid", "duo", "kvzip"}
    assert keeps["pyramid"] == keeps["duo"] == 0.5  # kvzip's is published


def commands() -> dict[str, Any]:
    """Every command's parameters by name, as the command line has them."""
    root: Any = typer.main.get_command(app)
    groups = {"": root, "study ": root.commands["study"]}
    return {
        f"{prefix}{name}": {each.name: each for each in command.params}
        for prefix, group in groups.items()
        for name, command in group.commands.items()
        if not hasattr(command, "commands")
    }


def test_one_default_policy_and_two_ways_to_name_a_model() -> None:
    found = commands()
    policies = {name: each["policy"].default for name, each in found.items() if "policy" in each}
    assert len(policies) >= 7 and set(policies.values()) == {"pyramid"}
    assert inspect.signature(LLM).parameters["policy"].default == "pyramid"
    takes = {name for name, each in found.items() if "model" in each}
    assert takes == set(found) - {"doctor", "fetch", "convert"}
    for name in takes:
        assert found[name]["model"].param_type_name == "argument", name
        assert "--model" in found[name]["model_option"].opts, name


def test_a_model_by_place_or_by_name() -> None:
    asked = ("--policy", "snapkv", "--prompt-len", "1000", "--json")
    shown = [
        run("inspect", *words, *asked).stdout
        for words in ((GOLDEN,), ("--model", GOLDEN), (GOLDEN, "--model", GOLDEN))
    ]
    assert json.loads(shown[0])["model"] == GOLDEN and len(set(shown)) == 1
    done = run("generate", GOLDEN, "--model", "other", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: two models are given, {GOLDEN!r} and --model 'other'; leave one out"
    )


def test_generate_json_equals_the_library(tmp_path: Path) -> None:
    prompt = make_questions(4, 1, 300)[0].prompt
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    done = run(
        "generate",
        "--policy",
        "pyramidinfer",
        "--keep",
        "0.45",
        "--prompt-file",
        str(file),
        "--max-tokens",
        "8",
        "--dtype",
        "float32",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    llm = LLM(shipped_model(), policy="pyramidinfer", keep=0.45, dtype="float32")
    out = llm.generate(prompt, SamplingParams(max_tokens=8))[0]
    assert entry["token_ids"] == out.token_ids
    assert entry["text"] == out.text
    assert entry["kv"]["bytes"] == out.kv.bytes < out.kv.full_bytes


def test_generate_streams_text_and_a_summary() -> None:
    prompt = make_questions(4, 1, 200)[0].prompt
    done = run(
        "generate", "--policy", "full", "--prompt-file", "-", "--max-tokens", "11", text=prompt
    )
    assert done.returncode == 0, done.stderr
    llm = LLM(shipped_model(), policy="full")
    assert (
        done.stdout.strip() == llm.generate(prompt, SamplingParams(max_tokens=11))[0].text.strip()
    )
    assert "computed 100% and kept 100%" in " ".join(done.stderr.split())


def test_generate_lossless_says_what_full_says() -> None:
    prompt = make_questions(4, 1, 400)[0].prompt
    asked = ("generate", "--prompt-file", "-", "--max-tokens", "11", "--dtype", "float32")
    plain = run(*asked, "--policy", "full", "--json", text=prompt)
    lossless = (*asked, "--lossless", "--draft-tokens", "2", "--keep", "0.2")
    done = run(*lossless, "--json", text=prompt)
    assert done.returncode == 0, done.stderr
    wanted, given = json.loads(plain.stdout), json.loads(done.stdout)
    assert given["token_ids"] == wanted["token_ids"] and wanted["metrics"]["drafts"] is None
    drafts = given["metrics"]["drafts"]
    assert 0 <= drafts["accepted"] <= drafts["drafted"] and drafts["verifications"] > 0
    told = " ".join(run(*lossless, text=prompt).stderr.split())
    assert f"lossless, {drafts['accepted']} of {drafts['drafted']} drafts accepted, " in told
    assert "kept 100%" in told and "tokens per verification" in told


def test_generate_tells_where_positions_end() -> None:
    positions = LLM(shipped_model(), policy="full").engine.runner.max_positions
    words = " ".join(["map"] * (positions - 4))
    done = run(
        "generate",
        "--policy",
        "full",
        "--prompt-file",
        "-",
        "--max-tokens",
        "50",
        "--json",
        text=words,
    )
    entry = json.loads(done.stdout)
    assert entry["finish_reason"] == "length"
    left = len(entry["token_ids"])
    assert f"50 tokens were requested, but the model's context leaves {left} " in done.stderr


def test_chat_applies_the_template() -> None:
    done = run(
        "generate", "--chat", "--prompt", "Where is the map ?", "--max-tokens", "2", "--json"
    )
    entry = json.loads(done.stdout)
    tokenizer = LLM(shipped_model()).tokenizer
    text = tokenizer.decode(entry["prompt_token_ids"])
    assert text == "<bos> <user> Where is the map ? <end> <assistant>"


def test_inspect_tells_the_bytes_of_a_kv_dtype() -> None:
    """Those of the full cache are of 16 bits a number."""
    found = {}
    for kv_dtype in ("auto", "int8", "int4"):
        words = ("--policy", "full", "--prompt-len", "1000", "--dtype", "bfloat16", "--json")
        done = run("inspect", "--kv-dtype", kv_dtype, *words)
        assert done.returncode == 0, done.stderr
        found[kv_dtype] = json.loads(done.stdout)
        assert found[kv_dtype]["kv_dtype"] == kv_dtype
    full = [row["full_bytes"] for row in found["auto"]["layers"]]
    assert found["auto"]["bytes"] == sum(full)
    for each in found.values():
        assert [row["full_bytes"] for row in each["layers"]] == full
        assert each["bytes"] == sum(row["bytes"] for row in each["layers"])
    assert found["auto"]["bytes"] > found["int8"]["bytes"] > found["int4"]["bytes"]


def test_inspect_is_the_policys_forecast() -> None:
    done = run(
        "inspect",
        "--model",
        GOLDEN,
        "--policy",
        "pyramidinfer",
        "--keep",
        "0.45",
        "--prompt-len",
        "1000",
        "--max-tokens",
        "20",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["layers"]
    llm = LLM(GOLDEN, kv_memory="64MiB")
    forecast = PyramidInfer(keep=0.45).forecast(1000, 20, llm.engine.runner.layers_for(1020))
    assert [row["computed"] for row in rows] == forecast.reach
    assert [of_layers([row["kept"]])[0] for row in rows] == forecast.kept
    page, heads = llm.engine.pool.layout.page_bytes[0], llm.engine.runner.kv_heads
    assert [row["bytes"] for row in rows] == [
        heads * -(-kept // 16) * page for kept in forecast.kept
    ]
    assert (
        json.loads(done.stdout)["admission_bytes"]
        == llm.engine.ledger.cost(
            PyramidInfer(keep=0.45), 1000, 20, llm.engine.runner.layers_for(1020), 0
        ).bytes
    )
    tight = run("inspect", "--policy", "pyramidinfer", "--keep", "0.09", "--prompt-len", "1000")
    assert "keep=0.09 cannot be reached at this prompt length" in tight.stdout
    short = run("inspect", "--keep", "0.3", "--prompt-len", "300").stdout
    assert "texts below min_context=1024 tokens keep as many entries as 1024 tokens would" in short
    assert "the lowest is" not in short
    short = run("inspect", "--policy", "pyramidinfer", "--keep", "0.3", "--prompt-len", "50").stdout
    assert "cannot be reached at this prompt length (min_context=64: shorter texts" in short
    table = run(
        "inspect",
        "--model",
        GOLDEN,
        "--policy",
        "pyramidinfer",
        "--keep",
        "0.45",
        "--prompt-len",
        "1000",
    )
    assert "mean share of the prompt computed: 0.450" in table.stdout


def test_inspect_of_sliding_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares are of a full cache, which holds their window only: none is above 100 %."""
    tiny_model("gemma3_text", torch.float32).save_pretrained(tmp_path)

    def shown(*options: str) -> str:
        words = ["inspect", str(tmp_path), "--prompt-len", "90", "--max-tokens", "9", *options]
        monkeypatch.setattr(sys, "argv", ["pyramidinfer", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    full = shown("--policy", "full")
    assert set(re.findall(r"\d+%", full)) == {"100%"}
    assert "of a full cache's entries kept after it: 1.000" in full
    text = shown("--policy", "streaming_llm", "--keep", "0.3")
    assert "cannot be reached" not in text
    assert (
        "layers hold at most their sliding window; of the entries of the other layers, 0.3" in text
    )
    rows = json.loads(shown("--policy", "snapkv", "--keep", "0.5", "--json"))["layers"]
    assert max(row["bytes"] / row["full_bytes"] for row in rows) == 1


def test_inspect_shows_heads_that_are_not_equally_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model's profile is known, and the forecast is its policy's."""
    asked = ["inspect", "--policy", "duo", "--keep", "0.3", "--prompt-len", "1500"]
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *asked, "--max-tokens", "20", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)["layers"]
    llm = LLM(shipped_model(), policy="duo", keep=0.3, profile=False)
    forecast = llm.policy.forecast(1500, 20, llm.engine.runner.layers_for(1520))
    assert [row["kept"] for row in rows] == forecast.heads
    assert [row["computed"] for row in rows] == forecast.reach
    assert len({kept for row in rows for kept in row["kept"]}) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["snapkv", "-o", "adaptive=True"],
        ["pyramidkv", "-o", "adaptive=True"],
        ["expected_attention"],
    ],
)
def test_inspect_counts_what_heads_share(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer's heads hold no more than its budget together, however they share it."""
    asked = ["inspect", "--policy", *options, "--keep", "0.3", "--prompt-len", "1000"]

    def shown(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pyramidinfer", *asked, "--max-tokens", "20", *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    found = json.loads(shown("--json"))
    rows, heads = found["layers"], len(found["layers"][0]["kept"])
    mean = sum(row["kept_together"] for row in rows) / len(rows) / heads
    assert 320 <= mean <= 321.5
    assert sum(row["bytes"] for row in rows) == found["bytes"]
    table = shown()
    assert re.search(r"entries kept after it: 0.30[01]", table), table
    assert "cannot be reached" not in table and re.search(r"\d+, mean 3\d\d", table)


def test_inspect_refuses_a_profile_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = find_profile(LLM(shipped_model(), policy="full").engine.shared)
    assert own is not None
    mark = own.fingerprint
    other = replace(own, fingerprint=replace(mark, vectors=(*mark.vectors[:-1], (9.0, 1.0, 1.0))))
    for profile, code in ((own, 0), (other, 2)):
        path = profile.save(tmp_path / "heads.json")
        asked = ["inspect", "--policy", "pyramid", "-o", f"profile={path}"]
        monkeypatch.setattr(sys, "argv", ["pyramidinfer", *asked])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert (stopped.value.code or 0) == code
    assert "the profile belongs to other weights" in capsys.readouterr().err


def test_inspect_counts_what_is_read_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is admitted and kept is what the engine says of its policy, sentences included."""
    asked = ["inspect", "--policy", "kvzip", "--keep", "0.3", "--prompt-len", "1000"]

    def shown(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pyramidinfer", *asked, "--max-tokens", "20", *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    found = json.loads(shown("--json"))
    llm = LLM(shipped_model(), policy="kvzip", keep=0.3)
    request = llm.engine.make([3] * 1000, SamplingParams(max_tokens=20))
    assert found["admission_bytes"] == request.cost.bytes
    assert (
        request.cost.after_prefill is not None
        and found["bytes"] == request.cost.after_prefill.bytes
    )
    assert found["tokens_read_again"] == 1000 + len(llm.policy.question)  # type: ignore[attr-defined]
    table = shown()
    assert "mean share of the prompt computed: 2.0" in table and "kept after it: 0.300" in table
    assert "cannot be reached" not in table and "are read after the prompt" in table


def test_demo_prints_a_table_and_draws(tmp_path: Path) -> None:
    done = run("demo", "--documents", "3", "--length", "300", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for row in (
        "answers right",
        "peak KV bytes",
        "tokens computed",
        "tokens kept",
        "requests in flight",
        "time to first token",
        "output tokens/s",
        "prompt + output tokens/s",
    ):
        assert row in done.stdout
    assert (tmp_path / "pyramid.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "demo.json").read_text())["result"]
    assert list(figures) == [
        "full cache",
        "paper's settings",
        "paper's rule, keep 0.3",
        "pyramid, keep 0.3",
    ]
    assert figures["full cache"]["computed_share"] == 1
    assert figures["paper's rule, keep 0.3"]["computed_share"] < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--policy", "pyramidinfr"], "did you mean 'pyramidinfer'"),
        (["generate", "--prompt", "x", "--keep", "3"], "keep=3.0 must be above 0"),
        (["generate", "--prompt", "x", "-o", "sink=3"], "did you mean 'sinks'"),
        (["generate", "--prompt", "x", "-o", "sinks"], "write NAME=VALUE"),
        (["generate", "--prompt", "x", "--model", "no/such/model"], "does not exist"),
        (
            ["generate", "--prompt", "x", "--chat-template-kwargs", "{}"],
            "--chat-template-kwargs has no effect without --chat",
        ),
        (
            ["generate", "--prompt", "x", "--chat", "--chat-template-kwargs", '{"tools": 1}'],
            "'tools' cannot be set this way",
        ),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "--prompt", "x", "--kv-memory", "1"], "below one page per layer"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "x", "--kep", "0.4"], "No such option"),
        (["genrate"], "No such command 'genrate'"),
        (["generate", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["generate"], "give a prompt with --prompt TEXT or --prompt-file FILE"),
        (["generate", "--prompt-file", "no/such/file"], "cannot read --prompt-file"),
        (["generate", "--prompt", "x", "--model", GOLDEN], "needs a tokenizer"),
        (["generate", "--prompt", "x", "--model", GOLDEN, "--chat"], "has no chat template"),
        (
            ["generate", "--prompt", "x", "--backend", "flash"],
            "backend='flash' is unknown: use one",
        ),
        (["inspect", "--prompt-len", "0"], "--prompt-len 0 must be at least 1"),
        (["inspect", "--prompt-len", "5000"], "exceed the model's 4096 positions"),
        (
            ["inspect", "--policy", "pyramidinfer", "--keep", "0.3", "-o", "start_layer=8"],
            "is just above 0.750",
        ),
        (["demo", "--length", "9"], "--length 9 must lie between"),
        (["generate", "--prompt", "x", "--keep", "0.5", "-o", "keep=0.4"], "keep is given twice"),
        (["generate", "--prompt", "x", "-o", "sharpness=None"], "sharpness=None"),
        (["generate", "--prompt", "x", "-o", "schedule=f"], "no option 'schedule'"),
        (["generate", "--prompt", "x", "-o", "start_layer=12"], "the model has 12 layers, 0 to 11"),
        (["demo", "--out", "/dev/null/x"], "Not a directory"),
        (
            ["generate", "--prompt", "x", "--policy", "snapkv", "--no-profile"],
            "--no-profile has no effect: policy 'snapkv'",
        ),
        (
            ["generate", "--prompt", "x", "--policy", "duo", "-o", "profile=no/such.json"],
            "profile 'no/such.json' cannot be read",
        ),
        (["demo", "--kv-memory", "1MiB", "--documents", "1"], "raise kv_memory"),
        (["generate", "--prompt", "x", "--kv-dtype", "int5"], "kv_dtype='int5' is unknown"),
        (["inspect", "--kv-dtype", "int5"], "kv_dtype='int5' is unknown; did you mean 'int8'"),
        (["demo", "--kv-dtype", "int5"], "kv_dtype='int5' is unknown"),
        (["serve", "--verify", "--lossless"], "--verify with --lossless"),
        (["generate", "--prompt", "x", "--draft-tokens", "2"], "no effect without --lossless"),
        (["chat", "--draft-tokens", "2"], "--draft-tokens 2 has no effect without --lossless"),
        (
            ["generate", "--prompt", "x", "--lossless", "--draft-tokens", "9"],
            "draft_tokens=9: a step verifies at most 8",
        ),
        (
            ["generate", "--prompt", "x", "--lossless", "--policy", "kvzip"],
            "policy 'kvzip' reads the text again and cannot choose what drafts read",
        ),
        (
            ["serve", "--lossless", "--tensor-parallel-size", "2"],
            "lossless works on one rank, and this is 2: omit tensor_parallel_size",
        ),
        (
            ["serve", "--draft-tokens", "2", "--pipeline-parallel-size", "2"],
            "draft_tokens=2 has no effect on 2 ranks",
        ),
        (["serve", "--draft-tokens", "2", "--max-keep", "0.5"], "draft_tokens=2 has no effect"),
        (
            ["serve", "--offload-lossless", "--host-kv-memory", "1MiB", "--max-keep", "0.5"],
            "offload_lossless=True has no effect",
        ),
        (["serve", "--offload-lossless"], "offload_lossless=True needs host_kv_memory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = run("generate", "--prompt", "x", "--policy", "pyramidinfr")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_cleanly_with_what_is_done() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pyramidinfer",
            "generate",
            "--prompt",
            "The old baker",
            "--max-tokens",
            "4000",
            "--temperature",
            "1",
            "--top-k",
            "50",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    )
    assert process.stdout is not None
    first = process.stdout.read(20)  # it is under way
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().strip().endswith("stopped")
    assert b"Traceback" not in errors
    assert len(first + rest) >= 20


def test_helpers() -> None:
    assert policy_from("pyramidinfer", None, ["sinks=2", "decay_curve=linear"]) == PyramidInfer(
        sinks=2, decay_curve="linear"
    )
    assert [human_bytes(n) for n in (5, 2048, 3 * 2**20, 5 * 2**40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]
