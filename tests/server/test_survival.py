"""``/v1/caches/survival``: what is held of a conversation, told to whoever has its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Pyramid
from tests.server.live import STORY, Live, serving, until

KEYS = ("anne", "bert")
LONG = STORY * 12 + "The harp of Ada Holt is in room 472 . Where is the harp of Ada Holt ?"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    llm = LLM(shipped_model(), Pyramid(keep=0.3, min_context=32), kv_memory="32MiB")
    with serving(llm, api_keys=KEYS) as live:
        yield live


def post(live: Live, path: str, key: str = "anne", **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return live.http.post(f"/v1/{path}", headers=headers, json=body)


def told(live: Live, text: str = LONG, **body: Any) -> tuple[list[dict[str, str]], Any]:
    """A conversation of one turn, and what came of it."""
    turns = [{"role": "user", "content": text}]
    answer = post(
        live, "chat/completions", messages=turns, max_tokens=20, temperature=0, **body
    ).json()
    return [*turns, answer["choices"][0]["message"] | {"refusal": None}], answer["usage"]


def survival(live: Live, turns: list[dict[str, str]], key: str = "anne", **body: Any) -> Any:
    turns = [{name: each[name] for name in ("role", "content")} for each in turns]
    return post(live, "caches/survival", key, messages=turns, **body)


def test_what_a_conversation_keeps(live: Live) -> None:
    """The counts are those of the usage, and the text is the conversation's."""
    turns, usage = told(live)
    found = survival(live, turns, columns=1024).json()
    tokens = usage["total_tokens"] - 1
    assert found["object"] == "survival" and found["tokens"] == tokens and found["width"] == 1
    assert len(found["layers"]) == 12 and {len(row) for row in found["layers"]} == {tokens}
    held = sum(map(sum, found["layers"])) / 100 / 12  # with two heads a half is exact
    assert held == pytest.approx(usage["kv_tokens_kept"], abs=0.51)
    assert {each for row in found["layers"] for each in row} == {0, 50, 100}
    assert LONG.strip() in " ".join("".join(found["text"]).split())
    (cache,) = live.http.get("/v1/caches", headers={"Authorization": "Bearer anne"}).json()["data"]
    assert cache["id"] == found["id"]


def test_columns(live: Live) -> None:
    """Fewer columns have the same entries and the same text."""
    turns, _ = told(live)
    fine, coarse = (survival(live, turns, columns=count).json() for count in (1024, 10))
    width, tokens = coarse["width"], fine["tokens"]
    assert width == -(-tokens // 10) and len(coarse["text"]) == -(-tokens // width) <= 10
    assert "".join(coarse["text"]) == "".join(fine["text"])
    for one, other in zip(fine["layers"], coarse["layers"], strict=True):
        for column, share in enumerate(other):
            part = one[column * width : (column + 1) * width]
            assert share == pytest.approx(sum(part) / len(part), abs=1)
            assert (share == 0) == (not any(part)) and (share == 100) == all(x == 100 for x in part)


def test_the_full_cache_and_the_longest_beginning(live: Live) -> None:
    turns, usage = told(live, compression={"policy": "full"})
    found = survival(live, turns, compression={"policy": "full"}).json()
    assert {each for row in found["layers"] for each in row} == {100}
    further = [*turns, {"role": "user", "content": "And now ?"}]
    assert survival(live, further, compression={"policy": "full"}).json() == found
    assert usage["total_tokens"] - 1 == found["tokens"]


def test_nobody_else_is_told(live: Live) -> None:
    turns, _ = told(live, "The harp is here . " * 20)
    assert survival(live, turns).status_code == 200
    for answer in (
        survival(live, turns, "bert"),
        survival(live, turns, compression={"policy": "snapkv"}),
        survival(live, [{"role": "user", "content": "The harp"}]),
    ):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_cache"
    assert survival(live, turns, "mallory").status_code == 401


def test_what_a_request_would_take_up_is_told(live: Live) -> None:
    """One with another salt, or whose beginning was taken in alone, takes up other caches."""
    cut = {"compression": {"policy": "snapkv", "keep": 0.3}}
    begun = {"compression": {"policy": "snapkv", "keep": 0.3, "prefix": 1}}
    turns = [{"role": "user", "content": "The harp is there . " * 20}] * 2
    asked: list[dict[str, Any]] = [cut, {**cut, "cache_salt": "mine"}, begun]
    ids = set()
    for body in asked:
        whole = {**body, "add_generation_prompt": True}
        assert survival(live, turns, **whole).status_code == 404
        post(live, "chat/completions", messages=turns, max_tokens=1, temperature=0, **body)
        found = survival(live, turns, **whole)
        assert found.status_code == 200, found.text
        ids.add(found.json()["id"])
    assert len(ids) == len(asked)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"columns": 0}, "columns"),
        ({"columns": 1025}, "columns"),
        ({"compression": {"reuse": False}}, "no cache is held"),
        ({"compression": {"policy": "nonsense"}}, "nonsense"),
        ({"prompt": "x"}, "one of them"),
        ({"owner": "bert"}, "owner"),
    ],
)
def test_what_is_wrong_is_told(live: Live, body: dict[str, Any], part: str) -> None:
    answer = survival(live, [{"role": "user", "content": "x"}], **body)
    assert answer.status_code == 400 and part in answer.json()["error"]["message"]


def test_in_host_memory_and_on_disk(tmp_path: Any) -> None:
    """Wherever it is in memory it tells the same; on disk it says where it is."""
    llm = LLM(
        shipped_model(),
        "full",
        kv_memory="32MiB",
        host_kv_memory="1MiB",
        disk_kv_cache=str(tmp_path),
        disk_kv_memory="64MiB",
    )
    with serving(llm, api_keys=KEYS) as live:
        turns, _ = told(live)
        here = survival(live, turns).json()
        conversations = llm.engine.conversations
        live.service.worker.ask(conversations.make_room).result(60)
        (one,) = conversations.index
        assert one.place == "host"
        assert survival(live, turns).json() == here
        until(lambda: survival(live, turns).status_code == 200 and one.has_file)
        live.service.worker.ask(lambda: conversations.host.make_room(1 << 20)).result(60)
        answer = survival(live, turns)
        assert one.place == "disk" and answer.status_code == 400
        assert "on disk; its next turn brings it back" in answer.json()["error"]["message"]
