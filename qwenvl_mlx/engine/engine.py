"""The door to the one generation path: prompts go in, requests come out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import mlx.core as mx

from qwenvl_mlx.engine.events import Event, Reply
from qwenvl_mlx.engine.loop import Loop
from qwenvl_mlx.engine.options import EngineOptions, GenerationOptions
from qwenvl_mlx.engine.request import Listener, Request
from qwenvl_mlx.errors import Busy, GenerationError, PromptError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.processor.base import MediaOptions, Message, Processor

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
        self._loop = Loop(model, processor, self.options, self.context_length)
        self._thread = threading.Thread(target=self._loop.run, name="qwenvl-engine", daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    def prompt(
        self,
        question: Question,
        *,
        media: MediaOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Messages, or a plain question, as a Prompt; a Prompt passes as it is."""
        if isinstance(question, Prompt):
            return question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self.processor(messages, tools=tools, options=media, template=template)

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
        """Queue a request and return at once. Raises ``PromptError``, ``MediaError``, ``Busy``.

        ``media``, ``tools`` and ``template`` are for the processor; ``listener`` see ``Request``.
        """
        prompt = self.prompt(question, media=media, tools=tools, template=template)
        self._check(prompt)
        request = Request(prompt, options or GenerationOptions(), listener)
        with self._lock:
            if self._closed or self._loop.fault:
                raise GenerationError("the engine is closed: make a new one")
            if self._loop.waiting >= self.options.max_queue:
                raise Busy(f"{self.options.max_queue} requests are waiting: try again later")
            if not self._thread.ident:
                self._thread.start()
            self._loop.put(request)
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
        return not self._closed and self._loop.fault is None

    @property
    def waiting(self) -> int:
        """Requests that nobody has looked at yet."""
        return self._loop.waiting

    @property
    def running(self) -> int:
        """Requests that are being read or answered."""
        return self._loop.running

    def close(self) -> None:
        """End the engine after the step that it is in; requests under way fail with ``GenerationError``."""
        with self._lock:
            self._closed = True
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
