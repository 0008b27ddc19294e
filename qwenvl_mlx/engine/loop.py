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
import numpy as np

from qwenvl_mlx.engine import memory
from qwenvl_mlx.engine.batch import Batch, Row
from qwenvl_mlx.engine.kv import cache_maker
from qwenvl_mlx.engine.lookup import Lookup
from qwenvl_mlx.engine.memory import MemoryPlan
from qwenvl_mlx.engine.options import EngineOptions
from qwenvl_mlx.engine.pace import Paces
from qwenvl_mlx.engine.prefill import Prefill
from qwenvl_mlx.engine.prefix_cache import Ids, PrefixCache
from qwenvl_mlx.engine.request import Request
from qwenvl_mlx.engine.sampling import Sampler
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.engine.step import CompiledStep
from qwenvl_mlx.engine.together import Together
from qwenvl_mlx.errors import GenerationError, QwenVLError
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.processor.base import Processor

log = logging.getLogger(__name__)

# What one request's prompt can cause: our own errors, and MLX's for shapes and memory. The others go on.
REQUEST_FAULTS = (QwenVLError, RuntimeError, ValueError, MemoryError)
# MLX keeps freed buffers for reuse; after prompts and while caches grow, most are of sizes that never return.
STEPS_BETWEEN_CLEANING = 256


