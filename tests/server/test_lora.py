"""Adapters over HTTP: a request's ``model`` chooses one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings
from tests.adapters import save_adapter
from tests.server.live import Live, serving, tiny_llm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WHO = ["tiny", "first", "second"]
PROMPT = "The name is Ada and the number is 12."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    inside: Path = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(inside / name, "llama", which)
        for which, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def live(folders: dict[str, str]) -> Iterator[Live]:
    with serving(tiny_llm("full", None, lora_modules=folders), model_name="tiny") as live:
        yield live


def ids(live: Live, model: str | None) -> list[int]:
    asked = {} if model is None else {"model": model}
    answer = live.complete(PROMPT, max_tokens=12, ignore_eos=True, return_token_ids=True, **asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "tiny")
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def test_the_model_chooses_the_adapter(live: Live) -> None:
    """All at once they get what each gets alone, which is what the engine says."""
    alone = {name: ids(live, name) for name in WHO}
    assert len({tuple(each) for each in alone.values()}) == 3
    assert ids(live, None) == alone["tiny"]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda name: ids(live, name), WHO * 2))
    assert together == [alone[name] for name in WHO * 2]


def test_a_chat_is_streamed_under_the_adapters_name(live: Live) -> None:
    with live.openai() as client:
        chunks = list(
            client.chat.completions.create(
                model="second",
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=4,
                stream=True,
            )
        )
    assert {each.model for each in chunks} == {"second"}


def test_models_are_listed_as_vllm_lists_them(live: Live, folders: dict[str, str]) -> None:
    listed = live.http.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == WHO
    assert [each["parent"] for each in listed] == [None, "tiny", "tiny"]
    assert [each["root"] for each in listed[1:]] == [*folders.values()]
    assert live.http.get("/v1/models/second").json() == listed[2]
    with live.openai() as client, pytest.raises(openai.NotFoundError, match="'third' does not"):
        client.completions.create(model="third", prompt=PROMPT)
    assert live.http.post("/tokenize", json={"model": "first", "prompt": "a"}).status_code == 200


def test_conversations_of_one_adapter_are_not_anothers(live: Live) -> None:
    """Of another one it shares the beginning of all chats at most."""
    text = "Once there was Ada. " * 8
    told: dict[str, Any] = live.chat(text, model="first", max_tokens=6).json()
    turns = (text, told["choices"][0]["message"]["content"], "and then")
    for model, expected in (("second", False), ("tiny", False), ("first", True)):
        answer = live.chat(*turns, model=model).json()
        used = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (used > told["usage"]["prompt_tokens"] // 2) == expected, model


def test_survival_is_told_of_the_adapters_own_conversation(live: Live) -> None:
    text = PROMPT * 6
    said = live.chat(text, model="first", max_tokens=6).json()["choices"][0]["message"]["content"]
    roles = ("user", "assistant")
    turns = [
        {"role": role, "content": each} for role, each in zip(roles, (text, said), strict=True)
    ]
    for model, status in (("second", 404), ("tiny", 404), ("first", 200)):
        answer = live.http.post("/v1/caches/survival", json={"model": model, "messages": turns})
        assert answer.status_code == status, (model, answer.text)


def test_metrics_name_the_adapters(live: Live) -> None:
    lines = live.http.get("/metrics").text.splitlines()
    (line,) = [each for each in lines if each.startswith("vllm:lora_requests_info{")]
    assert 'max_lora="2"' in line and 'running_lora_adapters=""' in line


def test_an_adapter_is_not_called_as_the_model_is(folders: dict[str, str]) -> None:
    llm = tiny_llm("full", None, lora_modules={"tiny": folders["first"]})
    with pytest.raises(ValueError, match="are both named 'tiny'"):
        Service(llm, ServerSettings(model_name="tiny"))
