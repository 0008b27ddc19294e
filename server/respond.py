"""From a run of the engine to an HTTP response, whole or streamed: the same for chat and plain completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from qwenvl_mlx.engine.events import Reply, TextEvent
from qwenvl_mlx.server.run import Piece, Run
from qwenvl_mlx.server.state import State
from qwenvl_mlx.server.stream import Chunks, EventStream

CLIENT_LEFT = 499


class Form(Protocol):
    """How one endpoint words its answers."""

    def begin(self) -> list[dict[str, Any]]:
        """Chunks before anything was generated."""

    def text(self, choice: int, event: TextEvent) -> list[dict[str, Any]]:
        """Chunks for a piece of text."""

    def end(self, choice: int, reply: Reply) -> list[dict[str, Any]]:
        """Chunks at the end of a choice, with its finish reason."""

    def satisfied(self, choice: int) -> bool:
        """Whether a choice needs no more text, although the model would go on."""

    def usage(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        """The chunk that only counts."""

    def body(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        """The whole answer."""


class Conversation:
    """One HTTP request that is being answered; ``stack`` holds what must be given back at its end."""

    def __init__(self, run: Run, form: Form, stack: AsyncExitStack, state: State) -> None:
        self._run = run
        self._form = form
        self._stack = stack
        self._state = state
        self._metrics = state.metrics
        self._started = time.monotonic()
        self._silent = True
        self._metrics.add("qwenvl_active_requests")
        state.begin(run)

    async def whole(self) -> Response:
        """Wait for all choices."""
        try:
            async for piece in self._run.pieces():
                if piece is not None:
                    self._chunks_of(piece)
            return JSONResponse(self._form.body(self._run.replies))
        finally:
            await self.close()

    async def streamed(self, *, include_usage: bool) -> Response:
        """Wait for the first event, for no longer than the keep-alive time: an early failure keeps its status."""
        pieces = self._run.pieces(self._state.settings.keep_alive_seconds)
        try:
            first = await anext(pieces)
        except BaseException:
            await self.close()
            raise
        seconds = self._state.settings.limits.request_seconds + 60
        return EventStream(
            self._stream(first, pieces, include_usage=include_usage), self.close, seconds=seconds
        )

    async def close(self) -> None:
        """Free the engine's slots and the model; count what was done. Safe to call once, on any path."""
        self._state.forget(self._run)
        if not self._run.finished:
            self._run.cancel()
            self._metrics.add("qwenvl_cancelled_total")
        self._metrics.add("qwenvl_active_requests", -1)
        self._metrics.observe("qwenvl_request_seconds", time.monotonic() - self._started)
        for reply in self._run.replies.values():
            self._metrics.add("qwenvl_prompt_tokens_total", reply.usage.prompt_tokens)
            self._metrics.add("qwenvl_cached_tokens_total", reply.usage.cached_tokens)
            self._metrics.add("qwenvl_completion_tokens_total", reply.usage.completion_tokens)
        await self._stack.aclose()

    async def _stream(
        self, first: Piece | None, rest: AsyncIterator[Piece | None], *, include_usage: bool
    ) -> Chunks:
        for chunk in self._form.begin():
            yield chunk
        for chunk in self._chunks_of(first):
            yield chunk
        async for piece in rest:
            if piece is None:
                yield None
            for chunk in self._chunks_of(piece):
                yield chunk
        if include_usage:
            yield self._form.usage(self._run.replies)

    def _chunks_of(self, piece: Piece | None) -> list[dict[str, Any]]:
        if piece is None:
            return []
        if not isinstance(piece.event, TextEvent):
            return self._form.end(piece.choice, piece.event.reply)
        if self._silent:
            self._silent = False
            self._metrics.observe("qwenvl_first_token_seconds", time.monotonic() - self._started)
        if self._form.satisfied(piece.choice):
            return []
        chunks = self._form.text(piece.choice, piece.event)
        if self._form.satisfied(piece.choice):
            self._run.cancel_choice(piece.choice)
        return chunks


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The work's response; when the client leaves first, the work is cancelled."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=CLIENT_LEFT)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