class Loop:
    """Requests in, events out. ``run`` is the thread's whole life."""

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        options: EngineOptions,
        plan: MemoryPlan,
        context: int,
    ) -> None:
        self._model, self._step = model, CompiledStep(model)
        self._processor = processor
        self._options = options
        self._plan = plan
        self._context = context
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._lanes: list[Batch] = []  # one, unless the kind of cache or its padding asks for more
        self._new_cache = cache_maker(model, options.kv_bits)
        self._turn = processor.tokenizer.id("<|im_start|>")
        budget = memory.default_cache_bytes() if options.cache_bytes is None else options.cache_bytes
        self.prefixes = PrefixCache(budget)
        self._paces = Paces(lambda: self._answering > 0, options.prefill_chunk)
        self._together = Together(model, self._paces, plan, remembers=budget > 0)
        self._reading: list[Prefill] = []  # one, or short ones that are read as one
        self._slices: Iterator[None] = iter(())
        self._singly = 0  # so many are to be read one by one
        self._door = threading.Lock()  # no request may slip in after the last look at the inbox
        self._closing = threading.Event()
        self._steps = 0
        self.fault: BaseException | None = None

    @property
    def waiting(self) -> int:
        """Requests that nobody has looked at yet."""
        return self._inbox.qsize() + len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being read or answered."""
        return self._answering + len(self._reading)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its thread has failed."""
        return self._closing.is_set()

    @property
    def _answering(self) -> int:
        return sum(map(len, self._lanes))

    def put(self, request: Request) -> None:
        """Hand over a request, from any thread; ``GenerationError`` when nobody will look at it."""
        with self._door:
            if self.closed:
                raise GenerationError("the engine is closed: make a new one")
            self._inbox.put(request)

    def close(self) -> None:
        """End the thread after the step that it is in."""
        with self._door:
            self._closing.set()
            self._inbox.put(None)

    def run(self) -> None:
        try:
            if memory.on_gpu():  # macOS must not page the weights out between requests
                mx.set_wired_limit(memory.working_set())
            while not self._closing.is_set():
                self._receive()
                self._read()
                self._decode()
        except BaseException as fault:
            self.fault = fault
            raise
        finally:
            self.close()
            self._abandon()
            self.prefixes.clear()
            mx.clear_streams()  # a thread that leaves streams behind can abort the interpreter's exit

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
        if not self._reading:
            self._begin()
        if not self._reading:
            return
        first = self._reading[0].sequence
        if len(self._reading) == 1 and first.request.cancelled:
            first.cancel()
            self._reading = []
            return
        try:
            if next(self._slices, self) is None:
                return
        except REQUEST_FAULTS as error:
            self._spoilt(error)
        while self._reading:  # who has not joined yet is still found here, should the thread die
            self._join(self._reading[0])
            del self._reading[0]

    def _begin(self) -> None:
        """Take the first prompt that waits, and those behind it that are better read as one with it."""
        while self._waiting and self._admits(self._waiting[0]):
            request = self._waiting[0]
            try:
                prefill = self._prefill_of(request)
            except REQUEST_FAULTS as error:
                self._waiting.popleft()
                self._fail(request, error)
                continue
            taken = self._planned() + request.needs
            if self._reading and not self._together.gains(self._reading, prefill, taken):
                break
            self._reading.append(prefill)
            self._waiting.popleft()
            if self._singly or not self._together.suits(prefill):
                self._singly = max(self._singly - 1, 0)
                break
        if len(self._reading) == 1:
            self._slices = self._reading[0].run()
        elif self._reading:
            self._slices = self._together.run(self._reading)

    def _spoilt(self, error: Exception) -> None:
        """What was being read can't be: one prompt fails; several are read again, each alone."""
        requests = [one.sequence.request for one in self._reading]
        self._reading = []
        if len(requests) == 1:
            self._fail(requests[0], error)
        else:
            log.info("%d prompts are read one by one: %s", len(requests), error)
            self._waiting.extendleft(reversed(requests))
            self._singly = len(requests)

    def _admits(self, request: Request) -> bool:
        """Whether there is a place and memory for one more. What is only remembered makes room."""
        if self.running >= self._options.max_batch:
            return False
        needs = self._planned() + request.needs
        self.prefixes.shrink(max(self._plan.free - needs, 0))
        return not self.running or needs <= self._plan.free

    def _planned(self) -> int:
        """Bytes that all that runs will take, with the padding of batches."""
        rows = sum(row.sequence.request.needs for lane in self._lanes for row in lane.rows)
        rows += sum(one.sequence.request.needs for one in self._reading)
        return rows + sum(self._plan.padding(lane.padding()) for lane in self._lanes)

    def _prefill_of(self, request: Request) -> Prefill:
        room = self._context - len(request.prompt)
        wanted = request.options.max_tokens or self._processor.defaults.max_tokens or room
        sequence = Sequence(request, self._processor, min(wanted, room))
        return Prefill(
            self._model,
            self._new_cache,
            self.prefixes,
            sequence,
            paces=self._paces,
            turn=self._turn,
        )

    def _join(self, prefill: Prefill) -> None:
        request = prefill.sequence.request
        defaults, prompt = self._processor.defaults, request.prompt.input_ids
        try:
            sampler = Sampler(request.options, defaults, prompt, prefill.logits.size)
            self._remember(prefill.ids, prefill.rope_key, prefill.cache)
            guessable = sampler.plain and request.options.logprobs is None and prefill.cache.trimmable
            lookup = Lookup(prompt) if guessable and self._options.prompt_lookup else None
            row = Row(prefill.sequence, sampler, prefill.ids, prefill.rope_key, lookup)
            self._lane_for(row, prefill.cache).add(row, prefill.cache, prefill.logits)
        except REQUEST_FAULTS as error:
            self._fail(request, error)
        mx.clear_cache()

    def _lane_for(self, row: Row, cache: Cache) -> Batch:
        """A batch that takes it without too much padding, or a new one."""
        taken = self._planned()  # this one is still among those that are read
        for lane in self._lanes:
            if lane.takes(cache) and self._plan.allows_padding(lane.padding(row.length), taken):
                return lane
        self._lanes.append(Batch(self._model, self._step))
        return self._lanes[-1]

    def _decode(self) -> None:
        for lane in self._lanes:
            try:
                ended = lane.step()
            except REQUEST_FAULTS as error:  # the device's memory, most likely: who shares it shares this
                for row in lane.rows:
                    if row.sequence.finish_reason is None:
                        self._fail(row.sequence.request, error)
                lane.clear()
                continue
            for row, cache in ended:
                self._ended(row, cache)
        self._lanes = [lane for lane in self._lanes if len(lane)]
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEANING == 0:
            mx.clear_cache()

    def _ended(self, row: Row, cache: Cache) -> None:
        answer = np.array(row.sequence.tokens[: row.fed], np.int64)
        self._remember(np.concatenate([row.prompt_ids, answer]), row.rope_key, cache)
        mx.clear_cache()

    def _remember(self, ids: Ids, rope_key: float, cache: Cache) -> None:
        if self.prefixes.budget:
            self.prefixes.put(ids, rope_key, cache)

    def _fail(self, request: Request, error: Exception) -> None:
        log.info("a request failed: %s", error)
        request.emit(error)

    def _abandon(self) -> None:
        """Nobody may wait for ever: end what runs, refuse what waits."""
        error = GenerationError(
            f"the engine has stopped ({self.fault})" if self.fault else "the engine was closed"
        )
        running = [row.sequence.request for lane in self._lanes for row in lane.rows]
        running += [one.sequence.request for one in self._reading]
        while not self._inbox.empty():
            request = self._inbox.get()
            running += [request] if request else []
        for request in [*running, *self._waiting]:
            request.emit(error)
        self._waiting.clear()
        self._lanes.clear()
        self._reading = []
