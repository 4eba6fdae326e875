"""Keys, what the log holds, and the headers of every answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.server.settings import KEYS_VARIABLE, ServerSettings, read_keys
from tests.server.live import Live, beside, serving

KEYS = ("sesame-open-17", "mellon-23")
SITE = "https://example.org"


@pytest.fixture(scope="module")
def locked(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm), api_keys=KEYS, cors_origins=(SITE,)) as live:
        yield live


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo-model"),
    ("GET", "/metrics"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/resp_1"),
    ("DELETE", "/v1/responses/resp_1"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/embeddings"),
    ("GET", "/nothing"),
    ("POST", "/health/"),
    ("GET", "//health"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_a_key_is_needed(locked: Live, method: str, path: str) -> None:
    url = locked.url + path
    wrong = [
        {},
        bearer("wrong"),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "x"),
        bearer(KEYS[0].upper()),
        {"Authorization": KEYS[0]},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"X-API-Key": KEYS[0]},
        {"Authorization": f"Bearer {' '.join(KEYS)}"},
    ]
    for headers in wrong:
        answer = locked.http.request(method, url, headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert not any(key in answer.text for key in KEYS)
    odd = locked.http.request(method, url, headers={b"Authorization": b"Bearer \xff\xfe"})
    assert odd.status_code == 401
    for key in KEYS:
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} {key}"}
            assert locked.http.request(method, url, headers=headers).status_code != 401


SCRAPE = "scrape-only-5"


def test_a_key_for_metrics_opens_nothing_else(llm: LLM) -> None:
    with serving(beside(llm), api_keys=KEYS, metrics_keys=(SCRAPE,)) as live:
        http = live.http
        for key in (SCRAPE, *KEYS):
            answer = http.get("/metrics", headers=bearer(key))
            assert answer.status_code == 200 and "vllm:num_requests_running" in answer.text
        for wrong in ({}, bearer(SCRAPE + "x"), {"Authorization": SCRAPE}):
            assert http.get("/metrics", headers=wrong).status_code == 401
        for method, path in CLOSED:
            if path != "/metrics":
                answer = http.request(method, live.url + path, headers=bearer(SCRAPE))
                assert answer.status_code == 403, path
                assert answer.json()["error"]["code"] == "metrics_key"
        assert http.get("/health", headers=bearer(SCRAPE)).status_code == 200


def test_a_key_for_metrics_alone_closes_them_only(llm: LLM) -> None:
    with serving(beside(llm), metrics_keys=(SCRAPE,)) as live:
        assert live.http.get("/metrics").status_code == 401
        assert live.http.get("/metrics", headers=bearer(SCRAPE)).status_code == 200
        assert live.complete(max_tokens=1).status_code == 200


def test_a_key_is_for_metrics_or_for_all() -> None:
    with pytest.raises(ValueError, match="its own key") as error:
        ServerSettings(api_keys=KEYS, metrics_keys=KEYS[:1])
    assert KEYS[0] not in str(error.value)


def test_open_paths_need_none(locked: Live) -> None:
    for path in ("/", "/docs", "/health", "/ready", "/version"):
        assert locked.http.get(path).status_code == 200
    assert locked.complete(max_tokens=1).status_code == 401
    locked.http.headers.update(bearer(KEYS[1]))
    assert locked.complete(max_tokens=1).status_code == 200
    del locked.http.headers["Authorization"]


def test_keys_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none-key # of the first\n\n  two-key  \n")
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert read_keys(None) == ()
    assert read_keys(file) == ("one-key", "two-key")
    monkeypatch.setenv(KEYS_VARIABLE, "three, four\none-key")
    assert read_keys(file) == ("three", "four", "one-key", "two-key")
    assert read_keys(None) == ("three", "four", "one-key")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n", "contains no key"),
        (b"", "contains no key"),
        (b"a b", "printable ASCII"),
        ("schlüssel".encode(), "printable ASCII"),
        (b"\xff", "not UTF-8"),
        (b"secret\x07", "printable ASCII"),
    ],
)
def test_a_key_file_that_is_none(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_keys(file)
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read the keys"):
        read_keys(tmp_path / "none")


PROMPT = "map 471 of Greta Moss"


@pytest.mark.parametrize("log_prompts", [False, True])
def test_what_the_log_holds(llm: LLM, log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings: dict[str, Any] = {"api_keys": KEYS, "log_prompts": log_prompts}
    with serving(beside(llm), **settings) as live:
        live.http.headers.update(bearer(KEYS[0]))
        answers = [live.complete(PROMPT, max_tokens=6), live.chat(PROMPT, max_tokens=6)]
        streamed = live.complete(PROMPT, max_tokens=6, stream=True)
        wrong = live.complete(PROMPT, bogus=1), live.complete(PROMPT, temperature="x")
        assert [each.status_code for each in answers] == [200, 200]
        assert [each.status_code for each in wrong] == [400, 400]
        live.http.headers.update(bearer("wrong-key-99"))
        assert live.complete(PROMPT).status_code == 401
    ours = [each for each in caplog.records if not each.name.startswith(("httpx", "httpcore"))]
    log = "\n".join(f"{each.getMessage()} {each.exc_text or ''}" for each in ours)
    for key in (*KEYS, "wrong-key-99"):
        assert key not in log
    text = answers[0].json()["choices"][0]["text"]
    assert text.strip() and (text in log) == log_prompts
    assert log.count("Greta Moss") == (3 if log_prompts else 0)
    assert streamed.status_code == 200


def test_security_headers(locked: Live) -> None:
    for path in ("/", "/health", "/v1/models", "/nothing"):
        headers = locked.http.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "server" not in headers


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_the_pages_nonce(locked: Live, page: str) -> None:
    nonces = set()
    for _ in range(2):
        answer = locked.http.get(page)
        policy = answer.headers["Content-Security-Policy"]
        (style,) = re.findall(r"style-src 'nonce-([\w-]{20,})'", policy)
        (script,) = re.findall(r"script-src 'nonce-([\w-]{20,})'", policy)
        assert style == script
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "__NONCE__" not in answer.text
        tags = re.findall(r"<(?:style|script)[^>]*>", answer.text)
        assert tags and all(f'nonce="{script}"' in tag for tag in tags)
        assert not re.search(r"<[a-z][^>]* (?:style|on[a-z]+)=", answer.text)
        nonces.add(script)
    assert len(nonces) == 2


def test_no_page(llm: LLM) -> None:
    with serving(beside(llm), page=False) as live:
        assert live.http.get("/").status_code == live.http.get("/docs").status_code == 404
        assert live.http.get("/health").status_code == 200


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_cors_is_off(live: Live) -> None:
    headers = {"Origin": SITE}
    assert "Access-Control-Allow-Origin" not in live.http.get("/health", headers=headers).headers
    answer = live.http.options("/v1/completions", headers={**headers, **PREFLIGHT})
    assert answer.status_code == 405
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_cors_for_a_named_site(locked: Live) -> None:
    headers = {"Origin": SITE}
    asks = {**PREFLIGHT, "Access-Control-Request-Headers": "authorization,x-stainless-lang"}
    assert locked.http.options("/v1/models", headers={**headers, **asks}).status_code == 200
    answer = locked.http.options("/v1/completions", headers={**headers, **PREFLIGHT})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == SITE
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    refused = locked.http.get("/v1/models", headers=headers)  # so that a page can tell why
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == SITE
    other = locked.http.get("/health", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_the_access_log(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """A line for every request, refused ones too, which nobody can make into two."""
    with (
        caplog.at_level("INFO", "pyramidinfer"),
        serving(beside(llm), api_keys=KEYS, access_log=True) as live,
    ):
        live.http.get("/health")
        live.http.get("/v1/models/x%0AGET%20/admin%20200%1b[31m")
        live.http.post("/v1/completions", json={"prompt": "a"}, headers=bearer(KEYS[0]))
    lines = [each.getMessage() for each in caplog.records if each.name.endswith("gate")]
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        "GET /health 200",
        "GET /v1/models/x%0AGET%20/admin%20200%1b[31m 401",
        "POST /v1/completions 200",
    ]


def test_nobody_logs_unasked(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pyramidinfer"), serving(beside(llm)) as live:
        assert live.complete().status_code == 200
    assert not [each for each in caplog.records if each.name.startswith("pyramidinfer")]


def test_a_models_name_may_hold_a_slash(llm: LLM) -> None:
    with serving(beside(llm), model_name="ours/tiny") as live:
        assert live.http.get("/v1/models/ours/tiny").json()["id"] == "ours/tiny"
        assert live.http.get("/v1/models/ours").status_code == 404


def test_another_sites_name_for_this_machine(live: Live, llm: LLM) -> None:
    """A page whose name leads to loopback may not read a server that asks for no key."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        answer = live.http.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 403
        assert host.partition(":")[0] in answer.json()["error"]["message"]
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000"):
        assert live.http.get("/v1/models", headers={"Host": host}).status_code == 200
    with serving(beside(llm), allowed_hosts=("model.lan",)) as other:
        assert other.http.get("/health", headers={"Host": "model.lan"}).status_code == 200
    with serving(beside(llm), api_keys=KEYS) as keyed:  # a key is what a page does not have
        assert keyed.http.get("/health", headers={"Host": "evil.example"}).status_code == 200


def test_a_variable_without_a_key_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, " , ")
    with pytest.raises(ValueError, match=KEYS_VARIABLE):
        read_keys(None)
    monkeypatch.delenv(KEYS_VARIABLE)
    assert read_keys(None) == ()
