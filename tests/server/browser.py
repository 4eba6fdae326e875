"""What tests of the page stand on: the real server in a thread, and a page in a browser."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from pyramidinfer import LLM
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Pyramid
from pyramidinfer.server.app import build_app
from pyramidinfer.server.settings import ServerSettings


class Paced:
    """The app behind a slow line: a pause before every piece of a streamed answer."""

    def __init__(self, app: Any) -> None:
        self.app, self.pause = app, 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def slowly(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("more_body"):
                await asyncio.sleep(self.pause)
            await send(message)

        await self.app(scope, receive, slowly)


@dataclass
class Server:
    url: str
    paced: Paced


@contextmanager
def serving(engine: dict[str, Any] | None = None, **options: Any) -> Iterator[Server]:
    """The real server with the shipped model, in a thread, on a free port.

    engine : further arguments of ``LLM``.
    """
    policy = Pyramid(keep=0.45, min_context=64)
    llm = LLM(shipped_model(), policy, kv_memory="64MiB", **(engine or {}))
    paced = Paced(build_app(llm, ServerSettings(**options)))
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(paced, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started
            yield Server(f"http://127.0.0.1:{line.getsockname()[1]}", paced)
        finally:
            server.should_exit = True
            thread.join()


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@dataclass
class Tab:
    """A page in a browser of its own, and everything it asked for and complained about."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, text: str | None = None) -> None:
        """Send a text, or the example document; the answer is being waited for then."""
        if text is None:
            self.page.click("#example")
        else:
            self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def wait(self, state: str = "idle") -> None:
        self.page.wait_for_selector(f"body[data-state={state}]")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).last.inner_text())

    def until(self, true: str) -> None:
        """Wait for an expression; playwright's own way needs ``eval``, which the page forbids."""
        until(lambda: bool(self.page.evaluate(f"Boolean({true})")))

    @property
    def kept(self) -> list[int]:
        return [int(each) for each in self.page.get_attribute("#pyramid", "data-kept").split()]

    @property
    def seen(self) -> int:
        return int(self.page.get_attribute("#pyramid", "data-seen"))

    @property
    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id"))
