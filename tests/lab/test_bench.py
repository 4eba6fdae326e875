"""The benches at toy size: what they count is right, whatever the times are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyramidinfer import LLM
from pyramidinfer.cache.mover import Mover
from pyramidinfer.cli.app import main
from pyramidinfer.lab import shapes
from pyramidinfer.lab.bench import compaction, kernels, machine, plans
from pyramidinfer.lab.bench.machine import measure_roof
from pyramidinfer.lab.bench.roofline import decode_bytes, prefill_flops
from pyramidinfer.lab.bench.selection_shares import measure_shares
from pyramidinfer.lab.bench.setting import Rig, Setting, run_pass
from pyramidinfer.lab.bench.timing import PeakMemory, ratios, side_by_side, spread
from pyramidinfer.lab.shapes import SHAPES, make_model, save_model, shape_config
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}
POLICIES = "full,pyramidinfer,snapkv"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape, a machine and samples that take no time."""
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(plans, "DEFAULT_SHAPE", "small")
    monkeypatch.setattr(machine, "BYTES", 2**20)
    monkeypatch.setattr("pyramidinfer.lab.bench.timing.SAMPLE_SECONDS", 1e-4)


def bench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *words: str
) -> tuple[int, dict[str, Any]]:
    """A bench as a user runs it: its exit code and its file (empty where there is none)."""
    out = folder / f"{name}.json"
    monkeypatch.setattr(sys, "argv", ["pyramidinfer", "bench", name, "--json", str(out), *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), json.loads(out.read_text()) if out.is_file() else {}


def is_whole(entry: dict[str, Any], picture: Path) -> bool:
    return {
        "commit",
        "machine",
        "configuration",
        "result",
    } <= entry.keys() and picture.read_bytes().startswith(b"\x89PNG")


# --- shapes ---------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models() -> None:
    counts = {}
    for name in (
        "llama2-7b",
        "llama2-13b",
        "llama3-8b",
        "llama3.2-1b",
        "qwen2.5-0.5b",
        "bench-200m",
    ):
        with torch.device("meta"):
            model = shapes.AutoModelForCausalLM.from_config(shape_config(name))
        counts[name] = sum(each.numel() for each in model.parameters())
    assert counts["llama2-7b"] == 6_738_415_616
    assert counts["llama2-13b"] == 13_015_864_320
    assert counts["llama3-8b"] == 8_030_261_248
    assert counts["llama3.2-1b"] == 1_235_814_400
    assert counts["qwen2.5-0.5b"] == 494_032_768
    assert 200e6 < counts["bench-200m"] < 210e6
    with pytest.raises(ValueError, match="did you mean 'llama2-7b'"):
        shape_config("llama2-7")


def test_random_weights_are_seeded_and_run(tmp_path: Path) -> None:
    model = make_model("small", "float32", seed=1)
    again, other = make_model("small", "float32", seed=1), make_model("small", "float32", seed=2)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, again(ids).logits)
        assert not torch.equal(logits, other(ids).logits)
    assert logits.isfinite().all() and logits.std() > 0
    weights = torch.cat([each.detach().flatten() for each in model.parameters() if each.ndim == 2])
    assert abs(float(weights.std()) - shapes.STD) < 1e-3 and abs(float(weights.mean())) < 1e-3
    assert make_model("small", num_hidden_layers=1).dtype == torch.bfloat16
    tied = make_model("small", model_type="qwen2", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not tied.model.layers[0].self_attn.q_proj.bias.any()

    llm = LLM(str(save_model(model, tmp_path / "model")), policy="full", kv_memory="1MiB")
    assert llm.tokenizer("w9 w11 <eos> nothing")["input_ids"] == [9, 11, 2, 3]
    assert llm.tokenizer.vocab_size == 512
    (file,) = (tmp_path / "model").glob("*.safetensors")
    loaded = load_file(file)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(loaded, model.model.layers[0].self_attn.q_proj.weight)


def test_a_table_goes_round() -> None:
    target, table = torch.zeros(7), torch.arange(3.0)
    assert shapes._copy_round(target, table, 2) == 0
    assert target.tolist() == [2, 0, 1, 2, 0, 1, 2]


# --- what is measured -----------------------------------------------------------------------------


def test_spreads_and_turns() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == {"median": 2.5, "min": 2.0, "max": 3.0}
    seen: list[str] = []
    works = {"a": lambda i: seen.append(f"a{i}"), "b": lambda i: seen.append(f"b{i}")}
    found = side_by_side(works, torch.device("cpu"), repeats=3)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}
    order = [name for name, before in zip(seen, ["", *seen], strict=False) if name[0] != before[:1]]
    assert [name[0] for name in order] == ["a", "b"] * 4  # once to warm up, then three turns


def test_peak_memory_sees_what_is_gone_again() -> None:
    before = PeakMemory(torch.device("cpu"))
    low = before.bytes
    torch.ones(2**25)  # 128 MiB
    assert before.bytes >= low + 100 * 2**20


def test_roof_is_measured() -> None:
    roof = measure_roof(torch.float32, torch.device("cpu"), repeats=1)
    assert all(value > 0 for value in roof.tuple)
    assert roof.best(machine.Roof(0, 1e30, 0)).copy == 1e30


