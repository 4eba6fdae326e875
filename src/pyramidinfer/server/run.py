"""Listen for connections, and stop without losing requests."""

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
#: Connections that the server accepts at a time.
BACKLOG = 16
#: Connections that the operating system queues before the server accepts them.  If more arrive
#: while the server is busy, the system resets them.
QUEUE = 1024
#: File descriptors reserved for connections that are opening or closing, and for other files.
SPARE = 8 * BACKLOG
#: Maximum number of connections if file descriptors set no limit.
MOST_CONNECTIONS = 10_000
#: Seconds between two log lines about too many connections.
LOG_EVERY = 60.0
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n"
    b"Connection: close\r\n\r\n"
)
#: Seconds for clients to read the error after the engine has died.
LAST_WORDS = 1.0


class EngineDied(Exception):
    """The engine's thread has died, so the server has ended."""


class Connections:
    """Limits the number of connections to the available file descriptors.

    A connection above the limit replaces the connection that has been idle longest; if all have
    requests, the new one is refused.
    """

    def __init__(self, most: int) -> None:
        self.most, self.open = most, 0
        self.waiting: dict[Patient, None] = {}  # in the order in which they became idle
        self._told = -LOG_EVERY
        self._refused = 0

    def admit(self) -> bool:
        """Whether a new connection is accepted."""
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
    """Connections that fit into the limit of file descriptors, with some reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    return max(1, min(MOST_CONNECTIONS, soft - used - SPARE))


def check_connections(settings: ServerSettings) -> int:
    """Maximum number of connections; ``ValueError`` if the setting exceeds the system's limit."""
    most, wanted = connections_left(), settings.max_connections
    if wanted is not None and wanted > most:
        raise ValueError(
            f"max_connections={wanted}: the limit of open files allows {most}; raise it "
            f"(ulimit -n) or ask for fewer"
        )
    return wanted or most


class Patient(H11Protocol):
    """HTTP/1.1 with a timeout for the head of a request."""

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
        """Close this connection to make room for another one."""
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
        """Start the timer while no request is being answered; stop it for a request."""
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


class Line(socket.socket):
    """A listening socket with a queue of its own; asyncio would make it as long as the number of
    connections accepted at a time."""

    def listen(self, backlog: int = QUEUE) -> None:
        super().listen(QUEUE)


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling, which ends the process by the signal."""

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
    """A bound socket that does not listen yet.  ``OSError`` if the address is not available."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        line = Line(family, kind, protocol)
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
    """Serve on a bound address until SIGTERM or Ctrl-C; then finish accepted requests, and return.

    During this time, new requests get 503.  Requests that still run after ``drain_timeout`` seconds
    or at a second signal are ended.  ``EngineDied`` if the engine's thread has died (unless
    ``keep_alive_on_engine_death`` is set).
    """
    app = build_app(llm, settings)
    Patient.limit = Connections(check_connections(settings))
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_config=None,  # logs.py configures the log
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
        if stopping.is_set():  # the second signal
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
    """An exception handler of the event loop, which logs once a minute that no file can be
    opened."""
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
    """Return when the engine's thread has died and clients had time to read the error."""
    while service.settings.keep_alive_on_engine_death or not service.worker.died:
        await asyncio.sleep(0.25)
    await asyncio.sleep(LAST_WORDS)


async def _drain(server: _Server, service: Service) -> int:
    """Refuse new requests and wait for running ones; returns the seconds left for clients that
    still read."""
    service.draining = True
    ends = asyncio.get_running_loop().time() + service.settings.drain_timeout
    kind = service.settings.log_format
    announce("pyramidinfer is stopping: waiting for running requests", kind)
    while not service.is_idle and not server.should_exit:
        if asyncio.get_running_loop().time() > ends:
            announce("pyramidinfer ends what is left", kind)
            break
        await asyncio.sleep(0.05)
    service.worker.abort_all()  # remaining clients get an error
    await asyncio.sleep(0.2)  # time for the last chunks
    return max(1, math.ceil(ends - asyncio.get_running_loop().time()))
