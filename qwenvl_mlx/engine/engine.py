"""The door to the one generation path: prompts go in, requests come out."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import mlx.core as mx

from qwenvl_mlx.engine.events import Event, Reply
from qwenvl_mlx.engine.loop import Loop
from qwenvl_mlx.engine.memory import EXPECTED_ANSWER, MemoryPlan, picture_size
from qwenvl_mlx.engine.options import EngineOptions, GenerationOptions
from qwenvl_mlx.engine.request import Listener, Request
from qwenvl_mlx.errors import Busy, PromptError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.processor.base import MediaOptions, Message, Processor

log = logging.getLogger(__name__)

Question = Prompt | str | Sequence[Message]


class Engine:
    """Runs a model for any number of callers and threads.

    Use it as a context manager, or call ``close()``.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, options: EngineOptions | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.options = options or EngineOptions()
        self.context_length = min(model.context_length, self.options.max_kv_size or model.context_length)
        mx.eval(model)  # weights and tables: another thread can't evaluate what this one left lazy
        self._plan = MemoryPlan(model, self.options.kv_bits)
        self._loop = Loop(model, processor, self.options, self._plan, self.context_length)
        self._thread = threading.Thread(target=self._loop.run, name="qwenvl-engine", daemon=True)
        self._lock = threading.Lock()

    def prompt(
        self,
        question: Question,
        *,
        media: MediaOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Messages, or a plain question, as a Prompt; a Prompt passes as it is.

        Pictures that the memory does not allow are reduced, unless ``media`` says how large they may be.
        """
        if isinstance(question, Prompt):
            return question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question

        def make(options: MediaOptions) -> Prompt:
            return self.processor(messages, tools=tools, options=options, template=template)

        options = media or MediaOptions()
        prompt = make(options)
        return prompt if options.max_pixels else self._reduced(prompt, options, make)

    def _reduced(
        self, prompt: Prompt, options: MediaOptions, make: Callable[[MediaOptions], Prompt]
    ) -> Prompt:
        """The same with smaller pictures, where they don't fit the memory and nobody said how large they must be."""
        for _ in range(3):
            share = self._plan.share(prompt, EXPECTED_ANSWER)
            if share == 1 or not prompt.media:
                break
            width, height = max(map(picture_size, prompt.media), key=math.prod)
            log.warning("pictures are reduced to %d %% of their area: memory", 100 * share)
            prompt = make(replace(options, max_pixels=max(int(width * height * share), 1)))
        return prompt

    def submit(
        self,
        question: Question,
        options: GenerationOptions | None = None,
        *,
        media: MediaOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        listener: Listener | None = None,
    ) -> Request:
        """Queue a request and return at once.

        Raises ``PromptError``, ``MediaError``, ``Busy``, ``OutOfMemory``, and ``GenerationError`` once it is closed.

        ``media``, ``tools`` and ``template`` are for the processor; ``listener`` see ``Request``.
        """
        prompt = self.prompt(question, media=media, tools=tools, template=template)
        options = options or GenerationOptions()
        self._check(prompt)
        needs = self._plan.check(prompt, options.max_tokens or EXPECTED_ANSWER)
        request = Request(prompt, options, listener, needs=needs)
        with self._lock:
            if self._loop.waiting >= self.options.max_queue:
                raise Busy(f"{self.options.max_queue} requests are waiting: try again later")
            self._loop.put(request)
            if not self._thread.ident:
                self._thread.start()
        return request

    def generate(self, question: Question, options: GenerationOptions | None = None, **more: Any) -> Reply:
        """Submit and wait. ``more``: as for ``submit``."""
        request = self.submit(question, options, **more)
        try:
            return request.result()
        finally:
            request.cancel()

    def stream(
        self, question: Question, options: GenerationOptions | None = None, **more: Any
    ) -> Iterator[Event]:
        """Submit and read events; leaving the loop early cancels the request."""
        request = self.submit(question, options, **more)
        try:
            yield from request
        finally:
            request.cancel()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: not closed, and its thread has not failed."""
        return not self._loop.closed

    @property
    def waiting(self) -> int:
        """Requests that nobody has looked at yet."""
        return self._loop.waiting

    @property
    def running(self) -> int:
        """Requests that are being read or answered."""
        return self._loop.running

    @property
    def remembered_bytes(self) -> int:
        """What the prefix cache holds."""
        return self._loop.prefixes.nbytes

    def close(self) -> None:
        """End the engine after the step that it is in; requests under way fail with ``GenerationError``."""
        with self._lock:
            self._loop.close()
        if self._thread.ident:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, prompt: Prompt) -> None:
        if not prompt.input_ids:
            raise PromptError("the prompt is empty: say something")
        if len(prompt) >= self.context_length:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, the limit is {self.context_length}: shorten it, "
                "or reduce its pictures (max_pixels)"
            )