def test_work_is_counted_by_hand() -> None:
    runner = Rig(Setting(dtype="float32")).runner
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96  # q, k, v, o and the MLP
    pairs = 10 * 11 / 2
    attention = 4 * 2 * (16 + 16) * pairs
    head = 2 * 64 * 512
    assert prefill_flops(runner, [10, 10, 5]) == pytest.approx(
        2 * 25 * layer + 2 * attention + 4 * 2 * 32 * 15 + head
    )
    entry = 2 * (16 + 16) * 4
    weights = 4 * (3 * (layer + 2 * 64) + 64 * 512)
    assert decode_bytes(runner, [7.0, 5.0, 3.0]) == weights + 15 * entry


def test_a_pass_tells_what_happened() -> None:
    subject = Rig(Setting(dtype="float32", policies=("full", "snapkv")))
    prompts = subject.prompts(3, 100)
    assert prompts == subject.prompts(3, 100) and all(len(each) == 100 for each in prompts)
    full = run_pass(subject.engine("full", 3, 100, 6), prompts, 6)
    assert full.output_tokens == 18 and full.peak_in_flight == 3
    assert all(times == sorted(times) for times in full.arrivals)
    assert 0 < full.prefill_seconds < full.seconds
    assert len(full.decode_steps) == 5 and full.step_seconds() == full.decode_steps
    assert full.computed == [[100] * 3] * 3
    assert full.prefill_bytes[0] == full.prefill_bytes[1]
    assert full.kept_prefill == [300] * 3 and full.kept_end == [3 * 105] * 3
    cut = run_pass(subject.engine("snapkv", 3, 100, 6), prompts, 6)
    assert cut.prefill_bytes[0] < cut.prefill_bytes[1] == full.prefill_bytes[1]


def test_shares_of_prefill_are_told_by_length_and_policy(tmp_path: Path) -> None:
    out, plan = tmp_path / "shares.json", Setting(dtype="float32", policies=("keydiff", "chunkkv"))
    rows = measure_shares(plan, (60, 90), out, "a model")
    asked = [(row["prompt_len"], row["policy"]) for row in rows]
    assert asked == [(60, "keydiff"), (60, "chunkkv"), (90, "keydiff"), (90, "chunkkv")]
    assert all(0 < row["prefill_share"] < 1 for row in rows)
    told = json.loads(out.read_text())
    assert told["result"]["rows"] == rows
    assert told["configuration"]["lengths"] == [60, 90]
    assert told["configuration"]["model"] == "a model"


def test_auto_memory_holds_all_requests_and_hardly_more() -> None:
    subject = Rig(Setting(dtype="float32"))
    for spec in Setting().policies:
        engine = subject.engine(spec, 5, 60, 8)
        assert run_pass(engine, subject.prompts(5, 60), 8).peak_in_flight == 5
        assert (
            engine.pool.budget
            < 1.6
            * 5
            * engine.ledger.cost(engine.policy, 60, 8, subject.runner.layers_for(68), 0).bytes
        )


def test_keep_goes_to_those_who_take_it() -> None:
    setting = Setting(keep=0.3)
    assert setting.policy("full").name == "full"
    assert setting.policy("snapkv").keep == 0.3  # type: ignore[attr-defined]
    assert setting.policy("snapkv:keep=.5,window=8").keep == 0.5  # type: ignore[attr-defined]


# --- the commands ---------------------------------------------------------------------------------


def test_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, entry = bench(
        tmp_path,
        monkeypatch,
        "throughput",
        "--policies",
        POLICIES,
        "--batch",
        "3",
        "--prompt-len",
        "80",
        "--output-len",
        "4",
        "--repeats",
        "2",
        "--dtype",
        "float32",
    )
    assert code == 0 and is_whole(entry, tmp_path / "throughput.png")
    rows = {row["policy"]: row for row in entry["result"]["rows"]}
    assert list(rows) == POLICIES.split(",")
    for row in rows.values():
        assert row["output_tokens"] == 12 and row["prompt_tokens"] == 240
        ratio = row["all_tokens_per_second"]["median"] / row["output_tokens_per_second"]["median"]
        assert ratio == pytest.approx(252 / 12)
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["roofline"]["share_of_matrix_rate"] > 0 < row["peak_bytes"]
    assert rows["full"]["against_first"]["throughput"]["median"] == 1
    assert rows["full"]["kv_share_prefill"] == 1 > rows["snapkv"]["kv_share_prefill"]
    assert rows["pyramidinfer"]["computed_share"] < 1 == rows["snapkv"]["computed_share"]
    assert (
        rows["pyramidinfer"]["roofline"]["prefill_flops"]
        < rows["snapkv"]["roofline"]["prefill_flops"]
        == rows["full"]["roofline"]["prefill_flops"]
    )


