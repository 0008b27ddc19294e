"""Attention: MLX's fused kernel on a GPU; on a CPU, where MLX has none, piece by piece.

A piece's scores stay in the processor's cache, and those of a large picture never fill the memory. Feed-forward layers
of many patches gain in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from qwenvl_mlx.layers.exponential import exp, exp_pays
from qwenvl_mlx.layers.mlx_lm import leaf

mlx_lm = leaf("models.base")

PIECE = 1 << 17  # scores of one piece: half a megabyte
FEW = 32  # queries that are worth a product of their own
NEVER = -1e9  # a score that gives no weight

ROWS = 256  # of a feed-forward layer at once

Mask = mx.array | str | None


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask = None) -> mx.array:
    """``q`` ``[B, heads, L, size]``, ``k``, ``v`` ``[B, kv heads, S, size]`` -> ``[B, heads, L, size]``.

    ``mask``: None, "causal" (the last query sees all keys), or bool that broadcasts to ``[B, heads, L, S]``.
    """
    if mx.default_device() == mx.gpu or q.shape[2] == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    batch, heads, length, size = q.shape
    groups, dtype = k.shape[1], q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))  # products of half types are slow here
    k, v = mx.contiguous(k), mx.contiguous(v)  # else every piece would copy its part of them
    q = (q * scale).reshape(batch, groups, heads // groups, length, size)
    out = _Pieces().attend(q, k, v, _per_group(mask, groups))
    return out.reshape(batch, heads, length, -1).astype(dtype)


def attend_cached(
    q: mx.array, k: mx.array, v: mx.array, cache: Any | None, *, scale: float, mask: Mask
) -> mx.array:
    """``attend`` to what ``cache`` gave back, which may be quantised."""
    if hasattr(cache, "bits"):
        return mlx_lm.scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)  # type: ignore[no-any-return]
    return attend(q, k, v, scale=scale, mask=mask)


def by_rows(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """``function(x)``; on a CPU a few rows ``[n, …]`` at a time, one after the other."""
    if mx.default_device() == mx.gpu or len(x) <= ROWS:
        return function(x)
    parts: list[mx.array] = []
    for rows in mx.split(x, _even(len(x), ROWS)):
        parts.append(function(mx.depends([rows], parts[-1:])[0] if parts else rows))
    return mx.concatenate(parts)


def _even(count: int, most: int) -> list[int]:
    """Where to cut ``count`` rows into the fewest parts of ``most`` rows, all of nearly one length."""
    parts = -(-count // most)
    return [count * part // parts for part in range(1, parts)]


def _per_group(mask: Mask, groups: int) -> Mask:
    """``[B, heads, L, S]`` -> ``[B, kv heads, heads a kv head, L, S]``."""
    if not isinstance(mask, mx.array):
        return mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mask[:, :, None] if mask.shape[1] == 1 else mx.unflatten(mask, 1, (groups, -1))


@partial(mx.compile, shapeless=True)
def _masked(scores: mx.array, seen: mx.array) -> mx.array:
    return mx.where(seen, scores, NEVER)


class _Pieces:
    """Computes pieces one after the other: each waits for the one before, so that few are alive at once."""

    def __init__(self) -> None:
        self._last: mx.array | None = None

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        """``q`` ``[B, kv heads, heads a kv head, L, size]`` -> the same."""
        scores = q.size // q.shape[-1] * k.shape[2]
        axis = next((axis for axis in range(4) if q.shape[axis] > 1), 3)
        if isinstance(mask, str) and q.shape[3] * PIECE // scores >= FEW:
            axis = 3  # the earlier queries of all heads see fewer keys
        count = q.shape[axis]
        step = max(count * PIECE // scores, 1)
        if step >= count:
            return self._whole(q, k, v, mask)
        parts = []
        for at in range(0, count, step):
            end = min(at + step, count)
            piece = q[(slice(None),) * axis + (slice(at, end),)]
            keys, values = (x[(slice(None),) * axis + (slice(at, end),)] if axis < 2 else x for x in (k, v))
            part = mask
            if isinstance(mask, mx.array):
                part = mask[(slice(None),) * axis + (slice(at, end),)] if mask.shape[axis] > 1 else mask
            elif mask is not None and axis == 3:  # causal: what none of these queries sees is left out
                seen = k.shape[2] - count + end
                keys, values = k[:, :, :seen], v[:, :, :seen]
            parts.append(self.attend(piece, keys, values, part))
        return mx.concatenate(parts, axis=axis)

    def _whole(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        if self._last is not None:
            q = mx.depends([q], [self._last])[0]
        batch, groups, each, length, size = q.shape
        keys = k.shape[2]
        # a row for each key: the greatest of a column is found five times as fast as that of a row
        scores = k @ q.reshape(batch, groups, each * length, size).swapaxes(-1, -2)
        if mask is not None:
            if isinstance(mask, str):
                seen = mx.arange(keys)[:, None, None] <= mx.arange(keys - length, keys)
            else:
                seen = mask.reshape((1,) * (5 - mask.ndim) + mask.shape).transpose(0, 1, 4, 2, 3)
            scores = _masked(mx.unflatten(scores, -1, (each, length)), seen).flatten(-2)
        weights = scores - mx.max(scores, axis=-2, keepdims=True)
        weights = exp(weights) if exp_pays(weights) else mx.exp(weights)
        total = mx.sum(weights, axis=-2)
        out = (weights.swapaxes(-1, -2) @ v) / total[..., None]
        self._last = out.reshape(batch, groups, each, length, -1)
        return self._last
