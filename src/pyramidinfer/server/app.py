"""The application: routes, errors in OpenAI's format, and the engine's start and stop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import pyramidinfer
from pyramidinfer.engine import LLM
from pyramidinfer.engine.owned import Held
from pyramidinfer.policies import Policy
from pyramidinfer.server.errors import ApiError, error_response
from pyramidinfer.server.gate import Gate
from pyramidinfer.server.page import add_page
from pyramidinfer.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Detokenize,
    TokenizeRequest,
)
from pyramidinfer.server.protocol_base import Pin
from pyramidinfer.server.protocol_responses import ResponseRequest
from pyramidinfer.server.responses import Responses
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings
from pyramidinfer.server.strict import StrictRoute
from pyramidinfer.server.survival import add_survival

__all__ = ["build_app"]

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Error statuses of all endpoints, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": text,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "object"}},
                }
            }
        },
    }
    for code, text in {
        400: "Invalid request",
        401: "No valid API key",
        404: "No such model or cache",
        408: "The body took too long",
        413: "The request is too large",
        415: "The body's Content-Encoding is not supported",
        429: "The queue is full: try again after Retry-After seconds",
        500: "The request failed",
        503: "The server is stopping",
        504: "The request took too long",
    }.items()
}


def build_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """The server of one model; its engine starts and stops with the application."""
    service = Service(llm, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.close()

    app = FastAPI(
        redirect_slashes=False,  # the target of a redirect would depend on the Host header
        title="PyramidInfer",
        version=pyramidinfer.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        description="OpenAI's API for an engine that keeps fewer tokens from layer to layer.",
    )
    app.state.service = service
    app.state.large_bodies = asyncio.Semaphore(1)
    app.router.route_class = StrictRoute
    app.add_middleware(Gate, settings=settings, rejected=lambda status: _count(service, status))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends a dozen
        )
    _add_errors(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_caches(app, service)
    add_survival(app, service, ERRORS)
    _add_operation(app, service)
    if settings.page:
        add_page(app)
    return app


def _count(service: Service, status: int) -> None:
    service.metrics.rejected.labels(service.name, str(status)).inc()


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error in OpenAI's format; an invalid body is 400, as its clients expect."""

    @app.exception_handler(ApiError)
    async def of_api(_: Request, error: ApiError) -> JSONResponse:
        _count(service, error.status)
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_body(_: Request, error: RequestValidationError) -> JSONResponse:
        _count(service, 400)
        message, param = _told(error)
        return error_response(400, message, param)

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> JSONResponse:
        _count(service, error.status_code)
        message, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path} here"
        if error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        if error.status_code in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return error_response(error.status_code, message, headers=headers)

    @app.exception_handler(Exception)
    async def of_ours(_: Request, error: Exception) -> JSONResponse:
        _count(service, 500)
        log.error("an unexpected error", exc_info=error)
        return error_response(500, "internal error; see the server's log")