def test_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, entry = bench(
        tmp_path,
        monkeypatch,
        "latency",
        "--policies",
        "full,snapkv",
        "--batch",
        "1,2",
        "--prompt-len",
        "40,60",
        "--output-len",
        "3",
        "--repeats",
        "2",
    )
    assert code == 0 and is_whole(entry, tmp_path / "latency.png")
    rows = entry["result"]["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["samples"] == {"first_token": 2 * row["batch"], "inter_token": 4 * row["batch"]}
        for figures in (row["first_token_seconds"], row["inter_token_seconds"]):
            assert 0 < figures["p50"] <= figures["p99"] <= figures["max"]


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, entry = bench(
        tmp_path,
        monkeypatch,
        "memory",
        "--policies",
        "full,streaming_llm",
        "--prompt-len",
        "200",
        "--output-len",
        "4",
        "--kv-memory",
        "1MiB",
        "--dtype",
        "float32",
    )
    assert code == 0 and is_whole(entry, tmp_path / "memory.png")
    full, cut = entry["result"]["rows"]
    assert 1 <= full["fits"] <= full["in_flight"] < full["requests"]
    assert cut["in_flight"] >= full["in_flight"]
    assert cut["kv_bytes_per_request"] < full["kv_bytes_per_request"]
    assert full["peak_kv_bytes"] <= full["kv_memory"] == 2**20
    code, entry = bench(
        tmp_path,
        monkeypatch,
        "memory",
        "--policies",
        "full",
        "--prompt-len",
        "2000",
        "--kv-memory",
        "1MiB",
    )
    assert code == 0 and entry["result"]["rows"][0]["fits"] == 0
    assert "raise kv_memory" in entry["result"]["rows"][0]["reason"]


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels.KernelPlan.__init__,
        "__defaults__",
        (
            "auto",
            "bfloat16",
            "auto",
            (1,),
            (64,),
            0,
            1,
            1,
            2**18,
            16,
        ),
    )
    code, entry = bench(
        tmp_path,
        monkeypatch,
        "kernels",
        "--batch",
        "1,2",
        "--prompt-len",
        "64,128",
        "--repeats",
        "1",
        "--dtype",
        "float32",
    )
    assert code == 0 and is_whole(entry, tmp_path / "kernels.png")
    rows = entry["result"]["rows"]
    names = {
        "decode",
        "decode, unequal heads",
        "window scores",
        "column sums",
        "prefill",
        "keep half",
    }
    assert {row["kernel"] for row in rows} == names
    assert len(rows) == 2 * 2 * (2 * 2 + 4)
    assert {row["against"] for row in rows if "unequal" in row["kernel"]} == {"equal heads"}
    decode = next(row for row in rows if row["kernel"] == "decode" and row["batch"] == 2)
    assert decode["bytes"] == 2 * 2 * 64 * 16 * 64 * 4
    for row in rows:
        share = row["against_seconds"]["median"] / row["seconds"]["median"]
        assert row["share"] == pytest.approx(share)


def test_compaction_counts_the_bytes_that_move() -> None:
    keep, copy, size = compaction.time_keep(
        2, 8, 16, 100, torch.device("cpu"), torch.float32, repeats=2, warmup=1, mover=Mover()
    )
    assert len(keep) == len(copy) == 2
    entry = 2 * 8 * 4 + 4
    assert size % 2 == 0 and 0 < size <= 2 * 2 * 50 * entry  # at most what stays, both ways


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("throughput", ["--shape", "llama2-7"], "did you mean 'llama2-7b'"),
        ("throughput", ["--shape", "small", "--model", "x"], "--model or --shape, not both"),
        ("throughput", ["--policies", "ful"], "did you mean 'full'"),
        ("throughput", ["--policies", "full,full"], "names one twice"),
        ("throughput", ["--batch", "0"], "--batch 0 must be at least 1"),
        ("throughput", ["--repeats", "0"], "--repeats 0 must be at least 1"),
        ("throughput", ["--keep", "2"], "keep=2.0 must be above 0"),
        ("throughput", ["--prompt-len", "40000"], "exceed the model's"),
        ("throughput", ["--kv-memory", "lots"], "is not a size"),
        ("throughput", ["--device", "cuda:9"], "device='cuda:9'"),
        ("throughput", ["--dtype", "int8"], "dtype='int8' is unknown"),
        ("throughput", ["--json", "."], "is a folder"),
        ("latency", ["--prompt-len", "many"], "--prompt-len 'many'"),
        ("latency", ["--output-len", "1"], "--output-len 1 must be at least 2"),
        ("memory", ["--model", "nowhere/at/all"], "does not exist"),
        ("memory", ["--threads", "-1"], "--threads -1"),
        ("kernels", ["--backend", "magic"], "'magic' is unknown"),
        ("kernels", ["--prompt-len", "8"], "--prompt-len 8 must be at least 32"),
    ],
)
def test_mistakes_are_one_line(
    name: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, entry = bench(tmp_path, monkeypatch, name, *words)
    said = capsys.readouterr().err
    assert code == 2 and not entry
    assert message in said and "Traceback" not in said


def test_a_model_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    llm = LLM(model, policy="full", kv_memory="1MiB")
    with pytest.raises(ValueError, match=r"ended after 0 of 4 tokens \(error\)"):
        run_pass(llm.engine, [[5, 6, 7]], 4)
