"""One sequence's (or one batch's) state: mlx-lm's KV caches with the little that rotary positions need besides.

The state travels with the sequence, never on the model: two requests can't see each other's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from qwenvl_mlx.layers.mlx_lm import leaf

kv = leaf("models.cache")


class FixedKV:
    """One layer's keys and values in one buffer whose shape stays, as a compiled step needs it.

    ``rows``: ``[1, 2 * kv heads, capacity, size]``, keys before values. ``offset``: int32 ``[1]``, the tokens in it
    before the step; it is the step that counts.
    """

    def __init__(self, rows: mx.array, offset: mx.array) -> None:
        self.rows, self.offset = rows, offset

    @property
    def capacity(self) -> int:
        """Tokens that find room."""
        return self.rows.shape[2]

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """What ``length`` new tokens see, bool ``[1, 1, length, capacity]``."""
        last = self.offset + mx.arange(length)
        return (mx.arange(self.capacity) <= last[:, None])[None, None]

    def write(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Put ``[1, 2 * kv heads, length, size]`` behind what is there; all keys and all values."""
        self.rows = mx.slice_update(self.rows, rows, self.offset, axes=[2])
        keys, values = mx.split(self.rows, 2, axis=1)
        return keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """``write`` for those who have them apart, at the price of a copy."""
        return self.write(mx.concatenate([keys, values], axis=1))


class Cache(list[Any]):
    """A list of mlx-lm's layer caches, plus the rope state of its rows.

    ``rope_delta``: next position of a row = number of its cached tokens + its delta; int32 ``[B]``.
    ``ntk_alpha``: the original Qwen-VL's frozen dynamic-NTK factor of each row; 1.0 elsewhere.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        rope_delta: mx.array | None = None,
        ntk_alpha: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__(layers)
        self.rope_delta = mx.zeros((len(ntk_alpha),), mx.int32) if rope_delta is None else rope_delta
        self.ntk_alpha = ntk_alpha

    @property
    def attention(self) -> Any:
        """The first layer cache that counts tokens (a hybrid model's first layers may be recurrent)."""
        return next(layer for layer in self if hasattr(layer, "offset"))

    @property
    def offset(self) -> int | mx.array:
        """Tokens cached so far: int for one sequence, int32 ``[B]`` for a batch."""
        return self.attention.offset  # type: ignore[no-any-return]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached (again, after ``trim``)."""
        first = self.attention
        return first.empty() or (isinstance(first.offset, int) and first.offset == 0)

    @property
    def next_position(self) -> mx.array:
        """Rotary position of the next token, ``[B]`` (all three axes agree in text)."""
        return self.offset + self.rope_delta

    @property
    def rows(self) -> int:
        return len(self.ntk_alpha)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array of the state, to be evaluated together."""
        found = [self.rope_delta]
        for layer in self:
            state = layer.state if not layer.empty() else ()
            found += _flatten(state)
        return found

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self if not layer.empty())

    @property
    def trimmable(self) -> bool:
        return all(layer.is_trimmable() for layer in self)

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens of every row."""
        for layer in self:
            layer.trim(count)

    def share_offset(self) -> None:
        """Let all layers of a batch hold the first one's count of tokens.

        Each counts for itself, but only the first count is ever computed: the others would be sums that grow by one
        term with every token.
        """
        offset = self.offset
        for layer in self:
            if hasattr(layer, "offset"):
                layer.offset = offset

    @classmethod
    def merge(cls, caches: Sequence[Cache]) -> Cache:
        """Join single sequences into a left-padded batch."""
        layers = [column[0].merge(list(column)) for column in zip(*caches, strict=True)]
        delta = mx.concatenate([cache.rope_delta for cache in caches])
        return cls(layers, delta, tuple(alpha for cache in caches for alpha in cache.ntk_alpha))

    def extend(self, other: Cache) -> None:  # type: ignore[override]
        """Add the rows of another batch."""
        for mine, theirs in zip(self, other, strict=True):
            mine.extend(theirs)
        self.rope_delta = mx.concatenate([self.rope_delta, other.rope_delta])
        self.ntk_alpha += other.ntk_alpha

    def filter(self, rows: Sequence[int]) -> None:
        """Keep only these rows of a batch."""
        index = mx.array(list(rows), mx.int32)
        for layer in self:
            layer.filter(index)
        self.rope_delta = self.rope_delta[index]
        self.ntk_alpha = tuple(self.ntk_alpha[row] for row in rows)

    def extract(self, row: int) -> Cache:
        """One row of a batch as a sequence of its own."""
        layers = [layer.extract(row) for layer in self]
        return Cache(layers, self.rope_delta[row : row + 1], (self.ntk_alpha[row],))


def by_layer(cache: Sequence[Any] | None, counts: Iterable[int]) -> list[list[Any]]:
    """The caches of each layer, ``counts`` of them; None in their place where there is no cache.

    ``ValueError`` for a cache that was made for other layers.
    """
    counts = list(counts)
    if cache is not None and len(cache) != sum(counts):
        raise ValueError(
            f"a cache of {len(cache)} layers does not fit {sum(counts)}: make it with this model"
        )
    each = iter(cache) if cache is not None else itertools.repeat(None)
    return [list(itertools.islice(each, count)) for count in counts]


def _flatten(state: Any) -> list[mx.array]:
    if isinstance(state, mx.array):
        return [state]
    if isinstance(state, (list, tuple)):
        return [array for item in state for array in _flatten(item)]
    return []
