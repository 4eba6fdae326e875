"""Listen, and stop without losing requests."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import resource
import signal
import socket
import time
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyramidinfer.engine import LLM
from pyramidinfer.server.app import build_app
from pyramidinfer.server.logs import announce
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings

__all__ = ["EngineDied", "bind", "check_connections", "serve"]

log = logging.getLogger(__name__)

#: Seconds a client may take to send the head of a request.
HEAD_TIMEOUT = 30.0
#: Connections that the system accepts before we have seen them.
BACKLOG = 16
#: File descriptors that are left for connections that are on their way in or out, and all else.
SPARE = 8 * BACKLOG
#: The most connections where file descriptors set no limit.
MOST_CONNECTIONS = 10_000
#: Seconds between two lines about too many connections.
LOG_EVERY = 60.0
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n"
    b"Connection: close\r\n\r\n"
)
#: Seconds that whoever is told of the engine's end has to read it.
LAST_WORDS = 1.0


class EngineDied(Exception):
    """The engine's thread has ended, and the server with it."""


class Connections:
    """No more connections than there are file descriptors for.

    One more takes the place of the one that has waited longest without a request; where all have
    requests, it is turned away.
    """

    def __init__(self, most: int) -> None:
        self.most, self.open = most, 0
        self.waiting: dict[Patient, None] = {}  # in the order in which they began to wait
        self._told = -LOG_EVERY
        self._refused = 0

    def admit(self) -> bool:
        """Whether one more may stay."""
        self.open += 1
        if self.open <= self.most:
            return True
        self._tell()
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        oldest.leave()
        return True

    def _tell(self) -> None:
        self._refused += 1
        now = time.monotonic()
        if now - self._told < LOG_EVERY:
            return
        log.warning(
            "more than %d connections: %d were closed without an answer or turned away "
            "(--max-connections, and ulimit -n, allow more)",
            self.most,
            self._refused,
        )
        self._told, self._refused = now, 0


def connections_left() -> int:
    """Connections that the limit of file descriptors has room for, with some to spare."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    return max(1, min(MOST_CONNECTIONS, soft - used - SPARE))


def check_connections(settings: ServerSettings) -> int:
    """Connections that may be open; ``ValueError`` where more are asked for than there can be."""
    most, wanted = connections_left(), settings.max_connections
    if wanted is not None and wanted > most:
        raise ValueError(
            f"max_connections={wanted}: the limit of open files allows {most}; raise it "
            f"(ulimit -n) or ask for fewer"
        )
    return wanted or most


class Patient(H11Protocol):
    """HTTP/1.1 that gives a client only so long to send the head of its request."""

    timer: TimerHandle | None = None
    refused = False
    limit = Connections(MOST_CONNECTIONS)

    def connection_made(self, transport: Any) -> None:
        if not self.limit.admit():
            self.refused = True
            transport.write(REFUSAL)
            transport.close()
            return
        super().connection_made(transport)
        self._expect_head()

    def leave(self) -> None:
        """Make room for another one."""
        self._stop_timer()
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        super().data_received(data)
        self._expect_head()

    def eof_received(self) -> None:
        if not self.refused:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limit.open -= 1
        if not self.refused:
            self._stop_timer()
            super().connection_lost(exc)

    def _expect_head(self) -> None:
        """Start the clock while no request is being answered, stop it when one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(HEAD_TIMEOUT, self._too_late)
            self.limit.waiting[self] = None

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.limit.waiting.pop(self, None)

    def _too_late(self) -> None:
        self.timer = None
        self.limit.waiting.pop(self, None)
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """Uvicorn without its own handling of signals, which ends the process by the signal."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            service: Service = self.config.app.state.service  # type: ignore[union-attr]
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            kv_dtype = service.llm.engine.config.kv_dtype
            stored = "" if kv_dtype == "auto" else f" (keys and values in {kv_dtype})"
            announce(
                f"pyramidinfer serves {service.name} at http://{shown}:{port}{stored}",
                service.settings.log_format,
            )


def bind(settings: ServerSettings) -> socket.socket:
    """The address, held but not listened to yet.  ``OSError`` where it cannot be had."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        line = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror or error}") from None
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        line.bind(address)
    except OSError as error:
        line.close()
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host}:{port}: {reason} (--port 0 picks one)") from None
    return line


def serve(llm: LLM, settings: ServerSettings, line: socket.socket) -> None:
    """Serve on a bound address until SIGTERM or Ctrl-C; then answer what was accepted, and return.

    New requests get 503 meanwhile.  What has not ended after ``drain_timeout`` seconds, or at a
    second signal, is ended.  ``EngineDied`` where the engine's thread ended by itself (unless
    ``keep_alive_on_engine_death``).
    """
    app = build_app(llm, settings)
    Patient.limit = Connections(check_connections(settings))
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_config=None,  # the log is ours (logs.py)
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        backlog=BACKLOG,
    )
    service: Service = app.state.service
    asyncio.run(_serve(_Server(config), service, line))
    if service.worker.died:
        raise EngineDied(service.worker.why)


async def _serve(server: _Server, service: Service, line: socket.socket) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(_rate_limited())

    def stop() -> None:
        if stopping.is_set():  # the second time
            server.config.timeout_graceful_shutdown = 1
            server.should_exit = True
        stopping.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    listening = asyncio.create_task(server._serve(sockets=[line]))
    waiting = asyncio.create_task(stopping.wait())
    dying = asyncio.create_task(_death(service))
    await asyncio.wait({listening, waiting, dying}, return_when=asyncio.FIRST_COMPLETED)
    if dying.done() and not stopping.is_set():
        announce(
            "the engine's thread has died: the server ends",
            service.settings.log_format,
            logging.ERROR,
        )
        server.config.timeout_graceful_shutdown = 1
    elif not listening.done():
        server.config.timeout_graceful_shutdown = await _drain(server, service)
    server.should_exit = True
    for each in (waiting, dying):
        each.cancel()
    await listening


def _rate_limited() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An event loop's handler of exceptions that says once a minute that no file can be opened."""
    told = -LOG_EVERY

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif time.monotonic() - told >= LOG_EVERY:
            told = time.monotonic()
            log.warning("no connection can be accepted: too many open files (ulimit -n)")

    return handle


async def _death(service: Service) -> None:
    """Return when the engine's thread has died and everybody had time to hear of it."""
    while service.settings.keep_alive_on_engine_death or not service.worker.died:
        await asyncio.sleep(0.25)
    await asyncio.sleep(LAST_WORDS)


async def _drain(server: _Server, service: Service) -> int:
    """Take nothing new and wait for what runs; the seconds that are left to who still reads."""
    service.draining = True
    ends = asyncio.get_running_loop().time() + service.settings.drain_timeout
    kind = service.settings.log_format
    announce("pyramidinfer is stopping: waiting for running requests", kind)
    while not service.is_idle and not server.should_exit:
        if asyncio.get_running_loop().time() > ends:
            announce("pyramidinfer ends what is left", kind)
            break
        await asyncio.sleep(0.05)
    service.worker.abort_all()  # whoever is left is told
    await asyncio.sleep(0.2)  # last chunks leave
    return max(1, math.ceil(ends - asyncio.get_running_loop().time()))
