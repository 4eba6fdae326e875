"""Ranks that hang, differ or die: one line, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from tests.adapters import save_adapter
from tests.engine.build import policy_named
from tests.tiny import random_prompt, tiny_model

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.launch import RanksError
from pyramidinfer.models.loading import shipped_model

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
ONE_RANK = """
import sys
from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.launch import RanksError
try:
    llm = LLM(
        sys.argv[1],
        "full",
        kv_memory=sys.argv[2],
        dtype="float32",
        tensor_parallel_size=2,
        lora_modules={each: each for each in sys.argv[3:]},
    )
    print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))[0].token_ids)
    llm.close()
except (ValueError, RanksError) as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", torch.float64).save_pretrained(tmp_path)
    return tmp_path


def as_torchrun(
    models: list[Path],
    memory: list[str],
    port: int,
    loras: Sequence[str] = (),
    places: Sequence[Path] = (ROOT, ROOT),
) -> list[subprocess.CompletedProcess[str]]:
    """Two processes as ``torchrun`` starts them, each in its folder; what became of each."""
    started = []
    for rank, (model, size) in enumerate(zip(models, memory, strict=True)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", ONE_RANK, str(model), size, *loras],
                cwd=places[rank],
                env={**os.environ, **place, "RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [each.communicate(timeout=300) for each in started]
    finally:
        for each in started:
            each.kill()
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *out)
        for each, out in zip(started, said, strict=True)
    ]


def free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_rank_that_hangs_ends_all_in_time(folder: Path, option: str) -> None:
    llm = LLM(folder, policy_named("full"), kv_memory="4MiB", rank_timeout=8, **{option: 2})
    (other,) = psutil.Process().children()
    other.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(RanksError, match=r"within 8 s: rank 1 \(process \d+\) is stopped"):
        llm.generate([random_prompt(1, 20)], GREEDY)
    assert time.monotonic() - begun < 40
    assert not other.is_running()


def test_one_model_after_the_other(folder: Path) -> None:
    prompt, found = random_prompt(1, 20), []
    for tensor, stages in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
        llm = LLM(folder, policy_named("snapkv"), kv_memory="4MiB", **sizes)
        found.append(llm.generate([prompt], GREEDY)[0].token_ids)
        llm.close()
    assert found == [found[0]] * 5
    assert not psutil.Process().children()


def test_torchrun_gives_the_same_tokens(folder: Path) -> None:
    expected = LLM(folder, "full", kv_memory="4MiB", dtype="float32").generate(
        [[5, 6, 7]], SamplingParams(max_tokens=3)
    )
    first, second = as_torchrun([folder] * 2, ["4MiB"] * 2, free_port())
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout) == expected[0].token_ids and not second.stdout


def test_ranks_with_other_weights_or_options_say_so(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(8)
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    for models, memory, what in (
        ([folder, other], ["4MiB"] * 2, "weights"),
        ([folder] * 2, ["4MiB", "5MiB"], "options"),
    ):
        for each in as_torchrun(models, memory, free_port()):
            assert each.returncode == 2
            assert f"error: rank 1 has other {what} than rank 0" in each.stderr
            assert "Traceback" not in each.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
def test_ranks_with_another_adapter_of_the_same_name_say_so(folder: Path, tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    for which, place in enumerate(places):
        save_adapter(place / "mine", "llama", which)
    found = as_torchrun([folder] * 2, ["4MiB"] * 2, free_port(), ["mine"], places)
    for each in found:
        assert each.returncode == 2
        assert "error: rank 1 has other weights of 'mine' than rank 0" in each.stderr
        assert "Traceback" not in each.stderr


def test_a_port_that_is_taken_is_told(folder: Path) -> None:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        line.listen()
        first = as_torchrun([folder], ["4MiB"], line.getsockname()[1])[0]
    assert first.returncode == 2
    assert "error: rank 0 cannot reach the other ranks" in first.stderr
    assert "Traceback" not in first.stderr


@pytest.fixture(params=["--tensor-parallel-size", "--pipeline-parallel-size"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pyramidinfer", "serve", "--port", str(port)),
            *("--kv-memory", "16MiB", request.param, "2"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + 300
        while time.monotonic() < ends and process.poll() is None:
            try:
                httpx.get(f"{url}/ready", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield process, url
    finally:
        process.kill()


def ask(url: str) -> Any:
    body = {"prompt": "The old baker", "max_tokens": 4, "model": Path(shipped_model()).name}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_a_server_ends_with_a_rank_that_dies(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert ask(url).status_code == 200
    (other,) = psutil.Process(process.pid).children()
    other.kill()
    codes = []
    for _ in range(100):
        try:
            codes.append(ask(url).status_code)
        except httpx.HTTPError:
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert set(codes) <= {500, 503} and 503 in codes
    assert f"rank 1 (process {other.pid}) has ended" in error and "Traceback" not in error
    assert not psutil.pid_exists(other.pid)
