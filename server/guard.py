"""What every connection meets before the application: host, key and the body's size and pace.

Written as plain ASGI so that a body is judged while it arrives, and answers stream through untouched.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.metrics import Metrics
from qwenvl_mlx.server.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/docs", "/openapi.json"})
"""Readable without a key: they tell nothing about users or models."""

PATIENCE = 4
"""A body up to so many times the limit is received to its end, so that its sender learns what was wrong."""

BODIES = 8
"""Bodies of the largest size that may be held at the same time, before further requests are put off."""

COUNTED_PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}


class Guard:
    """Wraps the application, and counts its answers."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counting(scope, send)
        try:
            self._check_host(Headers(scope=scope).get("host", ""))
            self._check_key(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status_code, headers=dict(error.headers or {}))
            await response(scope, receive, send)
            return
        if body is None:
            return
        self._buffered += len(body)
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self._buffered -= len(body)

    def _counting(self, scope: Scope, send: Send) -> Send:
        path = COUNTED_PATHS.get(scope["path"], "other")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.add("qwenvl_requests_total", path=path, status=str(message["status"]))
            await send(message)

        return counted

    def _check_host(self, header: str) -> None:
        """A page elsewhere can point its own name at this machine; only such a name gives it away."""
        if not is_loopback(self.settings.host):
            return
        name = host_name(header)
        known = {"", "localhost", self.settings.host, *self.settings.allowed_hosts}
        if name not in known and not name.endswith(".localhost") and _address(name) is None:
            raise ApiError(
                403,
                f"the host name {name!r} is not allowed: start with --allowed-host {name}",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope) -> None:
        key = self.settings.api_key
        if key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when the client has left."""
        limits = self.settings.limits
        if self._buffered > BODIES * limits.body_bytes:
            raise ApiError(
                429, "too many large requests at once: try again", code="busy", headers={"Retry-After": "2"}
            )
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > PATIENCE * limits.body_bytes:
            raise _too_large(limits.body_bytes)
        try:
            async with asyncio.timeout(limits.body_seconds):
                return await _read(receive, limits.body_bytes)
        except TimeoutError:
            raise ApiError(
                408,
                f"the request's body did not arrive within {limits.body_seconds:g} s",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None


async def _read(receive: Receive, limit: int) -> bytes | None:
    """A body that is too large is read on for a while: a client that is still sending sees no answer."""
    body, seen = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        seen += len(message.get("body", b""))
        if seen <= limit:
            body += message.get("body", b"")
        else:
            body.clear()
        if seen > PATIENCE * limit or (seen > limit and not message.get("more_body")):
            raise _too_large(limit)
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message; afterwards whatever the server has to say (the disconnect)."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request's body is larger than {limit} bytes: send smaller pictures, or start with --max-body-mb",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()


def is_loopback(host: str) -> bool:
    """Whether a server that listens on ``host`` can only be reached from this machine."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
