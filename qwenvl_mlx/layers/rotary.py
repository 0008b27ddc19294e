"""Rotary angles, computed once for a forward pass and applied to queries and keys in one kernel.

A rotated head pairs dimension ``j`` with ``j + dims/2``. Seen as runs of ``dims/2`` numbers, a head is: the first
halves, the second halves, and whatever is not rotated. With those as broadcast views the rotation is elementwise,
so MLX fuses it (with the weight of a query or key norm) into one kernel that copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from qwenvl_mlx.config import one_of
from qwenvl_mlx.errors import ConfigError

Floats = np.ndarray[Any, np.dtype[np.float32]]


def wavelengths(base: float, dims: int) -> Floats:
    """``base^(2i/dims)`` of the ``dims/2`` pairs: positions a radian, in the reference's float32.

    The power itself is taken in float64 and rounded: NumPy's float32 power is off by one unit on some processors,
    which turns by 4e-4 at position 3000.
    """
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (float(np.float32(base)) ** exponents.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Angles:
    """What turns the heads of every token: ``x * cos + partner * sin``.

    ``cos``, ``sin``: float32 ``[..., 1, runs, dims/2]``; the first run's sines are negative, those of runs that are not
    rotated zero. ``leads``: bool ``[runs, 1]``, True for the first run, whose partner is the second.
    """

    cos: mx.array
    sin: mx.array
    leads: mx.array

    @classmethod
    def of(cls, positions: mx.array, speeds: Floats, head_size: int) -> Angles:
        """``positions``: ``[..., dims/2]`` or ``[..., 1]``, a row for each token; ``speeds``: radians a position."""
        half = len(speeds)
        sign = np.zeros((2 if head_size % half else head_size // half, 1), np.float32)
        sign[:2, 0] = -1, 1
        positions = mx.expand_dims(positions, (-3, -2))  # [..., 1, 1, dims/2]
        return cls(*_tables(positions, mx.array(speeds), mx.array(sign)), mx.array(sign < 0))

    def take(self, index: mx.array) -> Angles:
        """The tokens in another order."""
        return Angles(self.cos[index], self.sin[index], self.leads)

    def turn(self, x: mx.array) -> mx.array:
        """Rotate ``[..., heads, size]`` in float32."""
        half = self.cos.shape[-1]
        if x.shape[-1] % half:
            return mx.concatenate([self.turn(x[..., : 2 * half]), x[..., 2 * half :]], axis=-1)
        runs = x.reshape(*x.shape[:-1], -1, half)  # [..., heads, runs, half]
        return _turn(_views(runs), self.cos, self.sin, self.leads).reshape(x.shape)

    def turn_some(
        self,
        raw: mx.array,
        shape: tuple[int, ...],
        normed: mx.array | None,
        weights: HeadWeights | None,
        kept: mx.array,
    ) -> mx.array:
        """``turn`` of the heads ``[..., heads, size]``; those ``kept``, bool ``[heads, 1, 1]``, stay ``raw``.

        ``raw``: any shape that becomes ``shape``. ``normed``: what turns in its place, after a product with its
        ``weights`` in its dtype. The result has the order of ``shape``; its last axis may still be in runs.
        """
        half, size = self.cos.shape[-1], shape[-1]
        if size % half:
            raw = raw.reshape(shape)
            x = raw if normed is None or weights is None else normed * weights.flat
            return mx.where(kept.squeeze(-1), raw, self.turn(x))
        runs = (*shape[:-1], size // half, half)
        raw = raw.reshape(runs)
        x = raw if normed is None else normed.reshape(runs)
        return _turn_some(
            _views(x), weights.views if weights else (), self.cos, self.sin, self.leads, kept, raw
        )


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Weights of the norms of all heads, ``[heads, size]``, and as the views that a rotation takes."""

    flat: mx.array
    views: tuple[mx.array, ...]

    @classmethod
    def of(cls, flat: mx.array, dims: int) -> HeadWeights:
        """``dims``: how many numbers of a head are rotated."""
        half = dims // 2
        heads, size = flat.shape
        return cls(flat, () if size % half else _views(flat.reshape(heads, -1, half)))


