"""Choose the next token of one request.

The order is that of transformers: repetition penalty over prompt and answer, bias, the penalties of the OpenAI API
over the answer, then temperature, top-k, top-p and min-p. mlx-lm's samplers cut by top-p before the temperature and
look only at the last twenty tokens, and draw from one generator for all rows: so the few lines are here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.processor.base import GenerationDefaults

NEVER = -float("inf")
COLDEST = 1e-5  # below, dividing by the temperature overflows; the likeliest token is what is meant


@dataclass(frozen=True)
class Warpers:
    """How logits become a distribution; the neutral values change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, options: GenerationOptions, defaults: GenerationDefaults) -> Warpers:
        """The request's values, else the checkpoint's, else greedy."""
        temperature = _first(options.temperature, defaults.temperature, 0.0)
        top_k = _first(options.top_k, defaults.top_k, 0)
        top_p = _first(options.top_p, defaults.top_p, 1.0)
        return cls(
            temperature if temperature >= COLDEST else 0.0, max(int(top_k), 0), top_p, options.min_p or 0.0
        )

    def __call__(self, logits: mx.array) -> mx.array:
        """``[vocab]`` -> logits of the distribution to draw from, ``-inf`` for what is cut off."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.size:
            weakest = mx.min(mx.topk(logits, self.top_k))
            logits = mx.where(logits < weakest, NEVER, logits)
        if self.top_p < 1:
            logits = _top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = mx.where(logits < mx.max(logits) + math.log(self.min_p), NEVER, logits)
        return logits


def _top_p(logits: mx.array, top_p: float) -> mx.array:
    """Keep the fewest best tokens whose mass reaches ``top_p``, at least one."""
    order = mx.argsort(-logits)
    probabilities = mx.softmax(logits, precise=True)[order]
    mass_before = mx.cumsum(probabilities) - probabilities
    dropped = (mass_before >= top_p) & (mx.arange(logits.size) > 0)
    return mx.put_along_axis(logits, order, mx.where(dropped, NEVER, logits[order]), axis=0)


class Sampler:
    """The state of one request's sampling: what was said so far, and a generator of its own."""

    def __init__(
        self, options: GenerationOptions, defaults: GenerationDefaults, prompt_ids: Sequence[int], vocab: int
    ) -> None:
        self.warpers = Warpers.of(options, defaults)
        # Who asks for temperature 0 wants the likeliest token, not the penalty of the checkpoint's sampling recipe.
        usual = None if options.temperature == 0 else defaults.repetition_penalty
        self._repetition = _first(options.repetition_penalty, usual, 1.0)
        self._presence = options.presence_penalty or 0.0
        self._frequency = options.frequency_penalty or 0.0
        self._bias = _bias(options, vocab)
        self._key = mx.random.key(secrets.randbits(63) if options.seed is None else options.seed % 2**64)
        self._seen = self._counts = None
        if self._repetition != 1:
            self._seen = mx.zeros((vocab,), mx.bool_)
            if prompt_ids:
                self._seen[mx.array(sorted(set(prompt_ids)))] = True
        if self._presence or self._frequency:
            self._counts = mx.zeros((vocab,), mx.int32)
        self._guide = options.constraint() if options.constraint else None
        self._last: mx.array | None = None

    @property
    def greedy(self) -> bool:
        return self.warpers.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest logit and nothing else: such rows can be chosen together."""
        changes = (self._seen, self._counts, self._bias, self._guide)
        return self.greedy and all(change is None for change in changes)

    def penalised(self, logits: mx.array) -> mx.array:
        """``[vocab]`` float32 -> the same after penalties and bias."""
        if self._seen is not None:
            punished = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(self._seen, punished, logits)
        if self._bias is not None:
            logits = logits + self._bias
        if self._counts is not None:
            logits = logits - self._frequency * self._counts - self._presence * (self._counts > 0)
        return self._guided(logits)

    def _guided(self, logits: mx.array) -> mx.array:
        """Only what the grammar allows; it must know the token before, so the step that makes that is waited for."""
        if self._guide is None:
            return logits
        if self._last is not None:
            self._guide.accept(int(self._last.item()))  # type: ignore[arg-type]
        allowed = mx.array(self._guide.allowed()[: logits.size])
        return mx.where(allowed, logits, NEVER)

    def __call__(self, logits: mx.array) -> mx.array:
        """``[vocab]`` -> the next token ``[]``, lazily, and remember it."""
        logits = self.penalised(logits.astype(mx.float32))
        if self.greedy:
            token = mx.argmax(logits)
        else:
            self._key, key = mx.random.split(self._key)
            token = mx.random.categorical(self.warpers(logits), key=key)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)
        if self._guide is not None:
            self._last = token
        return token.astype(mx.int32)


def _bias(options: GenerationOptions, vocab: int) -> mx.array | None:
    known = {token: value for token, value in options.logit_bias.items() if 0 <= token < vocab}
    if not known:
        return None
    return mx.zeros((vocab,)).at[mx.array(list(known))].add(mx.array(list(known.values())))


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
