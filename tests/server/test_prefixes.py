"""Chats that begin with the same messages share what was computed of them, within a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving

SYSTEM = STORY * 30
FULL = {"policy": "full"}
CUT = {"policy": "snapkv", "keep": 0.3, "prefix": 1}
ASKED = ["Where is the map ?", "Where is the bridge ?", "Who walked to the market ?"]


@pytest.fixture(scope="module")
def keyed(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm, kv_memory="32MiB"), api_keys=("one", "two")) as live:
        yield live


def chat(live: Live, question: str, key: str = "one", **body: Any) -> tuple[list[int], int]:
    """Tokens of an answer, and how many of its prompt's were reused."""
    asked = {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
        ],
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    live.http.headers["Authorization"] = f"Bearer {key}"
    answer = live.http.post("/v1/chat/completions", json={**asked, **body})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["token_ids"], cached


def test_under_full_a_system_prompt_is_computed_once(keyed: Live) -> None:
    found = [chat(keyed, question, compression=FULL) for question in ASKED]
    alone = [chat(keyed, question, compression={**FULL, "reuse": False}) for question in ASKED]
    assert [ids for ids, _ in found] == [ids for ids, _ in alone]
    assert found[0][1] == 0 and all(cached > 300 for _, cached in found[1:])
    assert [cached for _, cached in alone] == [0, 0, 0]
    assert chat(keyed, ASKED[0], "two", compression=FULL)[1] == 0
    assert chat(keyed, ASKED[0], compression=FULL, cache_salt="mine")[1] == 0
    assert chat(keyed, ASKED[1], compression=FULL, cache_salt="mine")[1] > 300
    stats = keyed.inside(keyed.engine.stats)
    assert stats.prefix_hits == stats.reuse_tokens > 900
    assert stats.prefix_queries > stats.prefix_hits


def test_a_compressed_prefix_is_shared_where_a_request_says_where_it_ends(keyed: Live) -> None:
    found = [chat(keyed, question, compression=CUT) for question in ASKED]
    alone = [chat(keyed, question, compression={**CUT, "reuse": False}) for question in ASKED]
    assert [ids for ids, _ in found] == [ids for ids, _ in alone]
    reused = [cached for _, cached in found]
    assert reused[0] == 0 and 300 < reused[1] == reused[2]
    assert chat(keyed, ASKED[0], "two", compression=CUT)[1] == 0
    assert chat(keyed, ASKED[0], compression={**CUT, "keep": 0.4})[1] == 0
    assert chat(keyed, ASKED[0], compression={"policy": "snapkv", "keep": 0.3})[1] == 0


def test_of_a_text_the_first_characters_and_of_ids_the_first_ones(keyed: Live) -> None:
    keyed.http.headers["Authorization"] = "Bearer one"
    ids = keyed.http.post("/tokenize", json={"prompt": SYSTEM}).json()["tokens"]
    for begun, count in ((SYSTEM, len(SYSTEM)), (ids, len(ids))):
        reused = []
        for question in ASKED:
            more: Any = " " + question
            if isinstance(begun, list):
                answer = keyed.http.post(
                    "/tokenize", json={"prompt": question, "add_special_tokens": False}
                )
                more = answer.json()["tokens"]
            answer = keyed.complete(begun + more, compression={**CUT, "prefix": count})
            assert answer.status_code == 200, answer.text
            reused.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert reused[0] in (0, len(ids)) and reused[1:] == [len(ids)] * 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"compression": {**CUT, "prefix": 2}}, "prefix=2, but messages has 2 items"),
        ({"compression": {**CUT, "prefix": 0}}, "prefix: Input should be greater"),
        ({"compression": CUT | FULL | {"keep": 1}, "prompt_logprobs": 1}, "leave one of them out"),
        ({"cache_salt": ""}, "cache_salt: String should have at least 1 character"),
    ],
)
def test_what_cannot_be_is_said(keyed: Live, body: dict[str, Any], words: str) -> None:
    keyed.http.headers["Authorization"] = "Bearer one"
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    answer = keyed.http.post("/v1/chat/completions", json={"messages": messages, **body})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_across_keys_where_the_operator_says_so(llm: LLM) -> None:
    with serving(
        beside(llm, kv_memory="32MiB", share_prefixes=True), api_keys=("one", "two")
    ) as live:
        for body in ({"compression": FULL}, {"compression": CUT}):
            assert chat(live, ASKED[0], "one", **body)[1] == 0
            assert chat(live, ASKED[1], "two", **body)[1] > 300
            assert chat(live, ASKED[1], "two", **body, cache_salt="mine")[1] == 0
