"""Checks of every request: size, time and key; and the headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from hashlib import blake2b

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyramidinfer.server.errors import error_response
from pyramidinfer.server.logs import Asked, asked
from pyramidinfer.server.settings import ServerSettings

__all__ = ["NONCE", "Gate"]

log = logging.getLogger(__name__)

#: Pages; they ask for a key themselves if one is needed.
PAGES = {"/", "/docs"}
#: Paths that need no key: pages and probes.
OPEN = {*PAGES, "/health", "/ready", "/version"}
#: Paths that accept a metrics key.
SCRAPED = "/metrics"
#: A body that is too large is read and discarded up to this multiple of the limit.
READ_ALL_THE_SAME = 4
#: Key of the page's nonce in the scope.
NONCE = "page_nonce"
POLICY = (
    "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}

NO_KEY = error_response(
    401,
    "give a valid API key: Authorization: Bearer KEY",
    None,
    "invalid_api_key",
    {"WWW-Authenticate": "Bearer", "Connection": "close"},
)


METRICS_ONLY = error_response(
    403, f"this key opens {SCRAPED} only", None, "metrics_key", {"Connection": "close"}
)


class Gate:
    """ASGI middleware around the whole application.

    It sets ``scope["owner"]``: a text that is unique to each key and the same after a restart, for
    data that must not be shared between keys.
    ``rejected``: called with the status of every response that the gate sends itself.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, rejected: Callable[[int], None]
    ) -> None:
        self.app, self.settings, self.rejected = app, settings, rejected
        self.keys = [key.encode() for key in settings.api_keys]
        self.owners = [blake2b(key, digest_size=16).hexdigest() for key in self.keys]
        self.metrics_keys = [key.encode() for key in settings.metrics_keys]
        self.hosts: set[str] | None = None  # any
        if settings.is_loopback and not self.keys:
            self.hosts = {"localhost", "127.0.0.1", "[::1]", settings.host, *settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope[NONCE] = secrets.token_urlsafe(16)
        scope["owner"] = self._owner(headers)
        begun = time.monotonic()
        about = Asked.of(headers)
        token = asked.set(about)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                if scope["path"] in PAGES:
                    answer["Content-Security-Policy"] = POLICY.format(scope[NONCE])
                answer.setdefault("Cache-Control", "no-store")
                answer["X-Request-Id"] = about.id
            await send(message)

        try:  # Starlette's TrustedHostMiddleware answers in plain text instead of OpenAI's format
            name = re.sub(r":\d*$", "", headers.get("host", "localhost")).lower()
            if self.hosts is not None and name not in self.hosts:
                self.rejected(403)
                await error_response(
                    403,
                    f"Host {name!r:.100} is not a name of this server (--allowed-host adds one)",
                    code="host_not_allowed",
                )(scope, receive, told)
            elif wrong := _wrong_framing(headers):
                self.rejected(wrong.status_code)
                await wrong(scope, receive, told)
            elif refused := self._refused(scope, headers):
                self.rejected(refused.status_code)
                await refused(scope, receive, told)
            else:
                await self.app(scope, self._bounded(receive, headers), told)
        finally:
            if self.settings.access_log:  # undecoded: without line breaks
                path = scope.get("raw_path", b"").decode("latin-1")
                status, seconds = scope.get("status", 499), time.monotonic() - begun
                fields = {"method": scope["method"], "path": path, "status": status}
                log.info(
                    "%s %s %s %.3f s",
                    *fields.values(),
                    seconds,
                    extra={"fields": {**fields, "seconds": round(seconds, 6)}},
                )
            asked.reset(token)

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a request without a valid key."""
        if _is_open(scope):
            return None
        is_scrape = scope["path"] == SCRAPED
        if scope["owner"] is not None and (self.keys or not self.metrics_keys or not is_scrape):
            return None
        if _which(headers, self.metrics_keys) is None:
            return NO_KEY
        return None if is_scrape else METRICS_ONLY

    def _owner(self, headers: Headers) -> str | None:
        """The owner of the request; None if a key is needed and missing."""
        if not self.keys:
            return "everybody"
        index = _which(headers, self.keys)
        return None if index is None else self.owners[index]

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        """A ``receive`` that rejects a body that is too large or takes too long to arrive.

        A body that is slightly too large is read to its end first, because a client that is
        disconnected while it sends may never see the response.
        """
        most, announced = self.settings.max_body_bytes, headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() else 0
        arrived, whole = 0, False
        ends = asyncio.get_running_loop().time() + self.settings.body_timeout

        async def bounded() -> Message:
            nonlocal arrived, whole
            if whole:  # from here on, it only reports a disconnect
                return await receive()
            if size > (most if "expect" in headers else READ_ALL_THE_SAME * most):
                raise _too_large(most)
            while True:
                try:
                    async with asyncio.timeout_at(ends):
                        message = await receive()
                except TimeoutError:
                    raise HTTPException(408, "the request's body took too long to arrive") from None
                if message["type"] != "http.request":
                    return message
                arrived += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if max(size, arrived) <= most:
                    return message
                if whole or arrived > READ_ALL_THE_SAME * most:
                    raise _too_large(most)

        return bounded


def _wrong_framing(headers: Headers) -> Response | None:
    """The error for a body whose headers are ambiguous or not supported."""
    if "content-length" in headers and "transfer-encoding" in headers:
        return error_response(
            400,
            "Content-Length and Transfer-Encoding are both set; set one of them",
            headers={"Connection": "close"},
        )
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        return error_response(
            415,
            f"Content-Encoding {encoding!r:.60} is not supported; send the body uncompressed",
            headers={"Accept-Encoding": "identity", "Connection": "close"},
        )
    return None


def _which(headers: Headers, keys: list[bytes]) -> int | None:
    """The index of the sent key; all keys are compared, each in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    found = None
    for index, key in enumerate(keys):
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key)
        if same and scheme.lower() == "bearer":
            found = index
    return found


def _is_open(scope: Scope) -> bool:
    """Whether a request needs no key (a preflight carries none)."""
    return scope["path"] in OPEN or scope["method"] == "OPTIONS"


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the request is larger than the {most} bytes this server takes")
