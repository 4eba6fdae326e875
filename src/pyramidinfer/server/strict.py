"""Strict JSON bodies: no NaN, no duplicate names, no lone surrogates; and a size limit, so that
parsing a body does not delay other requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

__all__ = ["StrictRoute", "parse_json"]


#: Maximum numbers of a body: objects and lists, strings and names, all values; names per object.
MOST_CONTAINERS, MOST_TEXTS, MOST_VALUES, MOST_NAMES = 10_000, 100_000, 1_000_000, 4096
#: Size in bytes of a large body: large bodies are parsed one at a time, so that other requests are
#: served in between.
LARGE = 16 * 2**10

#: A string, or the beginning of one that does not end; without backtracking.
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class TooManyNames(ValueError):
    """An object is valid JSON, but too large."""


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) < LARGE:
                self._json = _parse(body)
            else:
                async with self.app.state.large_bodies:
                    await asyncio.sleep(0)
                    _check_size(body)
                    await asyncio.sleep(0)
                    self._json = _parse(body)
                    await asyncio.sleep(0)
        return self._json


class StrictRoute(APIRoute):
    """A route with a strict body; an invalid one gets 400 with the reason."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def _check_size(body: bytes) -> None:
    """Refuse a body with too many parts before parsing it, by its quotes, commas and brackets."""
    # a lower bound: the backslash before a quote may be escaped itself
    texts = (body.count(b'"') - body.count(b'\\"')) // 2
    _limit(texts, MOST_TEXTS, "texts and names")
    bare = STRING.sub(b"", body)
    containers = bare.count(b"[") + bare.count(b"{")
    _limit(containers, MOST_CONTAINERS, "objects and lists")
    _limit(containers + bare.count(b","), MOST_VALUES, "values")


def _limit(found: int, most: int, what: str) -> None:
    if found > most:
        raise HTTPException(
            400, f"the body holds {found} {what}; this server accepts at most {most}"
        )


def parse_json(text: str) -> Any:
    """The value of a text; ``ValueError`` with the reason if it is not strict JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except TooManyNames:
        raise
    except ValueError as error:  # a number with thousands of digits, or our own error
        raise ValueError(f"not valid JSON: {error}") from None


def _parse(body: bytes) -> Any:
    try:
        found = parse_json(body.decode())
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None
    except TooManyNames as error:
        raise HTTPException(400, str(error)) from None
    except ValueError as error:
        raise HTTPException(400, f"the body is {error}") from None
    if b"\\u" in body:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise HTTPException(
                400, "the body holds half of a surrogate pair, which is no character"
            ) from None
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_NAMES:
        raise TooManyNames(f"an object has {len(pairs)} names; {MOST_NAMES} are read at most")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.60} is there twice")
        found[name] = value
    return found
