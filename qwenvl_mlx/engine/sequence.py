"""One answer in the making: tokens come in, text goes out, and something says when it is enough."""

from __future__ import annotations

import time

from qwenvl_mlx.engine.events import (
    FinishEvent,
    FinishReason,
    Reply,
    TextEvent,
    Timings,
    TokenLogprob,
    Usage,
)
from qwenvl_mlx.engine.memory import picture_size
from qwenvl_mlx.engine.request import Request
from qwenvl_mlx.engine.stops import StopStrings
from qwenvl_mlx.processor.base import Processor


class Sequence:
    """The text side of one request. ``limit``: tokens it may make; ``cached_tokens`` of its prompt were known."""

    def __init__(self, request: Request, processor: Processor, limit: int) -> None:
        self.request = request
        self.limit = limit
        self.cached_tokens = 0
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.started = time.perf_counter()
        self.vision_seconds = 0.0
        self.prefilled = self.started
        self._processor = processor
        self._eos = frozenset() if request.options.ignore_eos else processor.defaults.eos_token_ids
        self._detokenizer = processor.tokenizer.detokenizer()
        self._stops = StopStrings(request.options.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._told = 0
        self._first: float | None = None

    @property
    def ids(self) -> list[int]:
        """The prompt's and the answer's tokens."""
        return self.request.prompt.input_ids + self.tokens

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token; ``finish_reason`` tells afterwards whether it was the last one."""
        if self._first is None:
            self._first = time.perf_counter()
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self._eos:
            self._finish("stop")
            return
        piece = self._stops.add(self._detokenizer.add(token))
        if self._stops.found:
            self._finish("stop", piece)
        elif len(self.tokens) >= self.limit:
            self._finish("length", piece)
        else:
            self._tell(piece)

    def cancel(self) -> None:
        """End here: the caller wants no more."""
        self._finish("cancelled")

    def _finish(self, reason: FinishReason, piece: str = "") -> None:
        if not self._stops.found:
            piece += self._stops.add(self._detokenizer.finish()) + self._stops.finish()
        self._tell(piece, last=True)
        self.finish_reason = reason
        self.request.emit(FinishEvent(self._reply(reason)))

    def _tell(self, piece: str, *, last: bool = False) -> None:
        """Send a piece with the tokens and log-probabilities since the last one."""
        fresh = self.tokens[self._told :]
        if not (piece or (last and fresh)):
            return
        self._text.append(piece)
        self.request.emit(TextEvent(piece, fresh, self._logprobs[self._told :]))
        self._told = len(self.tokens)

    def _reply(self, reason: FinishReason) -> Reply:
        text, prompt = "".join(self._text), self.request.prompt
        return Reply(
            text=text,
            tokens=self.tokens,
            finish_reason=reason,
            usage=Usage(len(prompt), len(self.tokens), self.cached_tokens),
            timings=self._timings(),
            boxes=self._processor.boxes(text, prompt),
            logprobs=self._logprobs,
            prompt_token_ids=prompt.input_ids,
            picture_sizes=[picture_size(media) for media in prompt.media],
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first or now
        prefill, decode = self.prefilled - self.started - self.vision_seconds, now - first
        fresh = len(self.request.prompt) - self.cached_tokens
        return Timings(
            queue=self.started - self.request.submitted,
            vision=self.vision_seconds,
            prefill=prefill,
            ttft=first - self.request.submitted,
            decode=decode,
            prompt_tokens_per_second=fresh / prefill if prefill > 0 else 0.0,
            tokens_per_second=(len(self.tokens) - 1) / decode if decode > 0 else 0.0,
        )
