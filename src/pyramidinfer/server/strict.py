"""Bodies as JSON to the letter: no NaN, no name twice, no half characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

__all__ = ["StrictRoute", "parse_json"]


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = _parse(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route whose body is read so; what is not valid is 400 and says why."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def parse_json(text: str) -> Any:
    """What a text says; ``ValueError`` where it is not JSON to the letter, and why."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, or one of ours
        raise ValueError(f"not valid JSON: {error}") from None


def _parse(body: bytes) -> Any:
    try:
        found = parse_json(body.decode())
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None
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
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.60} is there twice")
        found[name] = value
    return found
