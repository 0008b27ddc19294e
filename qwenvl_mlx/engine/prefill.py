"""Bring a prompt into a KV cache slice by slice, so that running answers can go on in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import mlx.core as mx

from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Features
from qwenvl_mlx.models.base import VisionLanguageModel


class Prefill:
    """The work on one prompt. ``run`` yields after each slice; then ``logits`` ``[vocab]`` are those of its end."""

    def __init__(self, model: VisionLanguageModel, sequence: Sequence, cache: Cache, chunk: int) -> None:
        self.sequence = sequence
        self.cache = cache
        self.logits = mx.zeros((0,))
        self._model = model
        self._chunk = chunk

    def run(self) -> Iterator[None]:
        prompt = self.sequence.request.prompt
        features: list[Features] = []
        for media in prompt.media:
            begin = time.perf_counter()
            (item,) = self._model.encode([media])
            mx.eval(item.embeddings, *item.deepstack)
            features.append(item)
            self.sequence.vision_seconds += time.perf_counter() - begin
            yield
        embedded = self._model.embed(prompt.input_ids, features, prompt.media)
        for begin, end in self._slices(len(prompt)):
            logits = self._model(embedded.slice(begin, end), self.cache, last_only=True)
            if end < len(prompt):
                mx.eval(self.cache.arrays)
                yield
        self.logits = logits[0, -1]
        mx.eval(self.logits, self.cache.arrays)
        self.sequence.prefilled = time.perf_counter()

    def _slices(self, length: int) -> list[tuple[int, int]]:
        edges = [*range(self.sequence.cached_tokens, length, self._chunk), length]
        return list(pairwise(edges))
