"""What the soak asks for, and how it judges; the soak itself is in tests/server."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer.lab import soak
from pyramidinfer.lab.bench.load import RESPONSES, Leave, Record
from pyramidinfer.lab.soak_requests import Visitor
from tests.lab.test_bench_serve import answered

MODEL = {
    "max_model_len": 4096,
    "compression": {"policies": ["full", "pyramid"], "min_keep": 0.02, "max_keep": 1.0},
}


def test_memory_growth_compares_the_end_with_what_was_warm() -> None:
    moments = [float(second) for second in range(101)]
    flat = [100 if second < 15 else 500 for second in range(101)]
    found = soak.memory_growth(moments, flat)
    assert found is not None and found["growth"] == 0 and found["warm_bytes"] == 500
    leaking = soak.memory_growth(moments, [1000 + second for second in range(101)])
    assert leaking is not None and leaking["growth"] > soak.GROWTH
    spike = [*flat[:-1], 5000]  # one second is no growth
    found = soak.memory_growth(moments, spike)
    assert found is not None and found["growth"] == 0 and found["peak_bytes"] == 5000
    assert soak.memory_growth(moments[:10], flat[:10]) is None


def test_the_soak_tells_faults_from_what_may_happen() -> None:
    wish = Visitor(MODEL).long_wish()
    seen = soak._Seen()
    may_be = [answered(), Record(status=429), Record(left=True), Record(left=True, status=200)]
    for record in may_be:
        seen.add(record, wish)
    assert not seen.faults
    two = answered()
    two.finish[1] = "stop"
    for record in (Record(status=500, error="it broke"), Record(status=200, arrivals=[0.1]), two):
        seen.add(record, wish)
    seen.add(Record(left=True, status=500), wish)
    assert sum(seen.faults.values()) == 4
    assert "/v1/completions: status 500" in seen.faults
    assert "/v1/completions: it broke" in seen.faults
    assert any("2 of 1 choices" in fault for fault in seen.faults)
    assert seen.outcomes == {"completed": 2, "refused": 1, "left": 3, "failed": 2}


def test_the_load_comes_in_waves() -> None:
    calm = [second for second in range(80) if soak.is_calm(second + 0.5)]
    assert calm == [*range(25, 40), *range(65, 80)]


def test_what_is_wrong_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: None)
    good = {
        soak.RUNNING: 0.0,
        soak.IN_USE: 7.0,
        soak.REUSABLE: 7.0,
        soak.CHECKS: 3.0,
        soak.FAULTS: 0.0,
    }

    class Idle:
        def __init__(self, **changes: float) -> None:
            self.now = {**good, **{getattr(soak, name): each for name, each in changes.items()}}

        def idle(self, seconds: float) -> dict[str, float]:
            return self.now

    def wrong(**changes: float) -> str:
        return "; ".join(soak._after(Idle(**changes))[1])  # type: ignore[arg-type]

    assert wrong() == ""
    assert "9 pages are in use when idle, 7 of them" in wrong(IN_USE=9.0)
    assert "check failed 2 times" in wrong(FAULTS=2.0)
    assert "never checked" in wrong(CHECKS=0.0)
    lacking = Idle()
    del lacking.now[soak.IN_USE]
    assert "lacks pyramidinfer:pool_pages_in_use" in soak._after(lacking)[1][0]  # type: ignore[arg-type]


def _is_shared(body: dict[str, Any]) -> bool:
    """Whether a chat has a system prompt that others have too."""
    return "messages" in body and body["messages"][0]["role"] == "system"


def test_clients_wish_for_all_kinds_of_things() -> None:
    adapters = ["adapter-0", "adapter-1"]
    visitors = [Visitor(MODEL, 0, number, adapters) for number in range(20)]
    wishes = []
    for _ in range(20):
        for visitor in visitors:
            wishes.append(visitor.wish())
            visitor.heard(wishes[-1], answered(text="in room 472 .", id="resp_1"))
    bodies = [wish.body for wish in wishes]
    for option in ("stop", "n", "logprobs", "seed", "ignore_eos", "compression", "tools", "model"):
        assert 0 < sum(option in body for body in bodies) < len(bodies), option
    chosen = [body["compression"] for body in bodies if "compression" in body]
    assert {"full", "pyramid"} == {each["policy"] for each in chosen}
    assert {body["model"] for body in bodies if "model" in body} == set(adapters)
    assert any("cache_salt" in body for body in bodies)
    manuals = [b["messages"][0]["content"] for b in bodies if _is_shared(b)]
    assert 1 < len(set(manuals)) < len(manuals)
    shared = {b["messages"][0]["content"]: b["compression"] for b in bodies if _is_shared(b)}
    assert all(
        b["compression"] == shared[b["messages"][0]["content"]] for b in bodies if _is_shared(b)
    )
    assert all(each["prefix"] == 1 for each in shared.values())
    assert {wish.path for wish in wishes} == {"/v1/completions", "/v1/chat/completions", RESPONSES}
    further = [body for body in bodies if "previous_response_id" in body]
    assert further and any("tools" in body for body in further)
    leaving = [wish for wish in wishes if wish.leave != Leave()]
    assert 0.25 < len(leaving) / len(wishes) < 0.42
    assert any(wish.leave.seconds for wish in leaving) and any(w.leave.chunks for w in leaving)
    refused = Visitor(MODEL, seed=3)
    while not (wish := refused.wish()).body.get("messages"):
        pass
    refused.heard(wish, Record(status=429))
    assert refused.talk == wish.body["messages"][:-1]
    longer = [body["messages"] for body in bodies if len(body.get("messages", ())) > 2]
    assert longer and all(each[-2]["role"] == "assistant" for each in longer)
    again = Visitor(MODEL, 0, 0, adapters)
    assert again.wish() == wishes[0] != Visitor(MODEL, seed=1, number=0).wish()
