"""The API's description: a valid document, and a page that shows it and loads nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer import LLM
from pyramidinfer.lab.screenshot import FLAGS, find_chromium, missing
from tests.server.live import Live, beside, serving, until

REFUSED = """window.refused = []; addEventListener("securitypolicyviolation",
  (event) => refused.push(event.blockedURI));"""


def test_the_document_is_valid(live: Live) -> None:
    """By OpenAPI's own schema; and every reference leads somewhere."""
    import schemathesis

    told = live.http.get("/openapi.json").json()
    schemathesis.openapi.from_dict(told).validate()
    with pytest.raises(Exception, match="openapi|paths|info"):
        schemathesis.openapi.from_dict({**told, "paths": [], "info": 5}).validate()
    names, seen = set(told["components"]["schemas"]), []

    def look(part: Any) -> None:
        if isinstance(part, dict):
            seen.extend([part["$ref"]] if "$ref" in part else [])
            part = list(part.values())
        for each in part if isinstance(part, list) else ():
            look(each)

    look(told)
    assert seen and {each.removeprefix("#/components/schemas/") for each in seen} <= names


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_page_shows_it(llm: LLM) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with serving(beside(llm), api_keys=("sesame",)) as live, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda each: asked.append(each.url))
        page.add_init_script(REFUSED)
        page.goto(f"{live.url}/docs")
        until(lambda: page.is_visible("#key"))
        assert page.locator("#operations details").count() == 0
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        until(lambda: page.locator("#operations details").count())
        live.http.headers["Authorization"] = "Bearer sesame"
        told = live.http.get("/openapi.json").json()
        shown = page.locator("#operations summary").all_inner_texts()
        assert len(shown) == sum(map(len, told["paths"].values()))
        page.locator("#operations summary", has_text="POST/v1/responses").click()
        opened = page.locator("#operations details[open]").inner_text()
        fields = told["components"]["schemas"]["ResponseRequest"]["properties"]
        assert all(name in opened for name in fields)
        assert page.evaluate("window.refused") == []
        browser.close()
    assert {url.removeprefix(live.url) for url in asked} <= {"/docs", "/openapi.json", "data:,"}