def _told(error: RequestValidationError) -> tuple[str, str | None]:
    """The first error of a body, and its parameter."""
    found = error.errors()[0]
    place = [str(part) for part in found["loc"] if part != "body"]
    place = [part for part in place if not part.startswith("(")]  # no tag of a union
    param = place[0] if place else None
    message = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "model_attributes_type" and not place:
        return "the body is not a JSON object; send one with Content-Type: application/json", None
    if found["type"] == "union_tag_invalid":
        kinds = str(found["ctx"]["expected_tags"]).replace("(", "").replace(")", "")
        return f"{'.'.join(place)}: type must be one of {kinds}", param
    if found["type"] == "extra_forbidden":
        return f"unknown parameter {'.'.join(place)!r}", param
    if found["type"] == "missing" and not place:
        return "the body is missing; send a JSON object", None
    if found["type"] == "missing":
        return f"missing parameter {'.'.join(place)!r}", param
    if param == "prompt" and len(place) > 1:  # the intended kind is unknown
        message, place = "must be a text, texts, token ids, or lists of token ids", ["prompt"]
    if param == "tools" and found["type"] == "literal_error" and place[-1] == "type":
        message = "only functions are supported: type must be 'function'"
    if param == "messages" and "content" in place:
        message = "must be a text or text parts; images, audio and files are not supported"
        place = place[: place.index("content") + 1]
    shown = f" (given: {found['input']!r:.60})" if place else ""
    return f"{'.'.join(place)}: {message}{shown}" if place else message, param


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=ERRORS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text.  ``stream`` answers with server-sent events."""
        return await service.respond(request, body)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """The next turn of a conversation.  ``stream`` answers with server-sent events."""
        return await service.respond(request, body)

    answers = Responses(service)
    app.state.responses = answers

    @app.post("/v1/responses", responses=ERRORS)
    async def responses(request: Request, body: ResponseRequest) -> Response:
        """The next turn of a given or stored conversation.  ``stream`` answers with
        server-sent events."""
        return await answers.create(request, body)

    kept: dict[int | str, dict[str, Any]] = {code: ERRORS[code] for code in (400, 401, 404)}

    @app.get("/v1/responses/{id}", responses=kept)
    async def response(request: Request, id: str) -> dict[str, Any]:
        """A stored answer."""
        for name in request.query_params:
            raise ApiError(400, f"unknown parameter {name!r:.60}", param=name[:60])
        return answers.get(request.scope["owner"], id)

    @app.delete("/v1/responses/{id}", responses=kept)
    async def delete_response(request: Request, id: str) -> dict[str, Any]:
        """Delete a stored answer."""
        return answers.delete(request.scope["owner"], id)

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(
            404,
            "this server has no embeddings: it generates text (/v1/chat/completions)",
            code="not_supported",
        )

    created = int(time.time())
    served = service.jobs.served
    rules = {name: each.rule or _summary(each) for name, each in served.items()}
    least = {name: getattr(each, "min_context", None) for name, each in served.items()}

    def about() -> dict[str, Any]:
        engine, jobs = service.llm.engine, service.jobs
        return {
            "id": service.name,
            "object": "model",
            "created": created,
            "owned_by": "pyramidinfer",
            "root": service.llm.name,
            "parent": None,
            "max_model_len": engine.runner.max_positions,
            "weights": engine.config.weights,
            "weight_bytes": engine.runner.weight_bytes,
            "layers": engine.runner.depth,
            "heads": jobs.heads,
            "compression": {
                "policy": jobs.base.name,
                "keep": jobs.own_keep,
                "lossless": jobs.lossless,
                "kv_dtype": engine.config.kv_dtype,
                "rule": jobs.own.rule,
                "policies": jobs.policies,
                "rules": rules,
                "min_context": least,
                "min_keep": service.settings.min_keep,
                "max_keep": service.settings.max_keep,
            },
        }

    def adapted(name: str) -> dict[str, Any]:
        path = service.llm.engine.adapters[name].path
        return {**about(), "id": name, "root": path, "parent": service.name}

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The served model, its adapters, and the compression that requests may set."""
        adapters = map(adapted, service.llm.engine.adapters)
        return {"object": "list", "data": [about(), *adapters]}

    @app.get("/v1/models/{model:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        service.check_model(model)
        return about() if model == service.name else adapted(model)


def _summary(policy: Policy) -> str:
    """The first line of a policy's description, with a lower-case first letter."""
    text = (inspect.getdoc(type(policy)) or "").partition("\n")[0]
    return text[:1].lower() + text[1:].removesuffix(".")


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text, or of messages under the chat template."""
        service.check_model(body.model)
        tokens = await service.prepare(service.jobs.tokens, body)
        longest = service.llm.engine.runner.max_positions
        return {"count": len(tokens), "max_model_len": longest, "tokens": tokens}

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        """The text of token ids, special ones included."""
        service.check_model(body.model)
        return {"prompt": await service.prepare(service.jobs.text, body)}


def _add_caches(app: FastAPI, service: Service) -> None:
    """Held caches of conversations; a client sees only those of its API key."""
    engine = service.llm.engine
    lists: dict[int | str, dict[str, Any]] = {401: ERRORS[401], 503: ERRORS[503]}

    async def found(id: str, look: Callable[[], T]) -> T:
        try:
            return await service.inside(look)
        except KeyError:
            raise ApiError(404, f"there is no cache {id!r:.60}", param="id") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    @app.get("/v1/caches", responses=lists)
    async def caches(request: Request) -> dict[str, Any]:
        """Held caches, the most recently used first."""
        owner = request.scope["owner"]
        held = await service.inside(lambda: engine.caches(owner))
        return {"object": "list", "data": [_shown(each) for each in held]}

    @app.post("/v1/caches/{id}/pin", responses=ERRORS)
    async def pin(request: Request, id: str, body: Pin) -> dict[str, Any]:
        """Protect a cache, and the caches of later turns, from being dropped for some time."""
        owner = request.scope["owner"]
        return _shown(await found(id, lambda: engine.pin_cache(owner, id, body.ttl)))

    @app.delete("/v1/caches/{id}", responses={**lists, 404: ERRORS[404]})
    async def delete(request: Request, id: str) -> dict[str, Any]:
        """Free a cache in every place."""
        owner = request.scope["owner"]
        await found(id, lambda: engine.delete_cache(owner, id))
        return {"id": id, "object": "cache", "deleted": True}


def _shown(held: Held) -> dict[str, Any]:
    return {"object": "cache", **held._asdict()}


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Whether the engine runs."""
        if not service.worker.is_alive:
            raise ApiError(503, "the engine's thread has ended", code="engine_dead")
        stalled = service.worker.stalled_seconds
        if stalled > service.settings.stall_timeout:
            raise ApiError(503, f"no step has ended for {stalled:.0f} s", code="engine_stalled")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Whether new requests are accepted."""
        if service.draining or not service.worker.is_alive:
            raise ApiError(503, "the server is stopping", code="stopping")
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of this server."""
        return {"version": pyramidinfer.__version__}

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
