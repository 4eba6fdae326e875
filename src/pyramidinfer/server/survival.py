"""``POST /v1/caches/survival``: which tokens of a conversation are held in which layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field

from pyramidinfer.engine.surviving import Survival, survival
from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import TokenizeRequest
from pyramidinfer.server.protocol_base import CacheSalt, Compression
from pyramidinfer.server.service import Service
from pyramidinfer.types import TokenIds

__all__ = ["MOST_COLUMNS", "SurvivalRequest", "add_survival"]

#: Maximum number of columns of an answer, for a text of any length.
MOST_COLUMNS = 1024


class SurvivalRequest(TokenizeRequest):
    """A conversation up to its last answer, with the ``model``, ``cache_salt`` and compression of
    its requests.

    ``columns``: maximum number of columns; all columns have the same number of tokens.
    """

    add_generation_prompt: bool = False
    compression: Compression | None = None
    cache_salt: CacheSalt = None
    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)] = 512


def add_survival(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    """The route.  The client sends the text itself, so no texts of others are disclosed."""
    engine, jobs = service.llm.engine, service.jobs

    @app.post("/v1/caches/survival", responses=errors)
    async def of_text(request: Request, body: SurvivalRequest) -> dict[str, Any]:
        """The held tokens of a conversation, layer by layer."""
        service.check_model(body.model)
        if body.compression is not None and not body.compression.reuse:
            raise ApiError(
                400, "compression: with reuse=false no cache is held", param="compression"
            )
        policy, owner = jobs.policy(body.compression), request.scope["owner"]
        tokens, prefix = await service.prepare(jobs.begun, body, body.compression)
        lora, salt = jobs.lora(body.model), body.cache_salt or ""
        try:
            found = await service.inside(
                lambda: survival(engine, owner, tokens, policy, body.columns, lora, salt, prefix)
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if found is None:
            raise ApiError(
                404,
                "no cache is held of this text: none of its beginnings was answered under this "
                "compression, or the memory was needed",
                code="no_cache",
            )
        text = await service.prepare(_columns, service.prompts, tokens, found)
        return {"object": "survival", **found._asdict(), "text": text}


def _columns(prompts: Prompts, tokens: TokenIds, found: Survival) -> list[str]:
    """The text of every column."""
    held = tokens[: found.tokens]
    offsets, reader = prompts.offsets(held, [], [], skip_special_tokens=False)
    text = reader.text if reader else ""
    starts = [*offsets[:: found.width], len(text)]
    return [text[start:end] for start, end in pairwise(starts)]
