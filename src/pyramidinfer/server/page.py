"""The page at ``/`` and the API page at ``/docs``: documents that load nothing."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from pyramidinfer.server.gate import NONCE

__all__ = ["add_page"]

#: Parts of the page's script, in loading order.
SCRIPTS = (
    "base",
    "markdown",
    "turns",
    "answers",
    "pyramid",
    "survival",
    "composer",
    "example",
    "start",
)


def add_page(app: FastAPI) -> None:
    """The page at ``/``, and the API page at ``/docs``."""

    @app.get("/", response_class=HTMLResponse)
    async def page(request: Request) -> HTMLResponse:
        """The page: a chat next to the live pyramid."""
        return HTMLResponse(_document().replace("__NONCE__", request.scope[NONCE]))

    @app.get("/docs", response_class=HTMLResponse)
    async def docs(request: Request) -> HTMLResponse:
        """``/openapi.json`` as a readable page."""
        text = (files("pyramidinfer") / "assets" / "docs.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("__NONCE__", request.scope[NONCE]))


@cache
def _document() -> str:
    script = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    parts = {"__STYLE__": _part("page.css"), "__SCRIPT__": script}
    text = _part("page.html")
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


def _part(name: str) -> str:
    return (files("pyramidinfer") / "assets" / "page" / name).read_text(encoding="utf-8")
