"""From a checked body to an answer, whole or streamed, for HTTP and batch files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import pyramidinfer
from pyramidinfer.engine import LLM
from pyramidinfer.engine.request import Request as EngineRequest
from pyramidinfer.engine.worker import AsyncEngine, Busy
from pyramidinfer.server.errors import ApiError, of_reason
from pyramidinfer.server.jobs import Job, Jobs
from pyramidinfer.server.logs import Asked, asked
from pyramidinfer.server.metrics import Metrics
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import ChatRequest, CompletionRequest
from pyramidinfer.server.replies import Reply, Shape
from pyramidinfer.server.settings import ServerSettings

__all__ = ["Service", "spans_module"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Shaped = Callable[[Reply], Shape]

#: Seconds in addition to the request's timeout for a client to read its answer.
READING = 60.0


class Service:
    """One model and its API.  ``draining``: new requests are refused."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm, self.settings = llm, settings
        self.name = settings.model_name or llm.name.rstrip("/").rpartition("/")[2]
        if self.name in llm.engine.adapters:
            raise ValueError(
                f"lora_modules: an adapter and the model are both named {self.name!r}; give one "
                f"another name (serve --model-name)"
            )
        self.prompts = Prompts(
            llm.tokenizer, llm.engine.runner.vocab_size, settings.chat_template_kwargs
        )
        self.jobs = Jobs(llm, settings, self.prompts)
        if settings.compress_idle and all(each.keeps_all for each in self.jobs.served.values()):
            raise ValueError(
                f"compress_idle has no effect if requests may only select "
                f"{', '.join(self.jobs.policies)}: such caches keep everything. Leave it out, "
                f"or allow a policy that compresses (serve --policies)"
            )
        engine = llm.engine
        options = {
            name: getattr(engine.config, name) for name in ("draft_tokens", "offload_lossless")
        }
        unused = [name for name, value in options.items() if value not in (None, False)]
        if unused and not self.jobs.may_keep_all:
            raise ValueError(
                f"{unused[0]}={options[unused[0]]} has no effect if requests may only "
                f"select {', '.join(self.jobs.policies)}: a lossless one keeps everything. Leave "
                f"it out, or allow 'full' (serve --policies, --max-keep)"
            )
        self.metrics = Metrics(
            self.name,
            {
                "version": pyramidinfer.__version__,
                "policy": self.jobs.base.name,
                "keep": str(self.jobs.own_keep),
                "lossless": str(self.jobs.lossless).lower(),
                "rule": self.jobs.own.rule,
                "kv_memory_bytes": str(engine.pool.budget),
                "kv_dtype": engine.config.kv_dtype,
                "weights": engine.config.weights,
                "admission": engine.config.admission,
                "backend": engine.runner.backend.name,
            },
        )
        self.worker = AsyncEngine(
            llm.engine,
            self.metrics,
            max_waiting=settings.max_waiting,
            queue_timeout=settings.queue_timeout,
            compress_idle=settings.compress_idle,
        )
        self.metrics.gauges.worker = self.worker
        self.spans = spans_module().Spans(self.name) if settings.otel_traces else None
        self.draining = False
        self.preparing = 0  # requests in tokenization
        self._threads = ThreadPoolExecutor(2, "prepare")

    # --- for whoever asks ---------------------------------------------------------------------

    async def begin(
        self, body: ChatRequest | CompletionRequest, owner: str | None
    ) -> tuple[Job, Reply]:
        """Check a body and queue its requests.  ``ApiError`` if it cannot be served."""
        if self.draining or not self.worker.is_alive:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=10)
        self.check_model(body.model)
        arrived = time.monotonic()
        make = self.jobs.chat if isinstance(body, ChatRequest) else self.jobs.completion
        with self._waiting():
            job: Job = await self._in_thread(arrived, make, body, owner)
            return self._queue(job, arrived)

    async def prepare(self, work: Callable[..., T], *values: Any) -> T:
        """The result of ``work`` on a text, in a thread.

        It waits in the queue of requests to be tokenized, with the same timeout.
        """
        with self._waiting():
            return await self._in_thread(time.monotonic(), work, *values)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count one more request in preparation; ``ApiError`` if there are too many."""
        if self.preparing and self.preparing + self.worker.waiting >= self.settings.max_waiting:
            raise self._busy(Busy(self.preparing + self.worker.waiting, self.worker.retry_after()))
        self.preparing += 1
        try:
            yield
        finally:
            self.preparing -= 1

    async def _in_thread(self, arrived: float, work: Callable[..., T], *values: Any) -> T:
        """Run ``work`` in a thread, unless it waited longer than the queue timeout."""

        def in_time() -> T:
            if time.monotonic() - arrived > self.settings.queue_timeout:
                late = of_reason("queue_timeout", None, self.worker.retry_after())
                assert late is not None
                raise late
            return work(*values)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, in_time)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def _over(
        self, job: Job, about: Asked, arrived: float
    ) -> Callable[[list[EngineRequest]], None]:
        """A callback for the ended requests of a body, to be called in the engine's thread."""
        operation = "chat" if job.is_chat else "text_completion"

        def over(requests: list[EngineRequest]) -> None:
            self.metrics.over(requests)
            if self.spans is not None:
                self.spans.over(operation, about, arrived, requests)

        return over

    def _queue(self, job: Job, arrived: float) -> tuple[Job, Reply]:
        """Submit a body's requests to the engine."""
        body = job.body
        about = asked.get() or Asked("", {})  # a batch has no HTTP
        about.answer = job.id
        if self.settings.log_prompts:
            text = [self.prompts.decode(each.prompt) for each in job.leaders]
            log.info("%s asks %r", job.id, text)
        options = body.stream_options
        try:
            stream = self.worker.submit(
                job.leaders,
                timeout=self.settings.request_timeout,
                arrived=arrived,
                watch=bool(options and options.include_kv),
                over=self._over(job, about, arrived),
            )
        except Busy as busy:
            raise self._busy(busy) from None
        except RuntimeError as error:
            raise ApiError(503, str(error), code="engine_dead") from None
        return job, Reply(job, stream, body.model or self.name, self.prompts)

    def _busy(self, busy: Busy) -> ApiError:
        return ApiError(429, str(busy), code="queue_full", retry_after=busy.retry_after)

    def close(self) -> None:
        """End running requests, and the threads."""
        self.worker.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.spans is not None:
            self.spans.close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is in preparation, waiting or running."""
        return not self.preparing and self.worker.is_idle

    async def inside(self, look: Callable[[], T]) -> T:
        """The result of ``look``, called in the engine's thread between two steps; ``ApiError`` if
        the thread has ended."""
        try:
            return await asyncio.wrap_future(self.worker.ask(look))
        except RuntimeError as error:
            raise ApiError(503, str(error), code="engine_dead") from None

    async def answer(
        self,
        body: ChatRequest | CompletionRequest,
        owner: str | None,
        shaped: Shaped | None = None,
    ) -> dict[str, Any]:
        """The whole answer, in the format of ``shaped``.  ``ApiError`` for a failed request."""
        _, reply = await self.begin(body, owner)
        try:
            found = await (shaped(reply) if shaped else reply).whole()
        finally:
            reply.stream.close()
        self._log_answer(reply)
        return found

    def check_model(self, name: str | None) -> None:
        names = [self.name, *self.llm.engine.adapters]
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has "
                f"{', '.join(map(repr, names))}.",
                param="model",
                code="model_not_found",
            )

    # --- over HTTP ----------------------------------------------------------------------------

    async def respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        shaped: Shaped | None = None,
    ) -> Response:
        """Answer over HTTP; if the client disconnects, the request is aborted."""
        owner: str | None = request.scope["owner"]
        try:
            if not body.stream:
                return JSONResponse(await _unless_gone(request, self.answer(body, owner, shaped)))
            return await self._stream(request, body, owner, shaped)
        except _Gone:
            self.metrics.disconnected.inc()
            return Response(status_code=499)

    async def _stream(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        owner: str | None,
        shaped: Shaped | None,
    ) -> Response:
        """A stream of events.  It starts with the first event, so that an earlier error gets its
        own HTTP status."""
        _, reply = await self.begin(body, owner)
        shape: Shape = shaped(reply) if shaped else reply
        try:
            first = await _unless_gone(request, reply.stream.next())
            chunks = shape.chunks(first)
            head = await anext(chunks)
        except BaseException:
            reply.stream.close()
            raise
        return EventStream(self, reply, self._events(reply, shape, head, chunks))

    async def _events(
        self, reply: Reply, shape: Shape, head: bytes, chunks: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        yield head
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            reply.stream.close()  # otherwise it would count as a disconnect
            yield shape.failed(error)
            return
        self._log_answer(reply)

    def _log_answer(self, reply: Reply) -> None:
        if self.settings.log_prompts:
            log.info("%s gets %r", reply.job.id, [each.text for each in reply.choices])


def spans_module() -> Any:
    """The module for traces; ``ValueError`` if OpenTelemetry is not installed, or if its variables
    ask for something unsupported."""
    try:
        from pyramidinfer.server import spans
    except ModuleNotFoundError as error:
        raise ValueError(
            f"otel_traces needs OpenTelemetry ({error.name} is not installed): "
            f"pip install 'pyramidinfer[otel]'"
        ) from None
    spans.check_variables()
    return spans


class EventStream(StreamingResponse):
    """Server-sent events; when the response ends for any reason, its requests end too."""

    def __init__(self, service: Service, reply: Reply, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.service, self.stream = service, reply.stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.service.settings.request_timeout + READING):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its answer in time")
        finally:
            if self.stream.left:
                self.service.metrics.disconnected.inc()
            self.stream.close()


class _Gone(Exception):
    """The client disconnected."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; ``_Gone`` if the client disconnects first."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(BaseException):
                await each
