"""Errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

__all__ = ["ApiError", "error_body", "error_response", "of_reason"]

#: Status → OpenAI's error type.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error response: status, message, the invalid parameter and OpenAI's code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers)


def of_reason(
    reason: str, error: str | None, retry_after: int, form: str | None = None
) -> ApiError | None:
    """The error for a request with this finish reason; None if it finished normally.

    ``form``: the field that constrained the answer.
    """
    if reason == "error" and error and error.startswith("GrammarError: "):  # found in decode
        return ApiError(400, error.removeprefix("GrammarError: "), param=form)
    if reason == "error":
        return ApiError(500, f"the request failed: {error}", code="request_failed")
    if reason == "timeout":
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    if reason == "queue_timeout":
        return ApiError(
            429,
            "the request waited too long in the queue; try again later",
            code="queue_timeout",
            retry_after=retry_after,
        )
    if reason == "abort":
        return ApiError(503, "the server is stopping; the request was ended", code="stopping")
    return None
