"""Replicas of the server under Ray Serve: ``serve run pyramidinfer.integrations.ray_serve:app``.

An ingress receives requests, determines the conversation of each, and passes it unchanged to a
replica.  The replica's own application answers, so all routes, keys and errors are those of
``pyramidinfer serve``.  If a replica is lost, its requests get a 503; others are not affected.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

try:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import RequestRouter
except ImportError as error:
    raise ImportError(f"Ray Serve is missing ({error}): pip install 'pyramidinfer[ray]'") from error

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pyramidinfer.integrations.replicas import ReplicaOptions, conversation_of, ranks_of
from pyramidinfer.server.app import build_app
from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.service import Service

__all__ = ["ConversationRouter", "Ingress", "Replica", "app"]

log = logging.getLogger(__name__)

#: Fields of a request's scope that the application reads, and that can be sent to its process.
SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
#: Seconds in addition to a request's timeout in which a replica must report the timeout.
SPARE = 30.0


class ConversationRouter(RequestRouter):
    """Routes requests of a conversation (``session_id``) to the replica that has its cache."""

    def initialize_state(self, spill: int) -> None:
        self.spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """See ``ranks_of``; within a rank, Serve selects the least busy replica with room."""
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            key = pending_request.metadata.session_id
        names = {each.replica_id.unique_id: each for each in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(each.replica_id) or 0 for name, each in names.items()}
        return [[names[name] for name in rank] for rank in ranks_of(key, loads, self.spill)]


class Replica:
    """One engine with the whole application."""

    def __init__(self, options: ReplicaOptions) -> None:
        self.llm = options.load()
        self.app = build_app(self.llm, options.with_keys())
        self.service: Service = self.app.state.service
        self.service.worker.start()
        self.name = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Raises if the replica has failed; Serve then replaces it."""
        worker, settings = self.service.worker, self.service.settings
        if not worker.is_alive:
            raise RuntimeError(worker.why)
        if worker.stalled_seconds > settings.stall_timeout:
            raise RuntimeError(f"no step has ended for {worker.stalled_seconds:.0f} s")

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Any]:
        """First the name of this replica, then the ASGI messages of the answer."""
        yield self.name
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app(scope, receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await work
        finally:  # also after a disconnect: end the request and free its pages
            gone.set()
            await asyncio.wait({work})

    def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.close()
            self.llm.close()


class Ingress:
    """Passes every request to a replica.  replicas : Serve's handle of the deployment."""

    def __init__(self, replicas: Any, options: ReplicaOptions) -> None:
        self.replicas = replicas.options(stream=True)
        self.settings = options.settings()

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica; 503 if no replica accepts the request, or if its replica is
        lost."""
        try:
            body = await _body(request, self.settings.max_body_bytes, self.settings.body_timeout)
            key = conversation_of(request.headers, body)
            scope = {name: request.scope[name] for name in SENT if name in request.scope}
            scope = {**scope, "client": None, "server": None, "root_path": ""}
            handle = self.replicas.options(session_id=key)
            messages = handle.answer.remote(scope, body)
            return await self._begun(messages)
        except ApiError as error:
            return Response(json.dumps(error.body), error.status, error.headers, "application/json")

    async def _begun(self, messages: Any) -> Response:
        """The answer after its first messages, so that an earlier error gets its own status."""
        name = await _next(messages, self.settings.queue_timeout, "no replica took the request")
        seconds = self.settings.request_timeout + SPARE
        first = await _next(messages, seconds, "the replica did not answer")
        second = await _next(messages, seconds, "the replica did not answer")
        return _Forwarded(messages, [first, second], seconds, name)


class _Forwarded(Response):
    """An answer, forwarded from a replica's application."""

    def __init__(self, messages: Any, begun: list[Message], seconds: float, replica: str) -> None:
        self.messages, self.begun, self.seconds = messages, begun, seconds
        self.status_code = begun[0]["status"]
        self.raw_headers = [*begun[0]["headers"], (b"x-replica", replica.encode())]
        self.streams = any(b"event-stream" in value for _, value in self.raw_headers)
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, message = self.begun
        try:
            await send({**start, "headers": self.raw_headers})
            await send(message)
            while message.get("more_body", False):
                try:
                    message = await _next(self.messages, self.seconds, "the answer did not go on")
                except ApiError as error:
                    if not self.streams:
                        raise  # closes the connection: a truncated answer is invalid
                    event = f"data: {json.dumps(error.body)}\n\n".encode()
                    message = {"type": "http.response.body", "body": event, "more_body": False}
                await send(message)
        finally:
            self.messages.cancel()  # without effect if it has ended


async def _next(messages: Any, seconds: float, late: str) -> Any:
    """The next message of a replica; ``ApiError`` (503) if it is lost or sends nothing in time."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(messages)
    except TimeoutError:
        messages.cancel()
        raise _lost("no_replica", f"{late} within {seconds:g} s") from None
    except (RayError, RayServeException, StopAsyncIteration) as error:
        log.warning("a replica was lost with a request: %s", type(error).__name__)
        told = "the replica that had this request was lost; send it again"
        raise _lost("replica_lost", told) from None


def _lost(code: str, message: str) -> ApiError:
    return ApiError(503, message, code=code, retry_after=1)


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """A request's body; if it is too large, a part long enough for the replica to refuse it."""
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    break
    except TimeoutError:
        raise ApiError(408, "the request's body took too long to arrive") from None
    return bytes(found)


def app(given: dict[str, Any]) -> Any:
    """The application; ``given``: the ``NAME=VALUE`` arguments of ``serve run``, or ``args`` of a
    Serve configuration (see ``ReplicaOptions``).  ``ValueError`` for invalid options."""
    options = ReplicaOptions.of(given)
    settings = options.settings()
    room = options.llm.get("max_requests", 64) + settings.max_waiting
    replicas = serve.deployment(Replica).options(
        name="engine",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}.{ConversationRouter.__name__}",
            request_router_kwargs={"spill": options.spill},
        ),
        max_ongoing_requests=room,
        max_queued_requests=settings.max_waiting,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=options.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.max_replicas * room,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    return ingress.bind(replicas.bind(options), options)
