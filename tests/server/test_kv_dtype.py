"""A server whose caches are stored in few bits: who asks for that, and who is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyramidinfer import LLM
from pyramidinfer.models.loading import shipped_model
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    llm = LLM(shipped_model(), "full", kv_memory="16MiB", dtype="float32", kv_dtype="int8")
    with serving(llm) as live:
        yield live


@pytest.mark.parametrize("asked", ["int4", "auto", "int5"])
def test_another_kv_dtype_is_refused_with_both_names(live: Live, asked: str) -> None:
    for answer in (
        live.complete(compression={"kv_dtype": asked}),
        live.chat("Where ?", compression={"kv_dtype": asked}),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "compression"
        assert f"kv_dtype={asked!r}" in error["message"] and "'int8'" in error["message"]


def test_the_servers_own_is_accepted(live: Live) -> None:
    plain, asked = live.complete(), live.complete(compression={"kv_dtype": "int8"})
    assert asked.is_success
    assert asked.json()["choices"][0]["text"] == plain.json()["choices"][0]["text"]
    usage = asked.json()["usage"]
    assert 0 < usage["kv_bytes"] < 0.6 * usage["kv_bytes_full"]


def test_it_is_told(live: Live) -> None:
    (model,) = live.http.get("/v1/models").json()["data"]
    assert model["compression"]["kv_dtype"] == "int8"
    lines = live.http.get("/metrics").text.splitlines()
    (cache,) = [line for line in lines if line.startswith("vllm:cache_config_info{")]
    assert 'cache_dtype="int8"' in cache
    (server,) = [line for line in lines if line.startswith("pyramidinfer:server_info{")]
    assert 'kv_dtype="int8"' in server
