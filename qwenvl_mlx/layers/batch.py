"""Several prompts in one forward pass: rows padded on the left, so that all end together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from qwenvl_mlx.layers.cache import Cache, kv
from qwenvl_mlx.media import Embedded


def left_pad(rows: Sequence[Embedded], empty: Cache) -> tuple[Embedded, Cache]:
    """Single prompts -> one batch, and an empty cache that knows its padding.

    ``empty``: a cache of ``model.make_cache()``, as a pattern of the layers. Logits of padding mean nothing; those of
    tokens are the ones of the single rows.
    """
    lengths = [len(row) for row in rows]
    padding = [max(lengths) - length for length in lengths]
    embeddings = [_pad(row.embeddings, width, axis=1) for row, width in zip(rows, padding, strict=True)]
    positions = [_pad(row.positions, width, axis=-1) for row, width in zip(rows, padding, strict=True)]
    delta = mx.array([int(row.rope_delta) for row in rows], mx.int32)
    batch = Embedded(
        embeddings=mx.concatenate(embeddings),
        positions=mx.stack(positions, axis=1),  # [3, B, L]
        rope_delta=delta,
        deepstack=_taps(rows, padding),
        prompt_length=max(lengths),
    )
    return batch, empty_batch(empty, padding)


def empty_batch(pattern: Cache, padding: Sequence[int]) -> Cache:
    """An empty cache for rows with so much padding on the left."""
    layers = [
        kv.BatchKVCache(list(padding))
        if hasattr(layer, "offset")
        else kv.ArraysCache(len(layer.cache), list(padding))
        for layer in pattern
    ]
    return Cache(layers, mx.zeros((len(padding),), mx.int32), (1.0,) * len(padding))


def text_batch(caches: Sequence[Cache], padding: Sequence[int]) -> Cache:
    """Single caches as one batch, to be followed by texts with so much padding on the left: none where a cache holds
    tokens, or ``ValueError``.

    Nothing but text may follow, and all rows must have an NTK factor of 1.
    """
    if any(width and not cache.is_empty for width, cache in zip(padding, caches, strict=True)):
        raise ValueError("no padding may come between what a cache holds and what follows")
    layers = Cache.merge(caches)
    width = mx.array(list(padding), mx.int32)
    for layer in layers:
        layer.offset, layer.left_padding = layer.offset - width, layer.left_padding + width
    return Cache(layers, mx.zeros((len(padding),), mx.int32), (1.0,) * len(padding))


def _pad(x: mx.array, width: int, *, axis: int) -> mx.array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (width, 0)
    return mx.pad(x, widths)


def _taps(rows: Sequence[Embedded], padding: Sequence[int]) -> tuple[mx.array, ...]:
    """DeepStack of each row; a row without pictures adds nothing."""
    count = max(len(row.deepstack) for row in rows)
    return tuple(
        mx.concatenate(
            [
                _pad(row.deepstack[tap] if row.deepstack else mx.zeros_like(row.embeddings), width, axis=1)
                for row, width in zip(rows, padding, strict=True)
            ]
        )
        for tap in range(count)
    )
