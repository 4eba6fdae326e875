"""Listening, and stopping without losing anything."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio import TimerHandle
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyramidinfer.engine import LLM
from pyramidinfer.server.app import build_app
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings

__all__ = ["bind", "serve"]

#: Seconds a client may take to send the head of a request.
HEAD_TIMEOUT = 30.0


class Patient(H11Protocol):
    """HTTP/1.1 that gives a client only so long to send the head of its request."""

    timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """Start the clock while no request is being answered, stop it when one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self.timer is None:
            self.timer = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_late(self) -> None:
        self.timer = None
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
            print(f"pyramidinfer serves {service.name} at http://{shown}:{port}",
                  file=sys.stderr, flush=True)  # fmt: skip


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
    second signal, is ended.
    """
    app = build_app(llm, settings)
    config = uvicorn.Config(
        app, http=Patient, ws="none", log_level="warning", server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=5,
    )  # fmt: skip
    asyncio.run(_serve(_Server(config), app.state.service, line))


async def _serve(server: _Server, service: Service, line: socket.socket) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if stopping.is_set():  # the second time
            server.should_exit = True
        stopping.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    listening = asyncio.create_task(server._serve(sockets=[line]))
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({listening, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not listening.done():
        await _drain(server, service)
        server.should_exit = True
    waiting.cancel()
    await listening


async def _drain(server: _Server, service: Service) -> None:
    """Take nothing new, and wait for what runs."""
    service.draining = True
    ends = asyncio.get_running_loop().time() + service.settings.drain_timeout
    print("pyramidinfer is stopping: waiting for what runs", file=sys.stderr, flush=True)
    while not service.is_idle and not server.should_exit:
        if asyncio.get_running_loop().time() > ends:
            print("pyramidinfer ends what is left", file=sys.stderr, flush=True)
            break
        await asyncio.sleep(0.05)
    service.worker.abort_all()  # whoever is left is told
    await asyncio.sleep(0.2)  # last chunks leave
