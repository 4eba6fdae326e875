"""Ranks as processes: they begin with an ``LLM``, end with it, or with the first that is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.launch import RanksError
from pyramidinfer.policies import Policy
from tests.adapters import save_adapter
from tests.engine.build import policy_named
from tests.tiny import random_prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama", torch.float64).save_pretrained(place)
    save_adapter(place / "adapter", "llama", 1)
    return place


def build(folder: Path, **options: object) -> LLM:
    """Its policy has the model's heads measured first, by all ranks together."""
    options |= {"kv_memory": "4MiB", "page_size": 4, "lora_modules": {"a": f"{folder}/adapter"}}
    return LLM(folder, policy_named("pyramid"), **options)


def children() -> list[psutil.Process]:
    """Ranks that this process has started; other tests leave processes of other kinds."""
    found = psutil.Process().children()
    return [
        each for each in found if any("launch import follow" in part for part in each.cmdline())
    ]


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_tokens_of_two_processes_and_the_end_of_one(folder: Path, option: str) -> None:
    prompts = [random_prompt(1, 40), random_prompt(2, 9)]
    loras = [None, "a", "a"]

    def tokens(llm: LLM) -> list[list[int]]:
        answers = llm.generate([*prompts, prompts[0]], GREEDY, lora=loras)
        return [each.token_ids for each in answers]

    expected = tokens(build(folder))
    assert expected[0] != expected[2]
    llm = build(folder, **{option: 2})
    assert tokens(llm) == expected
    request = llm.engine.add(prompts[0], GREEDY)
    llm.engine.step()
    (other,) = children()
    other.send_signal(signal.SIGKILL)
    with pytest.raises(RanksError, match=rf"rank 1 \(process {other.pid}\) has ended: .*SIGKILL"):
        while request.status != "finished":
            llm.engine.step()
    llm.engine.abort(request)
    assert request.error is not None and "SIGKILL" in request.error
    with pytest.raises(RanksError, match="rank 1"):
        llm.generate(prompts, GREEDY)
    llm.close()
    assert not children()


class Mine(Policy):
    name = "mine"


def test_what_other_processes_could_not_have_is_refused_before_any_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="a loaded model cannot be sent to other ranks"):
        LLM(tiny_model("llama"), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="4 query heads over 2 KV heads .* work: 1, 2, 4"):
        build(folder, tensor_parallel_size=3)
    with pytest.raises(ValueError, match="pipeline_parallel_size=9: this model has 4 layers"):
        build(folder, pipeline_parallel_size=9)
    for given, why in (("3,1", "names 2 stages, but pipeline_parallel_size=1"), ("a", "such as")):
        with pytest.raises(ValueError, match=f"pipeline_layers='{given}'.*{why}"):
            build(folder, pipeline_layers=given)
    with pytest.raises(ValueError, match="'3,2' has 5 layers; this model has 4"):
        build(folder, pipeline_layers="3,2", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="rank_timeout=5 has no effect on one rank"):
        build(folder, rank_timeout=5)
    with pytest.raises(ValueError, match="tensor_parallel_size=0 must be a whole number"):
        build(folder, tensor_parallel_size=0)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    with pytest.raises(ValueError, match="policy 'mine' is defined in the program itself"):
        LLM(folder, Mine(), tensor_parallel_size=2)
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="torchrun started 4 processes"):
        build(folder, tensor_parallel_size=2)
    assert not children()
