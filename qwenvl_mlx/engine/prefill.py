"""Bring a prompt into a KV cache slice by slice, so that running answers can go on in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator

import mlx.core as mx

from qwenvl_mlx.engine.pace import Paces
from qwenvl_mlx.engine.prefix_cache import Ids, PrefixCache, content_ids
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Embedded, Features, Media
from qwenvl_mlx.models.base import Places, VisionLanguageModel


class Prefill:
    """The work on one prompt. Begins with what is known of it; ``PromptError`` when placeholders and media don't fit.

    ``paces``: how large its slices are. ``turn``: the token that opens a turn, if there is one.
    After ``run`` has ended, ``cache`` holds the prompt and ``logits`` ``[vocab]`` are those of its end.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        new_cache: Callable[[], Cache],
        memory: PrefixCache,
        sequence: Sequence,
        *,
        paces: Paces,
        turn: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.logits: mx.array
        self.rope_key = model.rope_key(len(sequence.request.prompt))
        self.ids: Ids = content_ids(model, sequence.request.prompt)
        known = memory.take(self.ids, self.rope_key)
        self.cache, sequence.cached_tokens = known or (new_cache(), 0)
        self._model = model
        self._memory = memory
        self._paces = paces
        self._turn = turn

    @property
    def left(self) -> int:
        """Tokens that are to be read."""
        return len(self.ids) - self.sequence.cached_tokens

    def run(self) -> Iterator[None]:
        """Yields after each slice: some blocks of the vision tower, or some tokens."""
        prompt, known = self.sequence.request.prompt, self.sequence.cached_tokens
        places = self._model.media_places(prompt.input_ids, prompt.media)
        features: list[Features | None] = []
        for media, place in zip(prompt.media, places, strict=True):
            needed = place.size and place[-1] >= known
            features.append((yield from self._features(media)) if needed else None)
        embedded = self._model.embed(prompt.input_ids, features, prompt.media)
        remembers = self._memory.budget > 0 and not self.cache.trimmable
        marks = self._marks(places) if remembers else []
        yield from self._read(embedded, known, marks)
        self.sequence.prefilled = time.perf_counter()

    def _read(self, embedded: Embedded, begin: int, marks: list[int]) -> Iterator[None]:
        """Run the decoder over the tokens from ``begin`` on; a mark is always the end of a slice."""
        length = len(self.ids)
        while begin < length:
            started = time.perf_counter()
            edge = next((mark for mark in marks if mark > begin), length)
            end = begin + self._paces.next_tokens(edge - begin)
            logits = self._model(embedded.slice(begin, end), self.cache, last_only=True)
            mx.eval(self.cache.arrays, *([logits] if end == length else []))
            self._paces.tokens.learn(end - begin, time.perf_counter() - started)
            if end in marks:
                self._memory.put(self.ids[:end], self.rope_key, self.cache)
            yield  # after the last one too: joining the running answers takes a moment of its own
            begin = end
        self.logits = logits[0, -1]

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
        patches = math.prod(media.grid)
        stages, done, started = self._model.encode_stages(media), 0, time.perf_counter()
        while True:
            try:
                hidden = next(stages)
            except StopIteration as end:
                features: Features = end.value
                mx.eval(features.embeddings, *features.deepstack)
                return features
            done += 1
            if done >= self._paces.next_blocks(patches):
                mx.eval(hidden)
                self._paces.patches.learn(done * patches, time.perf_counter() - started)
                yield
                done, started = 0, time.perf_counter()

    def _marks(self, places: list[Places]) -> list[int]:
        """Where later prompts are likely to part from this one: a state that can't be cut is kept there.

        After each media item, after the first turn (instructions that many share) and before the answer's.
        """
        turns = (self.ids == self._turn).nonzero()[0]
        ends = [int(place[-1]) + 1 for place in places if place.size]
        return sorted({*ends, *turns[1:2].tolist(), *turns[-1:].tolist()} - {0})
