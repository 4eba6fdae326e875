"""``bench offload``: the number of conversations that the pool, host memory and a disk hold, and
the time to first token of a second turn from each."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyramidinfer.engine import LLM
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.lab.bench.scaling_plans import OffloadPlan
from pyramidinfer.lab.bench.setting import FIRST_WORD, progress
from pyramidinfer.lab.bench.timing import spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.catalog import find_model
from pyramidinfer.policies.registry import make_policy, parse_spec
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["WAYS", "OffloadPlan", "run_offload"]

#: Places of the first turn's cache when the second arrives; ``anew``: no cache.
WAYS = ("device", "host", "disk", "anew")
OWNER = "bench"
#: Minimum number of conversations; after it, the count ends when a conversation adds none to those
#: held.
MOST = 1000


def run_offload(plan: OffloadPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    if plan.threads:
        torch.set_num_threads(plan.threads)
    rows = [
        {"policy": spec, "held": _count(plan, spec), **_times(plan, spec)} for spec in plan.policies
    ]
    result = {"rows": rows}
    write_result(out, asdict(plan), result)
    return result


def _count(plan: OffloadPlan, spec: str) -> dict[str, int]:
    """Number of held conversations per place, when each further one evicts another."""
    budgets = {"kv_memory": plan.kv_memory, "host_kv_memory": plan.host}
    with _engine(plan, spec, plan.disk, **budgets) as engine, progress(spec, MOST) as done:
        conversations = engine.conversations
        assert conversations.disk is not None
        for number in range(MOST):
            _answer(engine, _text(engine, number, plan.tokens))
            conversations.disk.drain()
            conversations.poll()
            done("conversations")
            if conversations.dropped:
                break
        found: Counter[str] = Counter(each.where for each in engine.caches(OWNER))
        return {place: found[place] for place in WAYS[:3]}


def _times(plan: OffloadPlan, spec: str) -> dict[str, Any]:
    """Seconds from the second turn's arrival to its first token, and bytes of a cache, per place;
    all places except ``anew`` must give the same tokens."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    bytes_: dict[str, int] = {}
    room = {"kv_memory": "512MiB", "host_kv_memory": "256MiB"}
    same = True
    with (
        _engine(plan, spec, "1GiB", **room) as engine,
        progress(spec, plan.repeats * len(WAYS)) as done,
    ):
        _answer(engine, _text(engine, MOST, plan.prompt))  # warms up
        for repeat in range(plan.repeats):
            first: TokenIds = []
            for way in WAYS[repeat % 4 :] + WAYS[: repeat % 4]:
                engine.conversations.clear()
                turn = _answer(engine, _text(engine, repeat, plan.prompt))
                _move(engine, way)
                for held in engine.caches(OWNER):
                    bytes_[held.where] = held.bytes
                again = _answer(engine, turn.text + _text(engine, MOST + repeat, plan.turn))
                assert again.times.first_token is not None
                assert (again.reused > 0) == (way != "anew"), way
                seconds[way].append(again.times.first_token - again.times.arrived)
                if way != "anew":
                    first = first or again.output
                    same &= first == again.output
                done(way)
    return {
        "first_token_seconds": {way: spread(each) for way, each in seconds.items()},
        "bytes": bytes_,
        "same_tokens": same,
    }


@contextmanager
def _engine(plan: OffloadPlan, spec: str, disk: str, **options: Any) -> Iterator[Engine]:
    name, own = parse_spec(spec)
    with tempfile.TemporaryDirectory(prefix="pyramidinfer-kv-") as folder:
        llm = LLM(
            find_model(plan.model),
            make_policy(name, **own),
            dtype=plan.dtype,
            disk_kv_cache=folder,
            disk_kv_memory=disk,
            **options,
        )
        try:
            yield llm.engine
        finally:
            llm.engine.conversations.close()
            llm.close()


def _text(engine: Engine, number: int, length: int) -> TokenIds:
    """Tokens that are unique to this number."""
    size = engine.runner.vocab_size - FIRST_WORD
    draw = torch.Generator().manual_seed(number)
    return (FIRST_WORD + torch.randint(0, size, (length,), generator=draw)).tolist()


def _answer(engine: Engine, text: TokenIds) -> Request:
    """A turn that generates four tokens."""
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    request = engine.make(text, params, owner=OWNER)
    engine.run([request])
    return request


def _move(engine: Engine, way: str) -> None:
    """Move held caches to the given place; caches on disk are removed from memory."""
    conversations = engine.conversations
    if way == "anew":
        conversations.clear()
    if way in ("host", "disk"):
        while conversations.make_room():
            pass
    if way == "disk":
        disk = conversations.disk
        assert disk is not None
        for one in conversations.host.held:
            disk.write(one)
        disk.drain()
        conversations.poll()
        conversations.host.make_room(conversations.host.limit)
        for path in disk.folder.glob("*.safetensors"):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    time.sleep(0.01)
