"""Fixtures of the page's tests: a server with the shipped model, a browser, and tabs in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyramidinfer.lab.screenshot import FLAGS, SEEDED, find_chromium
from tests.server.browser import Server, Tab, serving

#: What the browser would only tell its console: refusals of the content security policy.
WATCH = """window.refused = []; addEventListener("securitypolicyviolation",
  (event) => refused.push(`${event.violatedDirective} ${event.blockedURI}`));"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(chromium: Any, server: Server) -> Iterator[Callable[..., Tab]]:
    """Opens the page; afterwards nothing may have been refused or asked of anybody else."""
    opened: list[tuple[Any, Tab, str, bool]] = []
    server.paced.pause = 0.0

    def opening(
        url: str = "", size: tuple[int, int] = (1280, 800), errors: bool = False, **options: Any
    ) -> Tab:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce", **options
        )
        context.set_default_timeout(60_000)
        page = context.new_page()
        tab = Tab(page)
        page.on(
            "console",
            lambda each: each.type in ("error", "warning") and tab.complaints.append(each.text),
        )
        page.on("pageerror", lambda each: tab.complaints.append(str(each)))
        page.on("request", lambda each: tab.requests.append(each.url))
        page.add_init_script(SEEDED + "\n" + WATCH)
        opened.append((context, tab, url or server.url, errors))
        page.goto(url or server.url)
        tab.until("$('model').textContent || $('key-box').open")
        return tab

    yield opening
    for context, tab, origin, errors in opened:
        refused = tab.page.evaluate("window.refused")
        context.close()
        assert refused == []
        assert all(url.startswith((f"{origin}/", "data:")) for url in tab.requests), tab.requests
        assert tab.requests
        if not errors:  # the browser itself reports every status above 399
            assert tab.complaints == []
