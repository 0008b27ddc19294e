"""The one thread that runs the model: lets requests in, and takes turns between prompts and answers.

MLX's streams belong to the thread that made them, so all of a request's arrays are made and evaluated here.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator

import mlx.core as mx

from qwenvl_mlx.engine.batch import Batch, Row
from qwenvl_mlx.engine.options import EngineOptions
from qwenvl_mlx.engine.prefill import Prefill
from qwenvl_mlx.engine.request import Request
from qwenvl_mlx.engine.sampling import Sampler
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.errors import GenerationError, QwenVLError
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.processor.base import Processor

log = logging.getLogger(__name__)

# What one request's prompt can cause: our own errors, and MLX's for shapes and memory. The others go on.
REQUEST_FAULTS = (QwenVLError, RuntimeError, ValueError, MemoryError)


class Loop:
    """Requests in, events out. ``run`` is the thread's whole life."""

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, options: EngineOptions, context: int
    ) -> None:
        self._model = model
        self._processor = processor
        self._options = options
        self._context = context
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._batch = Batch(model)
        self._prefill: Prefill | None = None
        self._slices: Iterator[None] = iter(())
        self._closing = threading.Event()
        self.fault: BaseException | None = None

    @property
    def waiting(self) -> int:
        """Requests that nobody has looked at yet."""
        return self._inbox.qsize() + len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being read or answered."""
        return len(self._batch) + (self._prefill is not None)

    def put(self, request: Request) -> None:
        """Hand over a request, from any thread."""
        self._inbox.put(request)

    def close(self) -> None:
        """End the thread after the step that it is in."""
        self._closing.set()
        self._inbox.put(None)

    def run(self) -> None:
        try:
            while not self._closing.is_set():
                self._receive()
                self._read()
                for row, cache in self._batch.step():
                    self._ended(row, cache)
        except BaseException as fault:
            self.fault = fault
            raise
        finally:
            self._abandon()

    def _receive(self) -> None:
        """Take what has come in; wait for it when there is nothing else to do."""
        idle = not (self._waiting or self.running)
        while idle or not self._inbox.empty():
            request = self._inbox.get()
            idle = False
            if request is not None:
                self._waiting.append(request)
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            Sequence(request, self._processor, limit=0).cancel()

    def _read(self) -> None:
        """One slice of the prompt that is being read, or the beginning of the next one."""
        if self._prefill is None and self._waiting and len(self._batch) < self._options.max_batch:
            self._begin(self._waiting.popleft())
        if self._prefill is None:
            return
        sequence = self._prefill.sequence
        if sequence.request.cancelled:
            sequence.cancel()
            self._prefill = None
            return
        try:
            unfinished = next(self._slices, self) is None
        except REQUEST_FAULTS as error:
            self._fail(sequence.request, error)
            self._prefill = None
            return
        if not unfinished:
            prefill, self._prefill = self._prefill, None
            self._join(prefill)

    def _begin(self, request: Request) -> None:
        room = self._context - len(request.prompt)
        wanted = request.options.max_tokens or self._processor.defaults.max_tokens or room
        sequence = Sequence(request, self._processor, min(wanted, room))
        self._prefill = Prefill(self._model, sequence, self._model.make_cache(), self._options.prefill_chunk)
        self._slices = self._prefill.run()

    def _join(self, prefill: Prefill) -> None:
        request = prefill.sequence.request
        sampler = Sampler(
            request.options, self._processor.defaults, request.prompt.input_ids, prefill.logits.size
        )
        self._batch.add(
            Row(prefill.sequence, sampler, fed=len(request.prompt)), prefill.cache, prefill.logits
        )

    def _ended(self, row: Row, cache: Cache) -> None:
        mx.clear_cache()  # keeps long runs from piling up buffers of sizes that never return

    def _fail(self, request: Request, error: Exception) -> None:
        log.info("a request failed: %s", error)
        request.emit(error)

    def _abandon(self) -> None:
        """Nobody may wait for ever: end what runs, refuse what waits."""
        error = GenerationError(
            f"the engine has stopped ({self.fault})" if self.fault else "the engine was closed"
        )
        running = [row.sequence.request for row in self._batch.rows]
        running += [self._prefill.sequence.request] if self._prefill else []
        while not self._inbox.empty():
            request = self._inbox.get()
            running += [request] if request else []
        for request in [*running, *self._waiting]:
            request.emit(error)
        self._waiting.clear()
        self._batch.clear()
        self._prefill = None
