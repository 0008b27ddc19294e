"""Geometry of a grid of patches: their order, their place, and which of them attend to each other.

Patches come frame by frame, in blocks of ``merge x merge`` that later become one token: block row, block column, row
in the block, column in the block. A grid is static, so all of this is computed by NumPy, once per picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from qwenvl_mlx.layers.rotary import Angles, wavelengths

Grid = tuple[int, int, int]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def places(grid: Grid, merge: int) -> tuple[Ints, Ints]:
    """Row and column of every patch of one frame, in patch order."""
    _, h, w = grid
    blocks = np.arange(h * w).reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2)
    return np.divmod(blocks.ravel(), w)


def patch_angles(grid: Grid, merge: int, head_size: int) -> Angles:
    """2-D rotary angles: the first half of a head's pairs turns with the row, the second with the column."""
    pairs = head_size // 4
    speeds = np.float32(1) / wavelengths(10000, 2 * pairs)
    positions = np.stack(places(grid, merge), axis=-1).astype(np.int32)  # [patches of a frame, 2]
    positions = np.tile(positions.repeat(pairs, axis=1), (grid[0], 1))
    return Angles.of(mx.array(positions), np.tile(speeds, 2), head_size)


@dataclass(frozen=True, eq=False)
class Segments:
    """Groups of consecutive patches that attend to each other and to nobody else, as rows of one batch.

    Groups of equal length are a view of the patches. Others are padded to the longest: ``index`` ``[count * length]``
    takes each slot's patch, ``valid`` ``[count, 1, 1, length]`` is False where a slot is padding, and ``back``
    ``[patches]`` takes the patches' slots again.
    """

    count: int
    length: int
    index: mx.array | None = None
    valid: mx.array | None = None
    back: mx.array | None = None

    def slots(self, angles: Angles) -> Angles:
        """Angles of the patches -> angles of the slots."""
        return angles if self.index is None else angles.take(self.index)

    @classmethod
    def frames(cls, grid: Grid) -> Segments:
        """Every frame (temporal group) of a picture or video by itself."""
        return cls(grid[0], grid[1] * grid[2])

    @classmethod
    def of_sizes(cls, sizes: Ints) -> Segments:
        """Consecutive groups of these sizes."""
        longest = int(sizes.max())
        if (sizes == longest).all():
            return cls(len(sizes), longest)
        slots = np.arange(longest)
        valid = slots < sizes[:, None]
        index = np.where(valid, (np.cumsum(sizes) - sizes)[:, None] + slots, 0)
        return cls(
            len(sizes),
            longest,
            mx.array(index.ravel().astype(np.int32)),
            mx.array(valid[:, None, None]),
            mx.array(np.flatnonzero(valid).astype(np.int32)),
        )


@dataclass(frozen=True, eq=False)
class Windows:
    """Qwen2.5-VL's windows: ``order`` takes patches window by window, ``restore`` takes merged tokens back."""

    order: mx.array
    restore: mx.array
    segments: Segments

    @classmethod
    def of(cls, grid: Grid, merge: int, side: int) -> Windows:
        """``side``: of a window, in units of ``merge x merge`` patches; windows at the edges are smaller."""
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        frame, row, column = np.indices((t, h, w)).reshape(3, -1)
        down, across = -(-h // side), -(-w // side)
        window = (frame * down + row // side) * across + column // side
        order, unit = np.argsort(window, kind="stable"), merge * merge
        return cls(
            mx.array((order[:, None] * unit + np.arange(unit)).ravel().astype(np.int32)),
            mx.array(np.argsort(order).astype(np.int32)),
            Segments.of_sizes(np.bincount(window) * unit),
        )


Taps = list[tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.float32]]]]


def bilinear_taps(grid: Grid, merge: int, side: int) -> Taps:
    """How to read a ``side x side`` table at the patches of one frame, corners on corners.

    Four pairs: the table's rows to take ``[patches]``, and their shares.
    """
    axes = [
        _linear_taps(place, size, side) for place, size in zip(places(grid, merge), grid[1:], strict=True)
    ]
    return [
        ((row * side + column).astype(np.int32), down * across)
        for row, down in axes[0]
        for column, across in axes[1]
    ]


def _linear_taps(
    place: Ints, size: int, side: int
) -> list[tuple[Ints, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The two neighbours of each place on one axis, and their shares, in float32 as the reference has them."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    above = source - low
    first = low.astype(np.int64)
    return [(first, 1 - above), (np.minimum(first + 1, side - 1), above)]
