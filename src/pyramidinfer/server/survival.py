"""``POST /v1/caches/survival``: which tokens of one's own conversation are held in which layer."""

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

#: However long a text is, an answer has no more columns.
MOST_COLUMNS = 1024


class SurvivalRequest(TokenizeRequest):
    """A conversation so far, its last answer included, with the ``model``, ``cache_salt`` and
    compression that it was asked with.

    ``columns``: into how many the text is cut at most, each of as many tokens as the others.
    """

    add_generation_prompt: bool = False
    compression: Compression | None = None
    cache_salt: CacheSalt = None
    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)] = 512


def add_survival(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    """The route.  Whoever asks has the text, so that nothing is told of texts of others."""
    engine, jobs = service.llm.engine, service.jobs

    @app.post("/v1/caches/survival", responses=errors)
    async def of_text(request: Request, body: SurvivalRequest) -> dict[str, Any]:
        """What is held of a conversation, layer by layer."""
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
