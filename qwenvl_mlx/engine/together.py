"""Short prompts that wait at the same time, read as one: products of many rows take hardly longer than those of few."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from qwenvl_mlx.engine.pace import Paces
from qwenvl_mlx.engine.prefill import Prefill
from qwenvl_mlx.engine.prefix_cache import shared_length
from qwenvl_mlx.layers.batch import text_batch
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models.base import VisionLanguageModel


class Together:
    """Prompts of text that are read in one slice.

    ``paces``: how many tokens that may have, padding included. ``remembers``: whether one prompt's state will be there
    for the next one.
    """

    def __init__(self, model: VisionLanguageModel, paces: Paces, *, remembers: bool) -> None:
        self.prefills: list[Prefill] = []
        self._model = model
        self._paces = paces
        self._remembers = remembers

    def __len__(self) -> int:
        return len(self.prefills)

    def takes(self, prefill: Prefill) -> bool:
        """Whether it may join, and gains by it; it has been looked up. ``PromptError`` for a token that is none."""
        self._model.token_array(prefill.ids.tolist())
        longest = max([prefill.left, *(one.left for one in self.prefills)])
        return (
            not (self._model.sharded or prefill.sequence.request.prompt.media)
            and prefill.rope_key == 1
            and all(layer.is_trimmable() and hasattr(layer, "merge") for layer in prefill.cache)
            and longest * (len(self) + 1) <= self._paces.most_tokens()
            and not (self._remembers and any(_follows(prefill, one) for one in self.prefills))
        )

    def padding(self, joining: Prefill) -> int:
        """Tokens of padding in their cache, if this one joins."""
        lengths = [len(one.ids) for one in (*self.prefills, joining)]
        return len(lengths) * max(lengths) - sum(lengths)

    def read(self) -> None:
        """Bring all prompts into their caches; afterwards each has ``logits``."""
        caches, ids = [], []
        length = max(one.left for one in self.prefills)
        for one in self.prefills:
            # where others are padded, this one reads some of what it knows once more
            known = max(len(one.ids) - length, 0)
            one.cache.trim(one.sequence.cached_tokens - known)
            one.sequence.cached_tokens = known
            caches.append(one.cache)
            ids.append(one.ids[known:].tolist())
        started = time.perf_counter()
        logits, cache = read_together(self._model, ids, caches)
        now = time.perf_counter()
        self._paces.tokens.learn(length * len(self), now - started)
        for row, one in enumerate(self.prefills):
            one.cache, one.logits = cache.extract(row), logits[row, -1]
            one.sequence.prefilled = now


def read_together(
    model: VisionLanguageModel, ids: Sequence[Sequence[int]], caches: Sequence[Cache]
) -> tuple[mx.array, Cache]:
    """Texts ``ids[i]`` after what ``caches[i]`` holds -> logits of their ends ``[B, 1, vocab]``, and a batch's cache.

    Only what follows an empty cache may be shorter than the longest.
    """
    padding = [max(map(len, ids)) - len(row) for row in ids]
    cache = text_batch(caches, padding)
    rows = [[0] * width + list(row) for row, width in zip(ids, padding, strict=True)]
    logits = model.decode(mx.array(rows, mx.int32), cache, last_only=True)
    cache.share_offset()
    mx.eval(cache.arrays, logits)
    return logits, cache


def _follows(prefill: Prefill, other: Prefill) -> bool:
    """Whether most of what it has to read will be known when the other one has been read."""
    return 2 * (shared_length(prefill.ids, other.ids) - prefill.sequence.cached_tokens) > prefill.left
