"""Read several generations of the engine as one asynchronous stream, and end them when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from qwenvl_mlx.engine import Engine
from qwenvl_mlx.engine.events import Event, FinishEvent, Reply
from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.engine.request import Outcome, Request
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.server.errors import ApiError, from_exception


@dataclass(frozen=True)
class Piece:
    """An event of one choice."""

    choice: int
    event: Event


class Run:
    """The choices of one HTTP request, submitted together.

    ``deadline``: on the event loop's clock; after it ``TimeoutError`` ends the stream.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        options: Sequence[GenerationOptions],
        *,
        deadline: float,
    ) -> None:
        """Raises ``Busy`` when the queue is full, ``GenerationError`` for what can't be served."""
        if not engine.alive:
            raise ApiError(503, "the engine has stopped: the server's log says why", code="engine_stopped")
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Outcome]] = asyncio.Queue()
        self._requests: list[Request] = []
        self._open: set[int] = set()
        self.deadline = deadline
        self.replies: dict[int, Reply] = {}
        try:
            for choice, (prompt, wish) in enumerate(zip(prompts, options, strict=True)):
                self._requests.append(engine.submit(prompt, wish, listener=self._listener(choice)))
                self._open.add(choice)
        except BaseException:
            self.cancel()
            raise

    def _listener(self, choice: int) -> Callable[[Outcome], None]:
        def listen(outcome: Outcome) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, outcome))

        return listen

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """All events until every choice has finished; None whenever ``patience`` seconds bring nothing."""
        while self._open:
            item = await self._next(patience)
            if item is None:
                yield None
                continue
            choice, outcome = item
            if isinstance(outcome, Exception):
                self._open.discard(choice)
                raise from_exception(outcome) from outcome
            if isinstance(outcome, FinishEvent):
                self._open.discard(choice)
                self.replies[choice] = outcome.reply
            yield Piece(choice, outcome)

    async def _next(self, patience: float | None) -> tuple[int, Outcome] | None:
        if not self._events.empty():
            await asyncio.sleep(0)  # others come between: this client may have left, too
            return self._events.get_nowait()
        left = self.deadline - self._loop.time()
        if left <= 0:
            raise TimeoutError
        wait = left if patience is None else min(left, patience)
        try:
            async with asyncio.timeout(wait):
                return await self._events.get()
        except TimeoutError:
            if wait == left:
                raise
            return None

    def cancel_choice(self, choice: int) -> None:
        """End one choice within a step; its reply still comes."""
        self._requests[choice].cancel()

    def cancel(self) -> None:
        """End within one step what still runs; safe to call at any time."""
        for choice, request in enumerate(self._requests):
            if choice in self._open:
                request.cancel()

    def fail(self, error: ApiError) -> None:
        """End the stream with ``error``, after what is known already. For the event loop's thread."""
        self._events.put_nowait((0, error))

    @property
    def finished(self) -> bool:
        return not self._open
