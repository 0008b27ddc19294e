"""Rotary positions of the original Qwen-VL: dynamic NTK for the angles, logn for the length of queries.

Both act beyond the length that the model was trained with. The NTK factor is decided by the length of the whole
prompt and then frozen; logn follows each query's own position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from qwenvl_mlx.layers.rotary import Floats, wavelengths


def ntk_alpha(length: int, trained: int) -> float:
    """1 up to the trained length, 3 up to twice, 7 up to four times, and so on."""
    return max(2.0 ** math.ceil(math.log2(length / trained) + 1) - 1, 1.0)


@dataclass(frozen=True)
class Rotary:
    """What a checkpoint says about positions.

    ``dims``: how many dimensions of a head are rotated; ``base``: of the angles; ``trained``: ``seq_length``.
    """

    dims: int
    base: float
    trained: int
    dynamic_ntk: bool
    logn: bool

    def alpha(self, length: int) -> float:
        """The NTK factor of a prompt of ``length`` tokens."""
        return ntk_alpha(length, self.trained) if self.dynamic_ntk and length else 1.0

    def at(
        self,
        offset: int | mx.array,
        length: int,
        alphas: Sequence[float],
        dtype: mx.Dtype,
        *,
        most: int | None = None,
    ) -> Positions:
        """Positions of one forward pass: ``length`` tokens after ``offset``, int or int32 ``[B]``.

        ``alphas``: the factor of each row, or one for all; ``dtype``: of the queries, which logn is rounded to.
        ``most``: positions that an array of offsets can't go beyond, if that is known.
        """
        short = self.trained >= (offset + length if isinstance(offset, int) else most or math.inf)
        factor = 1.0 if short or not self.logn else self._query_factor(offset, length)
        if isinstance(factor, mx.array):
            factor = factor.astype(dtype)
        if len(set(alphas)) == 1:
            return Positions(self.dims, offset, factor, wavelengths=mx.array(self._wavelengths(alphas[0])))
        speeds = 1 / mx.array(np.stack([self._wavelengths(alpha) for alpha in alphas]))  # [B, dims/2]
        angles = self._absolute(offset, length)[..., None] * speeds[:, None, None]  # [B, 1, L, dims/2]
        turn = (mx.cos(angles), mx.sin(angles))
        return Positions(self.dims, offset, factor, turn=turn)

    def _wavelengths(self, alpha: float) -> Floats:
        return wavelengths(self.base * alpha ** (self.dims / (self.dims - 2)), self.dims)

    def _absolute(self, offset: int | mx.array, length: int) -> mx.array:
        if isinstance(offset, mx.array):
            offset = offset.reshape(-1, 1, 1)
        return (mx.arange(length) + offset).astype(mx.float32)  # [L] or [B, 1, L]

    def _query_factor(self, offset: int | mx.array, length: int) -> float | mx.array:
        """``ln(p + 1) / ln(trained)`` where a 0-based position ``p`` is beyond the trained length, else 1."""
        if isinstance(offset, int) and length == 1:
            return math.log(offset + 1) / math.log(self.trained)
        beyond = mx.maximum((self._absolute(offset, length) + 1) / self.trained, 1.0)
        return (1 + mx.log(beyond) / math.log(self.trained))[..., None]  # [L, 1] or [B, 1, L, 1]


@dataclass(frozen=True, eq=False)
class Positions:
    """Computed once for a forward pass, used by every layer.

    ``query_factor``: logn, a number or an array that broadcasts to ``[B, heads, L, head size]``.
    Either ``wavelengths`` ``[dims/2]``, shared by all rows, or ``turn``: cosines and sines ``[B, 1, L, dims/2]``.
    """

    dims: int
    offset: int | mx.array
    query_factor: float | mx.array
    wavelengths: mx.array | None = None
    turn: tuple[mx.array, mx.array] | None = None

    def by_heads(self, turning: int, heads: int) -> Positions:
        """For a single token whose ``heads`` take the place of rows, ``[heads, 1, 1, head size]``.

        Only the first ones turn: the others are at position 0. So one kernel serves queries, keys and values.
        """
        return replace(self, offset=mx.where(mx.arange(heads) < turning, self.offset, 0))

    def rotate(self, x: mx.array) -> mx.array:
        """Rotate ``[B, heads, L, head size]``, halves against each other, in float32."""
        if self.turn is None:
            return mx.fast.rope(
                x,
                self.dims,
                traditional=False,
                base=None,
                scale=1.0,
                offset=self.offset,
                freqs=self.wavelengths,
            )
        cos, sin = self.turn
        one, two, rest = mx.split(x.astype(mx.float32), [self.dims // 2, self.dims], axis=-1)
        turned = mx.concatenate([one * cos - two * sin, two * cos + one * sin, rest], axis=-1)
        return turned.astype(x.dtype)
