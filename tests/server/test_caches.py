"""``/v1/caches``: what an API key holds, pinned and deleted, and never another key's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving
from tests.server.test_metrics import read

FIRST = STORY * 10
ROOM = {"kv_memory": "8MiB", "reuse_share": 0.5, "host_kv_memory": "8MiB"}


def ask(live: Live, method: str, path: str, key: str = "one", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    given = {"json": body} if method == "POST" else {}
    return live.http.request(method, f"/v1/caches{path}", headers=headers, **given)


def held(live: Live, key: str = "one") -> list[dict[str, Any]]:
    answer = ask(live, "GET", "", key)
    assert answer.status_code == 200
    return list(answer.json()["data"])


def talk(live: Live, *texts: str, key: str = "one") -> tuple[str, int]:
    live.http.headers["Authorization"] = f"Bearer {key}"
    answer = live.chat(*texts, max_tokens=12, compression={"policy": "full"}).json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], cached


@pytest.fixture
def keyed(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm, **ROOM), api_keys=("one", "two")) as live:
        yield live


def spill(live: Live) -> None:
    def down() -> None:
        while live.engine.conversations.make_room():
            pass

    live.inside(down)


def test_each_key_sees_pins_and_deletes_its_own(keyed: Live) -> None:
    said, _ = talk(keyed, FIRST)
    assert held(keyed, "two") == []
    (one,) = held(keyed)
    assert one["object"] == "cache" and one["where"] == "device" and one["policy"] == "full"
    assert one["keep"] is None and one["pinned_until"] is None and one["bytes"] > 0
    spill(keyed)
    assert held(keyed)[0]["where"] == "host"
    for method, path in (("POST", f"/{one['id']}/pin"), ("DELETE", f"/{one['id']}")):
        answer = ask(keyed, method, path, "two", ttl=60)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "id"
    pinned = ask(keyed, "POST", f"/{one['id']}/pin", ttl=60)
    assert pinned.status_code == 200
    assert 0 < pinned.json()["pinned_until"] - one["last_used"] < 70
    assert talk(keyed, FIRST, said, "Where is the map ?", key="two")[1] == 0
    assert talk(keyed, FIRST, said, "Where is the map ?")[1] == one["tokens"]
    longer = held(keyed)[0]
    assert longer["tokens"] > one["tokens"] and longer["pinned_until"]
    gone = ask(keyed, "DELETE", f"/{longer['id']}")
    assert gone.json() == {"id": longer["id"], "object": "cache", "deleted": True}
    assert held(keyed) == [] and len(held(keyed, "two")) == 1
    assert ask(keyed, "DELETE", f"/{longer['id']}").status_code == 404


@pytest.mark.parametrize("ttl", [0, -1, "soon", None, 1e9])
def test_a_pin_needs_a_time(keyed: Live, ttl: Any) -> None:
    talk(keyed, FIRST)
    answer = ask(keyed, "POST", f"/{held(keyed)[0]['id']}/pin", ttl=ttl)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "ttl"


def test_a_pin_beyond_the_bound_tells_it(llm: LLM) -> None:
    with serving(beside(llm, **{**ROOM, "host_kv_memory": "64KiB"})) as live:
        talk(live, FIRST)
        answer = ask(live, "POST", f"/{held(live)[0]['id']}/pin", ttl=5)
        assert answer.status_code == 400
        assert "they may take 32768, half of host_kv_memory" in answer.json()["error"]["message"]
    with serving(beside(llm)) as live:
        talk(live, FIRST)
        answer = ask(live, "POST", f"/{held(live)[0]['id']}/pin", ttl=5)
        assert "--host-kv-memory" in answer.json()["error"]["message"]


def test_a_key_finds_its_conversations_after_a_restart(llm: LLM, tmp_path: Path) -> None:
    """Whatever place it has among the keys; and the metrics tell of all places."""
    disk = {**ROOM, "disk_kv_cache": tmp_path, "disk_kv_memory": "64MiB"}
    with serving(beside(llm, **disk), settles=False, api_keys=("one", "two")) as live:
        said, _ = talk(live, FIRST)
        shown = read(live)
        assert shown["pyramidinfer:caches place=device"] == 1
        spill(live)
    assert not any(path.read_bytes() == b"one" for path in tmp_path.iterdir())
    with serving(beside(llm, **disk), settles=False, api_keys=("two", "one")) as live:
        assert held(live, "two") == [] and held(live)[0]["where"] == "disk"
        live.http.headers["Authorization"] = "Bearer one"
        shown = read(live)
        assert shown["pyramidinfer:caches place=disk"] == 1
        assert shown["pyramidinfer:cache_bytes place=disk"] > 0
        assert talk(live, FIRST, said, "Where is the map ?", key="two")[1] == 0
        assert talk(live, FIRST, said, "Where is the map ?")[1] > 0
        shown = read(live)
        assert shown["pyramidinfer:cache_hits_total place=disk"] == 1
        assert shown["pyramidinfer:cache_loads_total"] == 1
        assert shown["pyramidinfer:caches place=disk"] == 0
