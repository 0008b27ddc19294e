"""The decode step of a single answer, compiled: the host replays a graph instead of building it anew for every token.

A compiled graph has fixed shapes. So keys and values stand in buffers longer than what they hold, the place to write
to is an array, and a mask hides the rest. When a buffer is full it grows, and the graph is compiled once more.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qwenvl_mlx.layers.cache import Cache, FixedKV, kv
from qwenvl_mlx.models.base import VisionLanguageModel

STEP = 256  # tokens by which buffers grow, as mlx-lm's do; an eighth of what long ones hold

# Of each layer: {"rows": …} of keys and values, or {"arrays": […]} of a recurrence.
State = list[dict[str, Any]]


def capacity(length: int) -> int:
    """Tokens of a buffer that is to hold ``length`` and some more: of few different sizes, and never much too long."""
    step = max(STEP, 1 << max(length.bit_length() - 4, 0))
    return (length // step + 1) * step


class CompiledStep:
    """``model.decode`` for sequences that decode alone; compiled once for each size of their buffers."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.compiled = mx.compile(self.run)

    def suits(self, cache: Cache) -> bool:
        """Whether this is one sequence whose layers are of kinds known here: not quantised, not split over machines."""
        kinds = all(type(layer) in (kv.KVCache, kv.ArraysCache) and not layer.empty() for layer in cache)
        return kinds and cache.rows == 1 and not self._model.sharded

    def run(
        self, tokens: mx.array, offset: mx.array, state: State, rope_delta: mx.array, ntk_alpha: float
    ) -> tuple[mx.array, mx.array, State]:
        """Tokens ``[1, L]`` at ``offset`` -> logits ``[1, L, vocab]``, the next offset and state."""
        cache = Cache((_layer(part, offset) for part in state), rope_delta, (ntk_alpha,))
        logits = self._model.decode(tokens, cache)
        return logits, offset + tokens.shape[1], [_part(layer) for layer in cache]


class Decoding:
    """One sequence while it decodes alone."""

    def __init__(self, step: CompiledStep, cache: Cache) -> None:
        """``cache`` is emptied layer by layer, so that nothing stands in memory twice."""
        self._step = step
        self._length = int(cache.offset)
        self._offset = mx.array([self._length], mx.int32)
        self._rope_delta, self._ntk_alpha = cache.rope_delta, cache.ntk_alpha[0]
        self._state: State = []
        for layer in cache:
            self._state.append(_taken(layer, self._length))
            mx.eval(self._state[-1])

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens ``[1, L]`` -> logits ``[1, L, vocab]``. A single token takes the compiled way."""
        count = tokens.shape[1]
        self._make_room(count)
        run = self._step.compiled if count == 1 else self._step.run
        inputs, self._state = self.inputs, []  # the graph alone may hold the buffers: then it writes in place
        logits, self._offset, self._state = run(tokens, *inputs)
        self._length += count
        return logits

    @property
    def inputs(self) -> tuple[mx.array, State, mx.array, float]:
        """What ``CompiledStep.run`` takes besides the tokens."""
        return self._offset, self._state, self._rope_delta, self._ntk_alpha

    def trim(self, count: int) -> None:
        """Forget the last tokens; the layers must be of the kind that can."""
        self._length -= count
        self._offset = self._offset - count

    def cache(self) -> Cache:
        """The sequence as everybody else knows it. It takes the state: this object is used up."""
        layers = [_given_back(part, self._length) for part in self._state]
        self._state = []
        return Cache(layers, self._rope_delta, (self._ntk_alpha,))

    def _make_room(self, count: int) -> None:
        for part in self._state:
            if "rows" in part and part["rows"].shape[2] < self._length + count:
                more = capacity(self._length + count) - part["rows"].shape[2]
                part["rows"] = mx.pad(part["rows"], [(0, 0), (0, 0), (0, more), (0, 0)])
                mx.eval(part["rows"])  # one layer's old buffer goes before the next one's new comes


def _layer(part: dict[str, Any], offset: mx.array) -> Any:
    if "rows" in part:
        return FixedKV(part["rows"], offset)
    return kv.ArraysCache.from_state((part["arrays"], None, None))


def _part(layer: Any) -> dict[str, Any]:
    return {"rows": layer.rows} if isinstance(layer, FixedKV) else {"arrays": layer.cache}


def _taken(layer: Any, length: int) -> dict[str, Any]:
    if not isinstance(layer, kv.KVCache):
        return {"arrays": layer.cache}
    room = capacity(length + 1)  # the cache's own spare room is taken too
    rows = mx.concatenate([layer.keys[..., :room, :], layer.values[..., :room, :]], axis=1)
    layer.keys = layer.values = None
    less = room - rows.shape[2]
    return {"rows": mx.pad(rows, [(0, 0), (0, 0), (0, less), (0, 0)]) if less else rows}


def _given_back(part: dict[str, Any], length: int) -> Any:
    if "rows" not in part:
        return kv.ArraysCache.from_state((part["arrays"], None, None))
    return kv.KVCache.from_state((*mx.split(part["rows"], 2, axis=1), length))
