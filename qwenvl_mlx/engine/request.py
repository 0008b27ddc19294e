"""What a caller holds while an answer is made: events to read, a result to wait for, a way to stop it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from qwenvl_mlx.engine.events import Event, FinishEvent, Reply
from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.media import Prompt

log = logging.getLogger(__name__)

Outcome = Event | Exception
Listener = Callable[[Outcome], None]


class Request:
    """One submitted prompt. Iterate over it for events, or wait for ``result()``; both raise what went wrong.

    ``needs``: bytes that it will take, see ``MemoryPlan``.
    ``listener``: called with every event, or with the error that ended the request, on the engine's thread and in
    place of iterating: for callers that have an event loop of their own. It must return at once. If it raises
    ``RuntimeError``, as a closed event loop does, the request is cancelled.
    """

    def __init__(
        self, prompt: Prompt, options: GenerationOptions, listener: Listener | None = None, *, needs: int = 0
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.needs = needs
        self.submitted = time.perf_counter()
        self._events: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._listener = listener or self._events.put
        self._cancelled = threading.Event()
        self._outcome: Reply | Exception | None = None

    def __iter__(self) -> Iterator[Event]:
        while self._outcome is None:
            event = self._events.get()
            if isinstance(event, Exception):
                self._outcome = event
                raise event
            if isinstance(event, FinishEvent):
                self._outcome = event.reply
            yield event

    def result(self) -> Reply:
        """The whole reply, once it is finished."""
        for _ in self:
            pass
        if isinstance(self._outcome, Reply):
            return self._outcome
        raise self._outcome or RuntimeError("the events of this request are read elsewhere")

    def cancel(self) -> None:
        """Stop within one step; what was said until then is the reply."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def emit(self, event: Outcome) -> None:
        """For the engine: pass an event on to the caller."""
        try:
            self._listener(event)
        except RuntimeError as error:  # its fault, and nobody else's
            log.warning("a listener failed (%s): its request is cancelled", error)
            self.cancel()
