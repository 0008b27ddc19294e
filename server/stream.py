"""Server-sent events: lines for OpenAI's clients, comments while nothing happens, and an end on every path."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwenvl_mlx.errors import QwenVLError
from qwenvl_mlx.server.errors import ApiError, from_exception

log = logging.getLogger(__name__)

KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Chunks = AsyncIterator[dict[str, Any] | None]
"""JSON objects to send; None where nothing has happened for a while."""


class EventStream(StreamingResponse):
    """Sends chunks until they end, the client leaves, or ``seconds`` are over; then calls ``close``."""

    def __init__(self, chunks: Chunks, close: Callable[[], Awaitable[None]], *, seconds: float) -> None:
        super().__init__(encode(chunks), media_type="text/event-stream", headers=HEADERS)
        self._close = close
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("a client read too slowly: its stream was ended")
        finally:
            await self._close()


async def encode(chunks: Chunks) -> AsyncIterator[bytes]:
    """Chunks as events. The status line has gone, so what fails now is told inside the stream."""
    try:
        async for chunk in chunks:
            yield KEEP_ALIVE if chunk is None else event(chunk)
    except (ApiError, QwenVLError, TimeoutError) as error:
        yield event(from_exception(error).body())
    yield DONE


def event(value: dict[str, Any]) -> bytes:
    """One event."""
    return (
        b"data: "
        + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        + b"\n\n"
    )
