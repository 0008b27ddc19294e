"""Bring a prompt into a KV cache slice by slice, so that running answers can go on in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise

import mlx.core as mx

from qwenvl_mlx.engine.prefix_cache import Ids, PrefixCache, content_ids
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Features, Media
from qwenvl_mlx.models.base import Places, VisionLanguageModel

PATCH_BLOCKS = (
    16384  # patches times blocks of the vision tower in one slice: 512 tokens of a 7B decoder cost as much
)


class Prefill:
    """The work on one prompt.

    ``chunk``: tokens of one slice. ``turn``: the token that opens a turn, if there is one.
    After ``run`` has ended, ``cache`` holds the prompt and ``logits`` ``[vocab]`` are those of its end.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        new_cache: Callable[[], Cache],
        memory: PrefixCache,
        sequence: Sequence,
        *,
        chunk: int,
        turn: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.cache: Cache
        self.logits: mx.array
        self.ids: Ids
        self.rope_key = model.rope_key(len(sequence.request.prompt))
        self._model = model
        self._new_cache = new_cache
        self._memory = memory
        self._chunk = chunk
        self._turn = turn

    def run(self) -> Iterator[None]:
        """Yields after each slice: one picture, or ``chunk`` tokens."""
        prompt = self.sequence.request.prompt
        self.ids = content_ids(self._model, prompt)
        places = self._model.media_places(prompt.input_ids, prompt.media)
        self.cache, known = self._memory.take(self.ids, self.rope_key) or (self._new_cache(), 0)
        self.sequence.cached_tokens = known
        features: list[Features | None] = []
        for media, place in zip(prompt.media, places, strict=True):
            needed = place.size and place[-1] >= known
            features.append((yield from self._features(media)) if needed else None)
        embedded = self._model.embed(prompt.input_ids, features, prompt.media)
        remembers = self._memory.budget > 0 and not self.cache.trimmable
        marks = self._marks(places) if remembers else []
        for begin, end in self._slices(known, marks):
            logits = self._model(embedded.slice(begin, end), self.cache, last_only=True)
            mx.eval(self.cache.arrays, *([logits] if end == len(prompt) else []))
            if end in marks:
                self._memory.put(self.ids[:end], self.rope_key, self.cache)
            if end < len(prompt):
                yield
        self.logits = logits[0, -1]
        self.sequence.prefilled = time.perf_counter()

    def _features(self, media: Media) -> Generator[None, None, Features]:
        features = self._memory.features(media.digest)
        if features is None:
            begin = time.perf_counter()
            features = yield from self._encode(media)
            self._memory.put_features(media.digest, features)
            self.sequence.vision_seconds += time.perf_counter() - begin
            yield
        return features

    def _encode(self, media: Media) -> Generator[None, None, Features]:
        """Run the vision tower, the larger the picture the fewer of its blocks at once."""
        patches = media.grid[0] * media.grid[1] * media.grid[2]
        at_once = max(PATCH_BLOCKS // patches, 1)
        stages, done = self._model.encode_stages(media), 0
        while True:
            try:
                hidden = next(stages)
            except StopIteration as end:
                features: Features = end.value
                mx.eval(features.embeddings, *features.deepstack)
                return features
            done += 1
            if done % at_once == 0:
                mx.eval(hidden)
                yield

    def _slices(self, known: int, marks: list[int]) -> list[tuple[int, int]]:
        """Begin and end of each slice; a mark is always an end."""
        length = len(self.ids)
        edges = {known, length} | {mark for mark in marks if known < mark < length}
        cuts = [range(begin, end, self._chunk) for begin, end in pairwise(sorted(edges))]
        return list(pairwise([*(at for cut in cuts for at in cut), length]))

    def _marks(self, places: list[Places]) -> list[int]:
        """Where later prompts are likely to part from this one: a state that can't be cut is kept there."""
        marks = {int(place[-1]) + 1 for place in places if place.size}
        turns = (self.ids == self._turn).nonzero()[0]
        return sorted(marks | ({int(turns[-1])} if len(turns) else set()) - {0})
