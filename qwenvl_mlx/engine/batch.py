"""Answers that are decoded together, one token each per step."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from qwenvl_mlx.engine.events import TokenLogprob
from qwenvl_mlx.engine.lookup import Lookup
from qwenvl_mlx.engine.prefix_cache import Ids
from qwenvl_mlx.engine.sampling import Sampler
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.engine.step import CompiledStep, Decoding
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models.base import VisionLanguageModel


@dataclass(eq=False)
class Row:
    """One answer's place in the batch. ``fed``: how many of the answer's tokens are in the cache.

    ``prompt_ids`` and ``rope_key``: under which its state will be remembered. ``lookup``: guesses its next tokens.
    """

    sequence: Sequence
    sampler: Sampler
    prompt_ids: Ids
    rope_key: float
    lookup: Lookup | None = None
    fed: int = 0
    pending: Logprobs | None = None

    @property
    def length(self) -> int:
        """Tokens in its cache."""
        return len(self.prompt_ids) + self.fed

    @property
    def wants_more(self) -> bool:
        """Whether it will go on after the token that is being computed, unless that ends it."""
        return len(self.sequence.tokens) + 1 < self.sequence.limit


class Batch:
    """Rows over one cache: of one sequence while there is one row, left-padded as soon as there are more. A row that is
    alone takes compiled steps after its first token.

    Each step starts the next token's computation before it looks at the one before: the device never waits for
    Python. So a row that ends has computed one token too many, which nobody sees.
    """

    def __init__(self, model: VisionLanguageModel, step: CompiledStep) -> None:
        self.rows: list[Row] = []
        self._model, self._step = model, step
        self._cache: Cache | Decoding | None = None
        self._tokens: mx.array | None = None  # [rows]: chosen, but not looked at yet

    def __len__(self) -> int:
        return len(self.rows)

    def takes(self, cache: Cache) -> bool:
        """Whether a row with such a cache can join: mlx-lm has no batches of quantised ones."""
        return not self.rows or all(hasattr(layer, "merge") for layer in cache)

    def padding(self, *joining: int) -> int:
        """Tokens of padding in the cache; ``joining``: as if sequences of these lengths were there too."""
        lengths = [row.length for row in self.rows] + list(joining)
        return len(lengths) * max(lengths, default=0) - sum(lengths)

    def add(self, row: Row, cache: Cache, logits: mx.array) -> None:
        """Let a row join after its prefill; ``logits`` ``[vocab]`` give its first token."""
        first = self._choose([row], logits[None])
        if self._cache is None or self._tokens is None:
            self._cache, self._tokens = cache, first
        else:
            together = self._settled() if len(self.rows) > 1 else Cache.merge([self._settled()])
            together.extend(Cache.merge([cache]))
            self._cache, self._tokens = together, mx.concatenate([self._tokens, first])
        self.rows.append(row)
        mx.async_eval(self._tokens)

    def step(self) -> list[tuple[Row, Cache]]:
        """One token for every row. Gives back the rows that have ended, with their caches."""
        ended = self._drop([row for row in self.rows if self._cancel(row)])
        if self._tokens is None:
            return ended
        if len(self.rows) == 1 and self._leap(self.rows[0]):
            return ended + self._drop([row for row in self.rows if row.sequence.finish_reason])
        tokens, pending = self._tokens, [row.pending for row in self.rows]
        if any(row.wants_more for row in self.rows):
            self._tokens = self._launch(tokens)
        for row, token, logprobs in zip(self.rows, integers(tokens), pending, strict=True):
            row.sequence.accept(token, logprobs.read(token) if logprobs else None)
            if row.lookup:
                row.lookup.extend([token])
        return ended + self._drop([row for row in self.rows if row.sequence.finish_reason])

    def clear(self) -> None:
        """Forget all rows."""
        self.rows, self._cache, self._tokens = [], None, None

    def _leap(self, row: Row) -> bool:
        """Several tokens in one step, if they can be guessed; False leaves everything as it was."""
        if row.lookup is None or self._cache is None or self._tokens is None:
            return False
        room = row.sequence.limit - len(row.sequence.tokens) - 1
        guess = row.lookup.guess()[:room]
        if len(guess) < 2:
            return False
        if integers(self._tokens)[0] != guess[0]:
            row.lookup.judge(right=0, guessed=len(guess))
            return False
        logits = self._decode(mx.array([guess]))[0]
        chosen = integers(mx.argmax(logits, axis=-1))  # what follows each token of the guess
        right = next((i for i in range(1, len(guess)) if guess[i] != chosen[i - 1]), len(guess))
        row.lookup.judge(right=right, guessed=len(guess))
        said = 0
        for token in guess[:right]:
            row.sequence.accept(token)
            row.lookup.extend([token])
            said += 1
            if row.sequence.finish_reason:
                break
        row.fed += said
        self._cache.trim(len(guess) - said)
        self._tokens = mx.array([chosen[right - 1]], mx.int32)
        return True

    def _launch(self, tokens: mx.array) -> mx.array:
        logits = self._decode(tokens[:, None])[:, -1]  # [rows, vocab]
        chosen = self._choose(self.rows, logits)
        for row in self.rows:
            row.fed += 1
        mx.async_eval(chosen, *(array for row in self.rows if row.pending for array in row.pending.arrays))
        return chosen

    def _decode(self, tokens: mx.array) -> mx.array:
        """``[rows, L]`` -> logits ``[rows, L, vocab]``."""
        if isinstance(self._cache, Cache) and self.rows[0].fed and self._step.suits(self._cache):
            self._cache = Decoding(self._step, self._cache)
        if isinstance(self._cache, Decoding):
            return self._cache(tokens)
        assert self._cache is not None
        logits = self._model.decode(tokens, self._cache)
        self._cache.share_offset()
        return logits

    def _settled(self) -> Cache:
        """The cache, no longer in the form of compiled steps."""
        if isinstance(self._cache, Decoding):
            self._cache = self._cache.cache()
        assert self._cache is not None
        return self._cache

    def _choose(self, rows: list[Row], logits: mx.array) -> mx.array:
        """``[rows, vocab]`` -> ``[rows]``, each by its own sampler."""
        if all(row.sampler.plain for row in rows):
            tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
        else:
            tokens = mx.stack([row.sampler(logits[i]) for i, row in enumerate(rows)])
        for i, row in enumerate(rows):
            count = row.sequence.request.options.logprobs
            row.pending = None if count is None else Logprobs.of(logits[i], tokens[i], count)
        return tokens

    def _cancel(self, row: Row) -> bool:
        if row.sequence.request.cancelled:
            row.sequence.cancel()
        return row.sequence.finish_reason is not None

    def _drop(self, rows: list[Row]) -> list[tuple[Row, Cache]]:
        if not rows or self._cache is None or self._tokens is None:
            return []
        cache = self._settled()
        if len(self.rows) == 1:
            self.clear()
            return [(rows[0], cache)]
        ended = [(row, cache.extract(self.rows.index(row))) for row in rows]
        keep = [i for i, row in enumerate(self.rows) if row not in rows]
        if not keep:
            self.clear()
            return ended
        self.rows = [self.rows[i] for i in keep]
        self._tokens = self._tokens[mx.array(keep)]
        if len(keep) == 1:
            self._cache = cache.extract(keep[0])
        else:
            cache.filter(keep)
        return ended


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities that the device is still computing."""

    chosen: mx.array
    top_ids: mx.array
    top_values: mx.array

    @classmethod
    def of(cls, logits: mx.array, token: mx.array, count: int) -> Logprobs:
        values = logits.astype(mx.float32)
        values = values - mx.logsumexp(values)
        best = mx.argsort(-values)[:count]
        return cls(values[token], best, values[best])

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.chosen, self.top_ids, self.top_values

    def read(self, token: int) -> TokenLogprob:
        values: list[float] = self.top_values.tolist()  # type: ignore[assignment]
        top = zip(integers(self.top_ids), values, strict=True)
        return TokenLogprob(token, float(self.chosen), tuple(top))


def integers(array: mx.array) -> list[int]:
    """The values of a one-dimensional array; waits for them."""
    return array.tolist()  # type: ignore[return-value]