def _views(runs: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """All runs, the first and the second."""
    return runs, runs[..., 0:1, :], runs[..., 1:2, :]


@partial(mx.compile, shapeless=True)
def _tables(positions: mx.array, speeds: mx.array, sign: mx.array) -> tuple[mx.array, mx.array]:
    """``sign``: -1, 1, and 0 for runs that are not rotated."""
    angles = positions.astype(mx.float32) * speeds
    return mx.where(sign == 0, 1.0, mx.cos(angles)), sign * mx.sin(angles)


@partial(mx.compile, shapeless=True)
def _turn(heads: tuple[mx.array, ...], cos: mx.array, sin: mx.array, leads: mx.array) -> mx.array:
    """``heads``: all runs, the first and the second."""
    x, first, second = heads
    partner = mx.where(leads, second, first).astype(mx.float32)
    return (x.astype(mx.float32) * cos + partner * sin).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _turn_some(
    heads: tuple[mx.array, ...],
    weights: tuple[mx.array, ...],
    cos: mx.array,
    sin: mx.array,
    leads: mx.array,
    kept: mx.array,
    raw: mx.array,
) -> mx.array:
    """``weights``: views as those of ``heads``, or none."""
    if weights:
        heads = tuple((part * w).astype(part.dtype) for part, w in zip(heads, weights, strict=True))
    return mx.where(kept, raw, _turn(heads, cos, sin, leads))


@dataclass(frozen=True)
class MRope:
    """Rotary positions on three axes (time, height, width): which axis turns which pair, and how fast.

    ``size``: of a head; ``dims``: how many of its dimensions are rotated; ``sections``: pairs of each axis;
    ``interleaved``: Qwen3's order of them (t h w t h w …) instead of Qwen2's chunks (t… h… w…).
    """

    size: int
    dims: int
    theta: float
    sections: tuple[int, ...]
    interleaved: bool

    def at(self, positions: mx.array) -> Angles:
        """Angles of positions on three axes, ``[3, L]`` or ``[3, B, L]``."""
        if positions.ndim == 2:
            positions = positions[:, None]
        each = mx.take(positions, mx.array(self.axes()), axis=0)  # [dims/2, B, L]
        return Angles.of(each.transpose(1, 2, 0), self.speeds(), self.size)

    def text(self, positions: mx.array) -> Angles:
        """Angles of text, where the axes agree: positions ``[B, L]``."""
        return Angles.of(positions[..., None], self.speeds(), self.size)

    def speeds(self) -> Floats:
        """Radians a position, of each pair."""
        return np.float32(1) / wavelengths(self.theta, self.dims)

    def axes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The axis (0 time, 1 height, 2 width) that turns each pair."""
        pairs = np.arange(self.dims // 2)
        if not self.interleaved:
            return np.repeat(np.arange(3), self.sections).astype(np.int32)
        axis = pairs % 3
        return np.where(pairs < 3 * np.array(self.sections)[axis], axis, 0).astype(np.int32)

    @classmethod
    def of(
        cls, text: Mapping[str, Any], head_size: int, *, interleaved: bool, defaults: Mapping[str, Any]
    ) -> MRope:
        """From a decoder's configuration, under either name; ``defaults`` for the keys that may be absent."""
        raw = {**text, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        for key in ("rope_type", "type"):
            one_of(raw.get(key, "default"), ["default", "mrope"], key=f"rope {key}")
        raw = {**defaults, **raw}
        missing = [key for key in ("rope_theta", "mrope_section") if key not in raw]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)} of the rotary positions")
        dims = int(head_size * raw.get("partial_rotary_factor", 1.0))
        sections = tuple(raw["mrope_section"])
        if dims % 2 or len(sections) != 3 or not (interleaved or sum(sections) == dims // 2):
            raise ConfigError(
                f"config.json: mrope_section {list(sections)} must divide the {dims // 2} pairs of a head into three"
            )
        return cls(head_size, dims, float(raw["rope_theta"]), sections, interleaved)
