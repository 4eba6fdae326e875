"""Which conversation goes to which replica, and what replicas are made of; all without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.integrations.replicas import (
    SESSION_HEADER,
    ReplicaOptions,
    conversation_of,
    ranks_of,
)
from pyramidinfer.lab.bench.replicas import ReplicasPlan, Tally
from pyramidinfer.lab.bench.replicas_page import render_replicas, replicas_table

ROOT = Path(__file__).parents[2]
SYSTEM = {"role": "system", "content": "Be short."}
FIRST = {"role": "user", "content": "Where is the harp ?"}
LATER = [FIRST, {"role": "assistant", "content": "Room 4 ."}, {"role": "user", "content": "Why ?"}]


def key(headers: dict[str, str] | None = None, **body: Any) -> str:
    return conversation_of(headers or {}, json.dumps(body).encode())


def test_turns_of_a_conversation_have_one_key() -> None:
    first = key(messages=[SYSTEM, FIRST])
    assert first and first == key(messages=[SYSTEM, *LATER], max_tokens=3)
    other = {"role": "user", "content": "Where is the drum ?"}
    assert len({first, key(messages=[FIRST]), key(messages=[SYSTEM, other])}) == 3


def test_a_responses_input_is_its_first_turn() -> None:
    text = str(FIRST["content"])
    assert key(input=text) == key(input=[FIRST, *LATER]) == key(messages=[FIRST])


def test_what_the_client_says_comes_first() -> None:
    named = {SESSION_HEADER: "mine"}
    assert key(named, messages=[FIRST]) == key(named, prompt="anything")
    assert key(prompt_cache_key="a", prompt="x") == key(prompt_cache_key="a", messages=[FIRST])
    assert key(prompt_cache_key="a", prompt="x") != key(prompt_cache_key="b", prompt="x")


def test_conversations_of_different_keys_are_different() -> None:
    keys = [key({"authorization": f"Bearer {name}"}, messages=[FIRST]) for name in "ab"]
    assert len({*keys, key(messages=[FIRST])}) == 3
    assert "Bearer" not in keys[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"prompt": "The old baker"}',
        b'{"messages": 3}',
        b'{"messages": [3, {"role": "system", "content": "x"}]}',
    ],
)
def test_where_nothing_can_be_told_there_is_no_key(body: bytes) -> None:
    assert conversation_of({}, body) == ""


def homes(names: str, keys: int = 3000) -> dict[str, str]:
    loads = dict.fromkeys(names, 0)
    return {f"key {i}": ranks_of(f"key {i}", loads, 4)[0][0] for i in range(keys)}


def test_conversations_are_spread_evenly() -> None:
    counts = Counter(homes("abc").values())
    assert set(counts) == set("abc") and all(900 < count < 1100 for count in counts.values())


def test_only_its_own_conversations_move_with_a_replica() -> None:
    before, without, more = homes("abc"), homes("ac"), homes("abcd")
    assert all(without[each] == home for each, home in before.items() if home != "b")
    moved = {each for each, home in before.items() if more[each] != home}
    assert moved and {more[each] for each in moved} == {"d"}


def test_a_busy_replica_is_passed_over() -> None:
    (home,), others = ranks_of("key", {"a": 0, "b": 0, "c": 0}, 4)
    assert sorted([home, *others]) == ["a", "b", "c"]
    loads = {"a": 7, "b": 7, "c": 7}
    loads[home] += 3
    assert ranks_of("key", loads, 4)[0] == [home]
    loads[home] += 1
    assert ranks_of("key", loads, 4) == [["a", "b", "c"]]


def test_without_a_key_all_are_equal() -> None:
    assert ranks_of("", {"a": 9, "b": 0}, 4) == [["a", "b"]]
    assert ranks_of("key", {}, 4) == [[]]


# --- options --------------------------------------------------------------------------------------


def test_options_of_all_kinds_stand_side_by_side() -> None:
    words = "min_replicas=1 max_replicas=3 keep=0.3 kv_memory=64MiB max_waiting=7 policies=full,h2o"
    options = ReplicaOptions.of(dict(word.split("=") for word in words.split()))
    assert (options.min_replicas, options.max_replicas) == (1, 3)
    assert options.llm == {"keep": 0.3, "kv_memory": "64MiB"}
    settings = options.settings()
    assert settings.max_waiting == 7 and settings.policies == ("full", "h2o")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_replica": "2"}, "unknown option 'max_replica'; did you mean 'max_replicas'"),
        ({"port": "1"}, "unknown option 'port'"),
        ({"api_keys": "a"}, "unknown option 'api_keys'; did you mean 'api_key_file'"),
        ({"min_replicas": "0"}, "min_replicas=0"),
        ({"min_replicas": "two"}, "min_replicas='two'"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 is below min_replicas=3"),
        ({"num_cpus": "0"}, "num_cpus=0 must be a number above 0"),
        ({"queue_timeout": "-1"}, "queue_timeout=-1 must be above 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplicaOptions.of(given)


def test_keys_are_read_where_the_replica_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("one\n")
    options = ReplicaOptions(api_key_file=str(tmp_path / "keys"))
    assert options.settings().api_keys == ()
    monkeypatch.setenv("PYRAMIDINFER_API_KEYS", "two")
    assert set(options.with_keys().api_keys) == {"one", "two"}


def test_a_replica_loads_what_it_was_told() -> None:
    llm = ReplicaOptions.of({"policy": "snapkv", "keep": "0.4", "kv_memory": "32MiB"}).load()
    assert llm.policy.name == "snapkv" and llm.engine.pool.budget == 32 * 2**20


# --- without Ray, and what was measured with it ---------------------------------------------------


@pytest.mark.parametrize("module", ["ray_serve", "ray_data"])
def test_what_is_missing_is_named(module: str) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"try: import pyramidinfer.integrations.{module}\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'pyramidinfer[ray]'" in run.stdout, run.stderr


def test_bench_replicas_says_what_it_needs() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[:] = ['pyramidinfer', 'bench', 'replicas']"
        "\nfrom pyramidinfer.cli.app import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "needs ray" in run.stderr and "pip install 'pyramidinfer[ray]'" in run.stderr


def test_plans_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="--turns 1"):
        ReplicasPlan(turns=1)
    assert ReplicasPlan().opening(1) != ReplicasPlan().opening(2)


def test_shares_are_of_further_turns() -> None:
    tally = Tally(further=4, same=3, reused=2, turns=6, seconds=[1.0, 2.0, 9.0])
    row = tally.row
    assert (row["same_replica"], row["cache_taken_up"]) == (0.75, 0.5)
    assert (row["seconds_median"], row["seconds_most"]) == (2.0, 9.0)
    assert Tally().row["seconds_median"] is None


def test_the_page_shows_the_committed_result() -> None:
    """Nothing hung, every turn was answered in the end, and all else was a 503 that says why."""
    entry = json.loads((ROOT / "benchmarks" / "results" / "replicas.json").read_text())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert render_replicas(page, entry) == page
    plan, rows = entry["configuration"], entry["result"]["rows"]
    assert plan["chats"] * plan["turns"] == 200
    for row in rows:
        assert row["hung"] == 0 and row["turns_answered"] == 200
        assert set(row["codes"]) <= {"200", "503 replica_lost", "503 no_replica"}
    by = {row["way"]: row for row in rows}
    assert by["by conversation"]["same_replica"] > by["anywhere"]["same_replica"]
    assert by["one killed"]["killed_after"] > 0 and by["one killed"]["seconds_back"]
    assert replicas_table(entry["result"]).row_count == 3
