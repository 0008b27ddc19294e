"""Every failure in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qwenvl_mlx.errors import Busy, GenerationError, PromptError, QwenVLError

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(BaseModel):
    """What went wrong. ``param``: the field at fault; ``code``: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """The body of every answer that is none."""

    error: Fault


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request can't be answered: its error says why."},
    "5XX": {"model": Failure, "description": "The server can't answer now, or failed."},
}
"""For the description of the API."""


class ApiError(HTTPException):
    """An answer other than success. ``param``: the field at fault; ``code``: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, param=self.param, code=self.code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON object that OpenAI's clients turn into an exception."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_exception(error: Exception) -> ApiError:
    """What a failure below means for the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "2"})
    if isinstance(error, PromptError | GenerationError):
        return ApiError(400, str(error), code="invalid_request")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the time for this request is over", code="timeout")
    log.error("a request failed", exc_info=error)
    if isinstance(error, QwenVLError):
        return ApiError(503, str(error), code="model_unavailable")
    return ApiError(500, "the server failed on this request: its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Let every error of the application leave in this shape."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(QwenVLError, _answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    known = from_exception(error)
    return JSONResponse(known.body(), known.status_code, headers=dict(known.headers or {}))


async def _plain(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "the server failed on this request"
    messages = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not possible on {request.url.path}",
    }
    headers = dict((error.headers or {}) if isinstance(error, HTTPException) else {})
    return JSONResponse(error_body(status, messages.get(status, str(detail))), status, headers=headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    body = error.body if isinstance(error, RequestValidationError) else None
    message, param = explain(errors, body)
    return JSONResponse(error_body(400, message, param=param, code="invalid_request"), 400)


def explain(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """One line for the first of pydantic's complaints, and the path of the field that it is about."""
    if not errors:
        return "the request is not valid", None
    first = errors[0]
    param = _path(first["loc"], body)
    if first["type"] == "extra_forbidden":
        return f"{param} is not supported here: leave it out", param
    if first["type"] == "missing":
        return f"{param} is required", param
    reason = str(first["msg"]).removeprefix("Value error, ")
    return (f"{param}: {reason}" if param else reason), param


def _path(location: Sequence[str | int], body: Any) -> str | None:
    """``messages[0].content``: without the names that pydantic gives to the branches of a union."""
    path, value = "", body
    steps = list(location[1:])
    for position, step in enumerate(steps):
        inside = isinstance(value, Mapping) and step in value
        inside = inside or (isinstance(value, list) and isinstance(step, int) and step < len(value))
        if inside:
            value = value[step]
        elif position < len(steps) - 1 or not isinstance(value, Mapping):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".") or None
