"""The next turn of a conversation goes on with the cache of the last one, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving

FIRST = STORY * 10
FULL = {"policy": "full"}


@pytest.fixture(scope="module")
def keyed(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm, kv_memory="32MiB"), api_keys=("one", "two")) as live:
        yield live


def turn(live: Live, *texts: str, key: str = "one", **body: Any) -> tuple[str, dict[str, Any]]:
    live.http.headers["Authorization"] = f"Bearer {key}"
    answer = live.chat(*texts, **{"max_tokens": 12, "return_token_ids": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], answer.json()


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_second_turn_takes_the_first_ones_cache_up(keyed: Live) -> None:
    said, first = turn(keyed, FIRST)
    assert cached(first) == 0
    _, second = turn(keyed, FIRST, said, "Where is the map ?")
    # everything the cache saw: the prompt and the answer less its last token
    assert cached(second) == first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens"] > cached(second)
    assert second["usage"]["kv_tokens_kept"] < second["usage"]["kv_tokens_full"]
    hits = keyed.engine.conversations.hits
    _, third = turn(keyed, FIRST, said, "Where is the map ?")  # it was taken, and left again
    assert cached(third) == 0 and keyed.engine.conversations.hits == hits


@pytest.mark.parametrize("stream", [False, True])
def test_under_full_nothing_else_is_said(keyed: Live, stream: bool) -> None:
    """Three turns with reuse, and the same without."""

    def talk(reuse: bool) -> tuple[list[Any], list[int]]:
        texts, ids, taken = [FIRST], [], []
        for question in ("Where is the map ?", "Who walked to the market ?", ""):
            body = {"compression": {**FULL, "reuse": reuse}, "cache_salt": f"talk {stream}"}
            said, answer = turn(keyed, *texts, **body)
            ids.append(answer["choices"][0]["token_ids"])
            taken.append(cached(answer))
            texts += [said, question]
        return ids, taken

    with_reuse, taken = talk(True)
    without, none = talk(False)
    assert with_reuse == without
    assert none == [0, 0, 0] and 0 == taken[0] < taken[1] < taken[2]
    if stream:
        said, _ = turn(keyed, FIRST, compression=FULL)
        keyed.http.headers["Authorization"] = "Bearer one"
        answer = keyed.chat(
            FIRST,
            said,
            "Where is the map ?",
            compression=FULL,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            return_token_ids=True,
        )
        assert f'"token_ids":[{with_reuse[1][0]}]' in answer.text
        assert f'"cached_tokens":{taken[1]}' in answer.text


def test_never_across_keys(keyed: Live) -> None:
    said, _ = turn(keyed, FIRST, key="one", compression={"keep": 0.5})
    others = turn(keyed, FIRST, said, "Where ?", key="two", compression={"keep": 0.5})
    assert cached(others[1]) == 0
    mine = turn(keyed, FIRST, said, "Where ?", key="one", compression={"keep": 0.5})
    assert cached(mine[1]) > 0


@pytest.mark.parametrize(
    "other", [{"keep": 0.6}, {"policy": "full"}, {"policy": "snapkv"}, {"reuse": False}]
)
def test_never_for_another_policy_or_budget(keyed: Live, other: dict[str, Any]) -> None:
    mine, salt = {"keep": 0.3}, f"apart from other tests: {other}"
    said, _ = turn(keyed, FIRST, compression=mine, cache_salt=salt)
    again = (FIRST, said, "Where ?")
    assert cached(turn(keyed, *again, compression=other, cache_salt=salt)[1]) == 0
    assert cached(turn(keyed, *again, compression=mine, cache_salt=salt)[1]) > 0


def test_who_declines_leaves_nothing_either(keyed: Live) -> None:
    keyed.settle()
    said, _ = turn(keyed, FIRST, compression={"reuse": False})
    assert keyed.inside(lambda: len(keyed.engine.conversations.held)) == 0
    assert cached(turn(keyed, FIRST, said, "Where ?")[1]) == 0


def test_another_text_takes_nothing_up(keyed: Live) -> None:
    said, _ = turn(keyed, FIRST)
    assert cached(turn(keyed, "The storm .", said, "Where ?")[1]) == 0
    assert cached(turn(keyed, FIRST + "And", said, "Where ?")[1]) == 0


def test_completions_go_on_too(keyed: Live) -> None:
    keyed.http.headers["Authorization"] = "Bearer one"
    first = keyed.complete(FIRST, max_tokens=6).json()
    text = FIRST + " " + first["choices"][0]["text"]
    answer = keyed.complete(text + " and", max_tokens=6)
    assert cached(answer.json()) == first["usage"]["total_tokens"] - 1


def test_samples_of_a_second_turn(keyed: Live) -> None:
    said, _ = turn(keyed, FIRST, compression=FULL)
    body: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 4}
    _, reused = turn(keyed, FIRST, said, "Where ?", compression=FULL, **body)
    _, fresh = turn(keyed, FIRST, said, "Where ?", compression={**FULL, "reuse": False}, **body)
    assert cached(reused) > 0 and cached(fresh) == 0
    assert [each["token_ids"] for each in reused["choices"]] == [
        each["token_ids"] for each in fresh["choices"]
    ]


def test_memory_that_is_needed_is_given(llm: LLM) -> None:
    """Held conversations go before a request waits."""
    with serving(beside(llm, kv_memory="4MiB", reuse_share=1.0)) as live:
        held = live.engine.conversations

        def ask(index: int) -> httpx.Response:
            return live.complete(f"map {index} " * 200, compression=FULL, max_tokens=30)

        for index in range(6):
            assert ask(index).status_code == 200
        assert held.dropped > 0 and live.inside(lambda: len(held.held)) > 0
