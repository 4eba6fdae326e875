"""Caches are of one adapter, or of the model alone: nobody takes up another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.tracing import trace
from tests.adapters import adapted, save_adapter
from tests.engine.build import policy_named
from tests.engine.serving import finish, start
from tests.tiny import random_prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WHO = [None, "first", "second"]
TEXT, MORE = random_prompt(1, 30), random_prompt(2, 9)
ROOM = {"host_kv_memory": "1MiB", "disk_kv_memory": "1MiB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    inside = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(inside / name, "llama", which)
        for which, name in enumerate(("first", "second"))
    }


def ask(engine: Engine, text: list[int], lora: str | None, owner: str | None = "ann") -> Request:
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
    request = engine.make(text, params, lora=lora, owner=owner)
    engine.submit(request)
    finish(engine)
    return request


def test_a_trace_is_its_adapters(folders: dict[str, str]) -> None:
    engine = start("full", lora_modules=folders)
    found = {lora: trace(engine, TEXT, 5, (), lora).token_ids for lora in WHO}
    assert found == {lora: ask(engine, TEXT, lora, owner=None).output for lora in WHO}
    with pytest.raises(ValueError, match="lora='third' is unknown"):
        trace(engine, TEXT, 5, (), "third")
    engine.check()


def test_a_conversations_cache_is_its_adapters(folders: dict[str, str]) -> None:
    engine = start("full", lora_modules=folders)
    first = {lora: ask(engine, TEXT, lora) for lora in WHO}
    assert len({tuple(each.output) for each in first.values()}) == 3
    same = first[None].text + MORE  # the same text for everybody
    other = ask(engine, same, "first")
    assert other.reused <= len(TEXT)  # pages of its own first request
    assert other.output == ask(engine, same, "first", owner=None).output
    again = ask(engine, same, None)
    assert again.reused == len(first[None].text) - 1
    assert again.output == ask(engine, same, None, owner=None).output
    for lora in ("first", "second"):
        turn = ask(engine, first[lora].text + MORE, lora)
        assert turn.reused == len(first[lora].text) - 1
        assert turn.output == ask(engine, turn.prompt, lora, owner=None).output
    engine.conversations.clear()
    engine.check()


def test_what_goes_on_has_the_same_adapter(folders: dict[str, str]) -> None:
    """Held requests, branches of them, and samples of one prompt."""
    engine = start("full", lora_modules=folders)
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    for lora in WHO:
        held = engine.make(TEXT, params, lora=lora, hold=True, samples=2)
        engine.submit(held)
        finish(engine)
        assert held.samples[0].output == held.output
        expected = ask(engine, held.text + MORE, lora, owner=None).output[:4]
        branch = engine.branch(held, MORE, params)
        engine.submit(branch)
        extended = engine.extend(held, MORE, params)
        finish(engine)
        assert branch.output == extended.output == expected
    engine.check()


def test_files_are_of_what_an_adapter_adds_whatever_its_name(
    folders: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"disk_kv_cache": tmp_path / "kv", **ROOM}
    engine = start("full", lora_modules=folders, **options)
    turn = ask(engine, TEXT, "first")
    engine.conversations.close()
    swapped = {"first": folders["second"], "other": folders["first"]}
    engine = start("full", lora_modules=swapped, **options)
    for lora in (None, "first"):
        assert ask(engine, turn.text + MORE, lora).reused == 0
    assert ask(engine, turn.text + MORE, "other").reused == len(turn.text) - 1
    engine.conversations.close()


def test_preempted_requests(folders: dict[str, str]) -> None:
    """Whatever was computed with an adapter is computed anew with it."""
    outputs = []
    for preempt in (None, "swap", "recompute"):
        options: dict[str, Any] = {}
        if preempt is not None:
            options = {"kv_memory": "160KiB", "preempt": preempt, "admission": "overcommit"}
            options["expected_output"] = 0.1
        engine = start("full", lora_modules=folders, **options)
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
        requests = [engine.make(TEXT, params, lora=lora) for lora in WHO]
        for each in requests:
            engine.submit(each)
        finish(engine)
        outputs.append([each.output for each in requests])
        counts = engine.scheduler.counts
        assert bool(counts.swapped + counts.recomputed) == (preempt is not None)
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_recompressed_cache_is_read_with_its_adapter(folders: dict[str, str]) -> None:
    """As that of a model into which the adapter is merged."""
    merged = adapted("llama", 0, torch.float64).merge_and_unload()
    options: dict[str, Any] = {
        "kv_memory": "4MiB",
        "page_size": 4,
        "policy": policy_named("snapkv"),
    }
    engines = [
        LLM(tiny_model("llama", torch.float64), lora_modules=folders, **options).engine,
        LLM(merged, **options).engine,
    ]
    found = []
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    for engine, lora in zip(engines, ("first", None), strict=True):
        held = engine.make(random_prompt(3, 300), params, lora=lora, hold=True)
        engine.submit(held)
        finish(engine)
        assert engine.recompress(held)
        turn = engine.extend(held, MORE, params)
        finish(engine)
        found.append((held.output, turn.output))
    assert found[0] == found[1]
