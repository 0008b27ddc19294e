"""Short prompts that wait at the same time, read as one: products of many rows take hardly longer than those of few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from qwenvl_mlx.engine.memory import MemoryPlan
from qwenvl_mlx.engine.pace import Paces
from qwenvl_mlx.engine.prefill import Prefill
from qwenvl_mlx.engine.prefix_cache import shared_length
from qwenvl_mlx.layers.batch import text_batch
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models.base import VisionLanguageModel


class Together:
    """Says which prompts are read as one, and reads them in one slice.

    ``remembers``: whether the state of one prompt will be known when the next one is read.
    """

    def __init__(
        self, model: VisionLanguageModel, paces: Paces, plan: MemoryPlan, *, remembers: bool
    ) -> None:
        self._model = model
        self._paces = paces
        self._plan = plan
        self._remembers = remembers

    def suits(self, prefill: Prefill) -> bool:
        """Whether it is one whose rows may be padded: text, in caches that can be joined and cut."""
        return (
            not (self._model.sharded or prefill.sequence.request.prompt.media)
            and prefill.rope_key == 1
            and all(layer.is_trimmable() and hasattr(layer, "merge") for layer in prefill.cache)
        )

    def gains(self, group: Sequence[Prefill], prefill: Prefill, taken: int) -> bool:
        """Whether ``prefill`` is better read as one with ``group``, where ``taken`` bytes are planned with it.

        All must fit a slice, their caches must be small enough to copy, and none better waits for another.
        """
        everyone = (*group, prefill)
        fresh, whole = (len(everyone) * max(each) for each in zip(*map(_lengths, everyone), strict=True))
        return (
            self.suits(prefill)
            and fresh <= self._paces.most_tokens()
            and self._plan.allows_copies(whole, taken)
            and not (self._remembers and any(_follows(prefill, one) for one in group))
        )

    def run(self, group: Sequence[Prefill]) -> Iterator[None]:
        """As ``Prefill.run`` for all of them."""
        started = time.perf_counter()
        caches, ids = [], []
        length = max(one.left for one in group)
        for one in group:
            self._model.token_array(one.ids.tolist())
            # where others are padded, this one reads some of what it knows once more
            known = max(len(one.ids) - length, 0)
            one.cache.trim(one.sequence.cached_tokens - known)
            one.sequence.cached_tokens = known
            caches.append(one.cache)
            ids.append(one.ids[known:].tolist())
        logits, cache = read_together(self._model, ids, caches)
        now = time.perf_counter()
        self._paces.tokens.learn(length * len(group), now - started)
        for row, one in enumerate(group):
            one.cache, one.logits = cache.extract(row), logits[row, -1]
            one.sequence.prefilled = now
        yield


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


def _lengths(prefill: Prefill) -> tuple[int, int]:
    return prefill.left, len(prefill.ids)


def _follows(prefill: Prefill, other: Prefill) -> bool:
    """Whether most of what it has to read will be known when the other one has been read."""
    return 2 * (shared_length(prefill.ids, other.ids) - prefill.sequence.cached_tokens) > prefill.left
