"""Attention: MLX's fused kernel on a GPU; on a CPU, where MLX has none, piece by piece.

A piece's scores stay in the processor's cache, and those of a large picture never fill the memory.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import mlx.core as mx

from qwenvl_mlx.layers.cores import Turns, cores, evenly
from qwenvl_mlx.layers.exponential import LOG2_E, exp2_below, exps_pay
from qwenvl_mlx.layers.mlx_lm import leaf

mlx_lm = leaf("models.base")

PIECE = 3 << 17  # scores of one piece: a megabyte and a half
KEYS = 2048  # of one piece
LEAST = 1 << 12  # scores that are worth a core of their own
FEW = 48  # queries that are worth a piece of their own
NEVER = -1e6  # a score that gives no weight

Mask = mx.array | str | None


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask = None, cached: bool = False
) -> mx.array:
    """``q`` ``[B, heads, L, size]``, ``k``, ``v`` ``[B, kv heads, S, size]`` -> ``[B, heads, L, size]``.

    ``mask``: None, "causal" (the last query sees all keys), or bool that broadcasts to ``[B, heads, L, S]``.
    ``cached``: each key and each value lies in one piece, as in a cache.
    """
    single = q.shape[2] == 1
    if mx.default_device() == mx.gpu or (single and not exps_pay(_scores(q, k), q.dtype)):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    batch, heads, length, size = q.shape
    groups, dtype = k.shape[1], q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))  # products of half types are slow here
    if not cached and not single:  # else every piece would copy its part of them
        k, v = mx.contiguous(k), mx.contiguous(v)
    q = (q * (scale * LOG2_E)).reshape(batch, groups, heads // groups, length, size)
    out = _Pieces(_scores(q, k)).attend(q, k, v, _per_group(mask, groups))
    return out.reshape(batch, heads, length, -1).astype(dtype)


def attend_cached(
    q: mx.array, k: mx.array, v: mx.array, cache: Any | None, *, scale: float, mask: Mask
) -> mx.array:
    """``attend`` to what ``cache`` gave back, which may be quantised."""
    if hasattr(cache, "bits"):
        return mlx_lm.scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)  # type: ignore[no-any-return]
    return attend(q, k, v, scale=scale, mask=mask, cached=cache is not None)


def last_query(mask: Mask) -> mx.array | None:
    """The mask of the last query alone; of a causal one nothing is left."""
    return mask[..., -1:, :] if isinstance(mask, mx.array) else None


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
    """Computes ``scores`` piece by piece."""

    def __init__(self, scores: int) -> None:
        self._turns = Turns()
        self._most = min(PIECE, max(scores // cores(), LEAST))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        """``q`` ``[B, kv heads, heads a kv head, L, size]`` -> the same."""
        scores = _scores(q, k)
        axis = next((axis for axis in range(4) if q.shape[axis] > 1), 3)
        if isinstance(mask, str) and q.shape[3] * self._most // scores >= FEW:
            axis = 3  # earlier queries see fewer keys
        count = q.shape[axis]
        most = max(count * self._most // scores, 1)
        if most >= count:
            return self._turns(partial(_single if q.shape[3] == 1 else _whole, k=k, v=v, mask=mask), q)
        parts = []
        for at, end in itertools.pairwise([0, *evenly(count, -(-count // most)), count]):
            keys, values = (_cut(x, axis, at, end) if axis < 2 else x for x in (k, v))
            if axis == 3 and isinstance(mask, str):  # causal: what none of these queries sees is left out
                keys, values = (x[:, :, : x.shape[2] - count + end] for x in (k, v))
            part = _cut(mask, axis, at, end) if isinstance(mask, mx.array) else mask
            parts.append(self.attend(_cut(q, axis, at, end), keys, values, part))
        return mx.concatenate(parts, axis=axis)


def _scores(q: mx.array, k: mx.array) -> int:
    """How many are in memory at once if no query is cut off."""
    return q.size // q.shape[-1] * min(k.shape[2], KEYS)


def _single(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """One query of each head: MLX's products of one row are the fastest."""
    scores = q @ k[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, mx.array):
        scores = _masked(scores, mask)
    weights = exp2_below(scores, mx.max(scores, axis=-1, keepdims=True))
    return (weights @ v[:, :, None]) / mx.sum(weights, axis=-1, keepdims=True)


def _whole(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """Some keys at a time: where a greater score turns up, the sums over keys before it are scaled down."""
    batch, groups, each, length, size = q.shape
    keys = k.shape[2]
    columns = q.reshape(batch, groups, each * length, size).swapaxes(-1, -2)
    if keys >= 2 * size:  # BLIS's AVX2 kernels multiply rows of queries in up to twice the time
        columns = mx.contiguous(columns)
    before: tuple[mx.array, mx.array, mx.array] | None = None
    for at, end in itertools.pairwise([0, *evenly(keys, -(-keys // KEYS)), keys]):
        # a row for each key: the greatest of a column is found five times as fast as that of a row
        scores = k[:, :, at:end] @ columns
        seen = _seen(mask, at, end, keys, length)
        if seen is not None:
            scores = _masked(mx.unflatten(scores, -1, (each, length)), seen).flatten(-2)
        top = mx.max(scores, axis=-2, keepdims=True)
        if before is not None:
            top = mx.maximum(top, before[0])
        weights = exp2_below(scores, top)
        sums = mx.sum(weights, axis=-2, keepdims=True)
        mixed = weights.swapaxes(-1, -2) @ v[:, :, at:end]
        if before is not None:
            best, total, out = before
            fade = exp2_below(best, top)
            sums, mixed = sums + total * fade, mixed + out * fade.swapaxes(-1, -2)
        before = top, sums, mixed
        columns = mx.depends([columns], [mixed])[0]
    return (mixed / sums.swapaxes(-1, -2)).reshape(batch, groups, each, length, -1)


def _cut(x: mx.array, axis: int, at: int, end: int) -> mx.array:
    """A part of an axis that is not broadcast."""
    return x if x.shape[axis] == 1 else x[(slice(None),) * axis + (slice(at, end),)]


def _seen(mask: Mask, at: int, end: int, keys: int, length: int) -> mx.array | None:
    """What of some keys the last ``length`` queries see, ``[B, kv heads, keys, heads a kv head, L]``; None for all."""
    if isinstance(mask, mx.array):
        return _cut(mask, 4, at, end).transpose(0, 1, 4, 2, 3)
    if mask is None or end <= keys - length + 1:
        return None
    return mx.arange(at, end)[:, None, None] <= mx.arange(keys - length, keys)
